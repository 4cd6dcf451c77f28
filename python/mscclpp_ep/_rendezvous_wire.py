# SPDX-License-Identifier: MIT
"""What the ranks of a socket group say to each other: deadlines, frames and the handshake.

The handshake has fixed sizes and runs before any length is believed:

1. server to client: magic, server nonce
2. client to server: magic, client nonce, rank, size, HMAC of all of them and the server nonce
3. server to client: verdict, length of a text, HMAC of both nonces and the verdict, text

After it both sides send frames: kind, sequence number, length, bytes. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import operator
import selectors
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

from mscclpp_ep._core import Error, InvalidArgument, PeerFailure, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"MSCEP\x00\x00\x01"
NONCE_BYTES = 32
CHALLENGE = struct.Struct(f"!8s{NONCE_BYTES}s")
HELLO = struct.Struct(f"!8s{NONCE_BYTES}sII32s")
VERDICT = struct.Struct("!BH32s")
FRAME = struct.Struct("!BIQ")

JOINED, REFUSED = 1, 2
WELCOME, DATA, STATUS, TIMED_OUT, FAILED = range(16, 21)
HANDSHAKE_SECONDS = 10.0
MAX_DATA = 1 << 28
_CHUNK = 1 << 20


class Deadline:
    """A point in time until which a call may wait."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left, 0 when there are none."""
        return max(0.0, self._end - time.monotonic())

    def expired(self) -> bool:
        """Tell whether no time is left."""
        return self.left() <= 0.0


def check_timeout(timeout: float) -> float:
    """Return `timeout` as a float.

    Raises:
        InvalidArgument: It is not a positive, finite number of seconds.
    """
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not math.isfinite(timeout) or timeout <= 0:
        msg = f"timeout is {timeout!r}; give a positive number of seconds"
        raise InvalidArgument(msg)
    return float(timeout)


def check_int(name: str, value: object, low: int, high: int | None) -> int:
    """Return `value` as an int.

    Raises:
        InvalidArgument: It is no integer from `low` to `high` (None: without end).
    """
    allowed = f"an integer of at least {low}" if high is None else f"{low} to {high}"
    number = low - 1
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        number = operator.index(value)
    if number < low or (high is not None and number > high):
        msg = f"{name} is {value!r}; allowed is {allowed}"
        raise InvalidArgument(msg)
    return number


def split(data: bytes | bytearray, lengths: Iterable[int]) -> list[bytes]:
    """Return the consecutive pieces of `data` that have the given lengths."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return [bytes(data[begin:end]) for begin, end in itertools.pairwise(ends)]


def name_ranks(ranks: Iterable[int]) -> str:
    """Return "rank 3" or "ranks 1, 3"."""
    listed = sorted(ranks)
    return f"rank{'s' * (len(listed) != 1)} {', '.join(map(str, listed))}"


def same_error(error: Error) -> Error:
    """Return a fresh error of the type and with the message of `error`."""
    return type(error)(str(error))


def sign(key: bytes, role: bytes, *parts: bytes) -> bytes:
    """Return the HMAC of `parts`, whose lengths are fixed but for the last, in the given role."""
    return hmac.new(key, role + b"".join(parts), hashlib.sha256).digest()


def numbers(rank: int, size: int) -> bytes:
    """Return rank and size in the form that is signed."""
    return struct.pack("!II", rank, size)


class Frame(NamedTuple):
    """One message after the handshake."""

    kind: int
    sequence: int
    data: bytes

    def error(self) -> Error | None:
        """Return the error that this frame reports, or None."""
        kinds: dict[int, type[Error]] = {TIMED_OUT: Timeout, FAILED: PeerFailure}
        found = kinds.get(self.kind)
        return found(self.data.decode(errors="replace")) if found else None


class Connection:
    """A socket that carries the handshake and then frames.

    It never reads more than the message it expects, so that a stranger cannot make it hold memory.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sock = sock
        self._inbox = bytearray()
        self._header: tuple[int, int, int] | None = None
        self._torn = False
        self.frame_limit = MAX_DATA

    def fileno(self) -> int:
        """Return the file descriptor, for selectors."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket; the peer reads end-of-file."""
        self._sock.close()

    def read(self, count: int) -> bytes | None:
        """Return the next `count` bytes, or None while they have not all arrived.

        Raises:
            OSError: The peer closed the connection, or it broke.
        """
        while len(self._inbox) < count:
            try:
                chunk = self._sock.recv(min(count - len(self._inbox), _CHUNK))
            except BlockingIOError:
                return None
            if not chunk:
                msg = "the peer closed the connection"
                raise ConnectionResetError(msg)
            self._inbox += chunk
        message = bytes(self._inbox)
        self._inbox.clear()
        return message

    def read_by(self, count: int, deadline: Deadline) -> bytes:
        """Return the next `count` bytes; wait for them until the deadline.

        Raises:
            OSError: The peer closed the connection, it broke, or the deadline passed.
        """
        while (message := self.read(count)) is None:
            if not self.wait(deadline):
                msg = "no answer"
                raise TimeoutError(msg)
        return message

    def read_frame(self) -> Frame | None:
        """Return the next frame, or None while it has not all arrived.

        Raises:
            OSError: The peer closed the connection, it broke, or the frame is too long.
        """
        if self._header is None:
            raw = self.read(FRAME.size)
            if raw is None:
                return None
            self._header = FRAME.unpack(raw)
        kind, sequence, length = self._header
        if length > self.frame_limit:
            msg = f"the peer announced {length} bytes, more than {self.frame_limit}"
            raise ConnectionAbortedError(msg)
        data = self.read(length)
        if data is None:
            return None
        self._header = None
        return Frame(kind, sequence, data)

    def wait(self, deadline: Deadline) -> bool:
        """Wait until something can be read; False when the deadline passed first."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            return bool(selector.select(deadline.left()))

    def send(self, message: bytes, deadline: Deadline) -> None:
        """Send raw bytes.

        Raises:
            OSError: The connection broke, or the deadline passed (a TimeoutError).
        """
        self._torn = True
        self._sock.settimeout(max(deadline.left(), 0.001))
        try:
            self._sock.sendall(message)
        finally:
            self._sock.setblocking(False)
        self._torn = False

    def send_frame(self, frame: Frame, deadline: Deadline) -> None:
        """Send one frame; errors as `send`."""
        header = FRAME.pack(frame.kind, frame.sequence, len(frame.data))
        self.send(header + frame.data, deadline)

    def report(self, error: Error, sequence: int) -> None:
        """Tell the peer of `error` if it still can be told; close after half a message."""
        kind = TIMED_OUT if isinstance(error, Timeout) else FAILED
        try:
            if self._torn:
                self.close()
            else:
                self.send_frame(Frame(kind, sequence, str(error).encode()), Deadline(1.0))
        except OSError:
            self.close()
