# SPDX-License-Identifier: MIT
"""Gathers over sockets, all of which go through rank 0.

A channel that failed stays failed: what was sent before would be taken for something else.
"""

from __future__ import annotations

import selectors
import struct
from typing import TYPE_CHECKING, Protocol

from mscclpp_ep import _rendezvous_wire as wire
from mscclpp_ep._core import Error, InvalidArgument, PeerFailure, Timeout
from mscclpp_ep._rendezvous_wire import Connection, Deadline, Frame, name_ranks, same_error

if TYPE_CHECKING:
    from collections.abc import Iterable


class Channel(Protocol):
    """What carries the gathers of a group."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks."""

    def close(self) -> None:
        """Let go of what the channel holds; may be called twice."""


class _Star:
    """What rank 0 and the others share: the numbers of the gathers, and the first error."""

    def __init__(self, rank: int, peers: dict[int, Connection], timeout: float) -> None:
        self._rank = rank
        self._peers = peers
        self._timeout = timeout
        self._sequence = 0
        self._error: Error | None = None

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks.

        Raises:
            InvalidArgument: The data is longer than a message may be.
            PeerFailure: A rank died, closed its group or gave up; the message names it.
            Timeout: Ranks are missing; the message names them.
        """
        if self._error is not None:
            raise same_error(self._error)
        if len(data) > wire.MAX_DATA:
            msg = f"data has {len(data)} bytes; at most {wire.MAX_DATA} are allowed"
            raise InvalidArgument(msg)
        self._sequence += 1
        return self._guarded(data, Deadline(self._timeout))

    def _guarded(self, data: bytes, deadline: Deadline) -> list[bytes]:
        try:
            return self._exchange(data, deadline)
        except Error as error:
            self._error = same_error(error)
            for peer in self._peers.values():
                peer.report(error, self._sequence)
            raise
        except BaseException:
            self._error = PeerFailure(f"rank {self._rank} was interrupted in an earlier gather")
            self.close()
            raise

    def _exchange(self, data: bytes, deadline: Deadline) -> list[bytes]:
        raise NotImplementedError

    def close(self) -> None:
        """Close all sockets; peers that still wait raise PeerFailure."""
        for peer in self._peers.values():
            peer.close()


class Hub(_Star):
    """Rank 0's side."""

    def __init__(self, peers: dict[int, Connection], timeout: float) -> None:
        super().__init__(0, peers, timeout)

    def _exchange(self, data: bytes, deadline: Deadline) -> list[bytes]:
        parts = {0: data}
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            self._collect(parts, selector, deadline)
        ordered = [parts[rank] for rank in sorted(parts)]
        reply = struct.pack(f"!{len(ordered)}Q", *map(len, ordered)) + b"".join(ordered)
        for rank, peer in self._peers.items():
            send_to(rank, peer, Frame(wire.DATA, self._sequence, reply), deadline)
        return ordered

    def _collect(
        self, parts: dict[int, bytes], selector: selectors.BaseSelector, deadline: Deadline
    ) -> None:
        status = Deadline(deadline.seconds / 4)
        while missing := self._peers.keys() - parts.keys():
            if deadline.expired():
                msg = (
                    f"{name_ranks(missing)} did not come to gather {self._sequence} "
                    f"within {deadline.seconds:g} s"
                )
                raise Timeout(msg)
            if status.expired():
                status = Deadline(deadline.seconds / 4)
                waiting = [self._peers[rank] for rank in parts if rank != 0]
                tell_status(waiting, self._sequence, missing)
            for key, _ in selector.select(min(status.left(), deadline.left())):
                self._hear(key.data, parts)

    def _hear(self, rank: int, parts: dict[int, bytes]) -> None:
        """Take what came from one rank: its part, and that it gave up or died after it."""
        while (frame := receive_from(rank, self._peers[rank])) is not None:
            if error := frame.error():
                raise error
            if rank in parts or frame.kind != wire.DATA or frame.sequence != self._sequence:
                raise out_of_step(rank, frame, self._sequence)
            parts[rank] = frame.data


