# SPDX-License-Identifier: MIT
"""Ranks that find each other by a host name and a port.

Rank 0 listens; the others connect. Both sides prove that they know the token before anything else
is read. A stranger who is silent, talks nonsense or holds another token disturbs nobody.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from mscclpp_ep import _rendezvous_wire as wire
from mscclpp_ep._core import Error, InvalidArgument, SystemError, Timeout
from mscclpp_ep._rendezvous_lobby import Lobby
from mscclpp_ep._rendezvous_star import Hub, Spoke
from mscclpp_ep._rendezvous_wire import HANDSHAKE_SECONDS, Connection, Deadline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mscclpp_ep._rendezvous_star import Channel

_PORT_TRIES = 8
_MAX_PORT = 65535
_JOB_ID_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "SLURM_JOB_ID",
    "PMIX_NAMESPACE",
    "PBS_JOBID",
    "LSB_JOBID",
    "JOB_ID",
)


class Place(NamedTuple):
    """Where the ranks meet, and who this rank is."""

    rank: int
    size: int
    host: str
    ports: Sequence[int]
    key: bytes
    several_hosts: bool
    """The ranks are known to be on more than one host."""


def connect(place: Place, timeout: float) -> Channel:
    """Meet the other ranks.

    Raises:
        InvalidArgument: The host is unknown, or rank 0 refused this rank.
        SystemError: No port could be bound.
        PeerFailure: A rank gave up or died.
        Timeout: Ranks are missing; the message names them.
    """
    deadline = Deadline(timeout)
    if place.rank == 0:
        with _listen(place, deadline) as listener, Lobby(place, listener, deadline) as lobby:
            return Hub(lobby.gather_peers(), timeout)
    connection = _join(place, deadline)
    channel = Spoke(connection, place.rank, place.size, timeout)
    channel.await_welcome(deadline)
    return channel


# -------------------------------------------------------------------------------- the environment


def _env_text(name: str, meaning: str) -> str:
    value = os.environ.get(name, "")
    if not value.strip():
        given = "empty" if name in os.environ else "not set"
        msg = f"{name} is {given}; give {meaning}, as torchrun does"
        raise InvalidArgument(msg)
    return value


def env_int(name: str, low: int, high: int | None) -> int:
    """Return the integer in an environment variable.

    Raises:
        InvalidArgument: It is missing, malformed or out of range.
    """
    text = _env_text(name, f"an integer of at least {low}")
    try:
        value: object = int(text)
    except ValueError:
        value = text
    return wire.check_int(name, value, low, high)


def _env_ports() -> list[int]:
    """Return the ports rank 0 may listen on: never MASTER_PORT, which the launcher holds."""
    if "MSCCLPP_EP_PORT" in os.environ:
        return [env_int("MSCCLPP_EP_PORT", 1, _MAX_PORT)]
    port = env_int("MASTER_PORT", 1, _MAX_PORT)
    step = 1 if port + _PORT_TRIES <= _MAX_PORT else -1
    return [port + step * (i + 1) for i in range(_PORT_TRIES)]


def _env_key(size: int, port: int) -> bytes:
    """Return the key of the handshake; without a token it is no secret."""
    if "MSCCLPP_EP_TOKEN" in os.environ:
        text = _env_text("MSCCLPP_EP_TOKEN", "a secret that all ranks share")
        return hashlib.sha256(b"mscclpp_ep token " + os.fsencode(text)).digest()
    job = next((os.environ[name] for name in _JOB_ID_VARIABLES if os.environ.get(name)), "")
    return hashlib.sha256(os.fsencode(f"mscclpp_ep job {size} {port} {job}")).digest()


def place_from_env(rank: int, size: int) -> Place:
    """Return where the environment says that the ranks meet.

    Raises:
        InvalidArgument: A variable is missing or malformed.
    """
    host = _env_text("MASTER_ADDR", "the host of rank 0").strip()
    ports = _env_ports()
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    several_hosts = local.isdecimal() and len(local) < 10 and int(local) < size
    return Place(rank, size, host, ports, _env_key(size, ports[0]), several_hosts)


# ------------------------------------------------------------------------------- rank 0: the port


def _bind_address(place: Place) -> tuple[socket.AddressFamily, str]:
    """Return the address to listen on: loopback if the host is this one only, else any.

    A *name* may mean loopback here and something else on another host, as a host's own name does.
    """
    try:
        found = socket.getaddrinfo(place.host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        msg = f"MASTER_ADDR is {place.host!r}, which has no address ({error}); give rank 0's host"
        raise InvalidArgument(msg) from None
    family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    host = str(address[0])
    if _is_loopback(host) and not (place.several_hosts and not _means_this_host(place.host)):
        return family, host
    return family, "::" if family == socket.AF_INET6 else ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _means_this_host(name: str) -> bool:
    return name == "localhost" or _is_loopback(name)


def _listen(place: Place, deadline: Deadline) -> socket.socket:
    """Return a socket that listens on the first port that is free."""
    family, host = _bind_address(place)
    failures = []
    for port in place.ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(min(place.size + 64, 4096))
        except OSError as error:
            listener.close()
            failures.append(f"{port}: {error.strerror}")
            if error.errno == errno.EADDRINUSE:
                _refuse_second_rank_0(place, port, deadline)
        else:
            listener.setblocking(False)
            return listener
    msg = f"rank 0 could not listen ({'; '.join(failures)}); set MSCCLPP_EP_PORT to a free port"
    raise SystemError(msg)


def _refuse_second_rank_0(place: Place, port: int, deadline: Deadline) -> None:
    """Ask whoever holds the port: another rank 0 of the same group says so."""
    try:
        _knock(place, port, 1.0, deadline).close()
    except Error:
        raise
    except OSError:
        return


# --------------------------------------------------------------------------------- the other ranks


def _join(place: Place, deadline: Deadline) -> Connection:
    """Try the ports in turn until rank 0 answers properly and takes this rank in."""
    patience, pause = 1.0, 0.01
    reasons: dict[int, object] = {}
    while True:
        for port in place.ports:
            try:
                return _knock(place, port, patience, deadline)
            except Error:
                raise
            except OSError as error:
                if not (deadline.expired() and port in reasons):
                    reasons[port] = error.strerror or error
            if deadline.expired():
                msg = (
                    f"rank {place.rank}: rank 0 is missing: nobody with this group's token "
                    f"answered at {place.host} within {deadline.seconds:g} s "
                    f"(port {'; '.join(f'{at}: {why}' for at, why in reasons.items())})"
                )
                raise Timeout(msg)
        time.sleep(min(pause, deadline.left()))
        patience, pause = min(2 * patience, HANDSHAKE_SECONDS), min(2 * pause, 0.2)


def _knock(place: Place, port: int, patience: float, deadline: Deadline) -> Connection:
    """Do the handshake at one port, which must say something within `patience` seconds.

    Raises:
        InvalidArgument: Rank 0, proven to be of this group, refused this rank.
        OSError: Nobody is there, or somebody else.
    """
    soon = Deadline(min(patience, deadline.left()) + 0.001)
    sock = socket.create_connection((place.host, port), soon.seconds)
    connection = Connection(sock)
    try:
        if sock.getsockname() == sock.getpeername():
            msg = "nobody listens"
            raise ConnectionRefusedError(msg)
        server_nonce = _read_challenge(connection, soon)
        limit = Deadline(min(HANDSHAKE_SECONDS, deadline.left()))
        _shake_hands(connection, place, server_nonce, limit)
    except BaseException:
        connection.close()
        raise
    return connection


def _read_challenge(connection: Connection, deadline: Deadline) -> bytes:
    challenge = connection.read_by(wire.CHALLENGE.size, deadline)
    magic, server_nonce = wire.CHALLENGE.unpack(challenge)
    if magic != wire.MAGIC:
        msg = "another program answered"
        raise ConnectionAbortedError(msg)
    return bytes(server_nonce)


def _shake_hands(
    connection: Connection, place: Place, server_nonce: bytes, deadline: Deadline
) -> None:
    nonce = secrets.token_bytes(wire.NONCE_BYTES)
    signed = (server_nonce, nonce, wire.numbers(place.rank, place.size))
    proof = wire.sign(place.key, b"client", *signed)
    hello = wire.HELLO.pack(wire.MAGIC, nonce, place.rank, place.size, proof)
    connection.send(hello, deadline)
    try:
        header = connection.read_by(wire.VERDICT.size, deadline)
        verdict, length, proof = wire.VERDICT.unpack(header)
        text = connection.read_by(length, deadline)
    except ConnectionResetError:
        msg = "refused: MSCCLPP_EP_TOKEN, job id, WORLD_SIZE or port differ"
        raise ConnectionResetError(msg) from None
    expected = wire.sign(place.key, b"server", *signed, bytes([verdict]), text)
    if not hmac.compare_digest(proof, expected):
        msg = "the server does not know the token"
        raise ConnectionAbortedError(msg)
    if verdict != wire.JOINED:
        raise InvalidArgument(text.decode(errors="replace"))