class Spoke(_Star):
    """The side of every other rank."""

    def __init__(self, connection: Connection, rank: int, size: int, timeout: float) -> None:
        super().__init__(rank, {0: connection}, timeout)
        self._hub = connection
        self._size = size
        connection.frame_limit = size * (wire.MAX_DATA + 8)

    def await_welcome(self, deadline: Deadline) -> None:
        """Wait until rank 0 has seen all ranks; errors as `all_gather`, after which it is closed.

        Args:
            deadline: The end of the whole rendezvous.
        """
        try:
            self._receive(wire.WELCOME, deadline)
        except BaseException as error:
            if isinstance(error, Error):
                self._hub.report(error, 0)
            self.close()
            raise

    def _exchange(self, data: bytes, deadline: Deadline) -> list[bytes]:
        try:
            self._hub.send_frame(Frame(wire.DATA, self._sequence, data), deadline)
        except TimeoutError:
            raise self._missed(deadline, "rank 0") from None
        except OSError:
            pass  # Rank 0 may have said why before it left.
        return self._parts(self._receive(wire.DATA, deadline))

    def _parts(self, reply: bytes) -> list[bytes]:
        """Return the parts in rank 0's reply, which begins with their lengths."""
        header = struct.Struct(f"!{self._size}Q")
        lengths = header.unpack_from(reply) if len(reply) >= header.size else ()
        if header.size + sum(lengths) != len(reply):
            msg = f"rank 0 sent a malformed reply in gather {self._sequence}"
            raise PeerFailure(msg)
        return wire.split(reply, (header.size, *lengths))[1:]

    def _receive(self, kind: int, deadline: Deadline) -> bytes:
        missing = "rank 0"
        while True:
            frame = receive_from(0, self._hub)
            if frame is None:
                if not self._hub.wait(deadline):
                    raise self._missed(deadline, missing)
            elif error := frame.error():
                raise error
            elif frame.kind == wire.STATUS:
                missing = frame.data.decode(errors="replace")
                if deadline.expired():  # also if rank 0 never stops saying so
                    raise self._missed(deadline, missing)
            elif frame.kind != kind or frame.sequence != self._sequence:
                raise out_of_step(0, frame, self._sequence)
            else:
                return frame.data

    def _missed(self, deadline: Deadline, missing: str) -> Timeout:
        what = f"gather {self._sequence}" if self._sequence else "the rendezvous"
        msg = f"{missing} did not come to {what} within {deadline.seconds:g} s"
        return Timeout(msg)


def receive_from(rank: int, peer: Connection) -> Frame | None:
    """Return the next frame of a rank, or None while it has not all arrived.

    Raises:
        PeerFailure: The rank has gone.
    """
    try:
        return peer.read_frame()
    except OSError as error:
        msg = f"rank {rank} died or closed its group ({error.strerror or error})"
        raise PeerFailure(msg) from None


def send_to(rank: int, peer: Connection, frame: Frame, deadline: Deadline) -> None:
    """Send a frame to a rank.

    Raises:
        PeerFailure: The rank has gone.
        Timeout: The rank does not take it.
    """
    try:
        peer.send_frame(frame, deadline)
    except TimeoutError:
        msg = f"rank {rank} does not take its data within {deadline.seconds:g} s"
        raise Timeout(msg) from None
    except OSError as error:
        msg = f"rank {rank} died or closed its group ({error.strerror or error})"
        raise PeerFailure(msg) from None


def tell_status(peers: Iterable[Connection], sequence: int, missing: Iterable[int]) -> None:
    """Tell ranks that wait who is missing, so that they can say so if they give up first."""
    for peer in peers:
        try:
            peer.send_frame(
                Frame(wire.STATUS, sequence, name_ranks(missing).encode()), Deadline(1.0)
            )
        except OSError:
            continue  # Its end-of-file will be heard.


def out_of_step(rank: int, frame: Frame, sequence: int) -> PeerFailure:
    """Return the error for a frame that does not belong here."""
    msg = (
        f"rank {rank} is out of step: it sent message {frame.kind} of gather {frame.sequence} "
        f"during gather {sequence}"
    )
    return PeerFailure(msg)
