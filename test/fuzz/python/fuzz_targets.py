# SPDX-License-Identifier: MIT
"""What the package parses that peers or files may have broken: one function a parser.

A function takes any bytes, and returns or raises one of the library's own errors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from mscclpp_ep import _rendezvous as rendezvous
from mscclpp_ep import _rendezvous_files as files
from mscclpp_ep import _rendezvous_lobby as lobby
from mscclpp_ep import _rendezvous_star as star
from mscclpp_ep import _rendezvous_wire as wire
from mscclpp_ep._core import Error
from mscclpp_ep.cli import InputError, machine, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT = 0.01
KEY = b"k" * 32
NONCE = b"n" * wire.NONCE_BYTES
NONCE_HEX = "0123456789abcdef" * 2
SIZE = 3


@contextlib.contextmanager
def peer_that_says(data: bytes) -> Iterator[wire.Connection]:
    """A connection to a peer that says this, and closes its side unless the data begin with 0."""
    ours, theirs = socket.socketpair()
    connection = None
    try:
        with mock.patch.object(wire, "socket", _UnixSockets):
            connection = wire.Connection(ours)
        theirs.sendall(data[1:])
        if data[:1] != b"\0":
            theirs.shutdown(socket.SHUT_WR)
        yield connection
    finally:
        ours.close()
        theirs.close()


class _UnixSockets:
    """The constants of `socket`, by which a Unix socket takes the options of a TCP one."""

    IPPROTO_TCP = socket.SOL_SOCKET
    TCP_NODELAY = socket.SO_KEEPALIVE
    SOL_SOCKET = socket.SOL_SOCKET
    SO_KEEPALIVE = socket.SO_KEEPALIVE


def spoke(data: bytes) -> None:
    """A rank that waits for rank 0, and gathers."""
    with peer_that_says(data) as connection:
        channel = star.Spoke(connection, 1, SIZE, TIMEOUT)
        channel.await_welcome(wire.Deadline(TIMEOUT))
        parts = channel.all_gather(b"part")
        assert len(parts) == SIZE
        assert sum(map(len, parts)) <= len(data)


def hub(data: bytes) -> None:
    """Rank 0, which gathers from rank 1."""
    with peer_that_says(data) as connection:
        channel = star.Hub({1: connection}, TIMEOUT)
        assert len(channel.all_gather(b"part")) == SIZE - 1


def knock(data: bytes) -> None:
    """The handshake, as the rank that comes sees it."""
    place = rendezvous.Place(1, SIZE, "127.0.0.1", [1], KEY, several_hosts=False)
    with (
        peer_that_says(data) as connection,
        mock.patch("secrets.token_bytes", lambda count: NONCE[:count]),
        contextlib.suppress(OSError),  # of which the caller makes a reason to try again
    ):
        deadline = wire.Deadline(TIMEOUT)
        nonce = rendezvous._read_challenge(connection, deadline)
        rendezvous._shake_hands(connection, place, nonce, deadline)


def guest(data: bytes) -> None:
    """The handshake, as rank 0 sees it, and what a rank says while it waits for others."""
    place = rendezvous.Place(0, SIZE, "127.0.0.1", [1], KEY, several_hosts=False)
    proven = data[:1] != b"\1"
    if proven:  # with a proof made here, which no mutation finds
        rank, size, data = int.from_bytes(data[1:3], "big"), 3 + data[3:4].count(b"\1"), data[4:]
        signed = (NONCE, NONCE, wire.numbers(rank, size))
        proof = wire.sign(KEY, b"client", *signed)
        data = b"\2" + wire.HELLO.pack(wire.MAGIC, NONCE, rank, size, proof) + data
    with (
        peer_that_says(data) as connection,
        socket.create_server(("127.0.0.1", 0)) as listener,
        lobby.Lobby(place, listener, wire.Deadline(TIMEOUT)) as waiting,
    ):
        waiting._guests[connection] = NONCE, wire.Deadline(TIMEOUT)
        waiting._selector.register(connection, 1)
        waiting.gather_peers()


def file_follower(data: bytes) -> None:
    """A rank that meets rank 0 through files, of which some have any content."""
    _meet(data, rank=1)


def file_leader(data: bytes) -> None:
    """Rank 0, which meets the others through files, of which some have any content."""
    _meet(data, rank=0)


def _meet(data: bytes, rank: int) -> None:
    """Split the data at zero bytes into names and contents of files."""
    folder = Path(tempfile.mkdtemp(prefix="mscclpp_ep_fuzz_"))
    inside = folder / "inside"
    inside.mkdir()
    names = ("roster", "hello-0", "hello-1", "ack-1", f"{NONCE_HEX}-0-0", f"{NONCE_HEX}-bye-0")
    try:
        for piece in data.split(b"\0")[:8]:
            name = names[piece[0] % len(names)] if piece else "roster"
            (inside / f"group.mscclpp_ep-{name}").write_bytes(piece[1:])
        with mock.patch.object(files.secrets, "token_hex", lambda count: NONCE_HEX):
            channel = files.FileChannel(inside, rank, 2, TIMEOUT)
            channel.all_gather(b"part")
            channel.close()
    finally:
        beside = [entry.name for entry in folder.iterdir()]
        shutil.rmtree(folder)
        assert beside == ["inside"]


def token_text(data: bytes) -> None:
    """A text that the demo is given."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data[1:])
        file.flush()
        count = data[0] if data else None
        with contextlib.suppress(InputError):
            tokens = text.read_tokens(Path(file.name), count or None)
            assert len(tokens) == (count or len(tokens)) <= text.MOST_TOKENS


def machine_files(data: bytes) -> None:
    """What Linux tells of memory and control groups."""
    contents = data.split(b"\0")
    with tempfile.TemporaryDirectory(prefix="mscclpp_ep_fuzz_") as name:
        root = Path(name)
        group = root / "sys/fs/cgroup/a"
        group.mkdir(parents=True)
        own = root / "proc/self"
        own.mkdir(parents=True)
        paths = (
            root / "proc/meminfo",
            own / "cgroup",
            group / "memory.max",
            group / "memory.current",
        )
        for path, content in zip(paths, contents, strict=False):
            path.write_bytes(content)
        machine.memory_available(root)
        machine.memory_total(root)
        machine.cgroup_memory_limit(root)
        machine.cgroup_processes_left(root)
        machine.cgroup_cores(root)


def environment(data: bytes) -> None:
    """The variables of a launcher."""
    names = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "MSCCLPP_EP_PORT",
        "MSCCLPP_EP_TOKEN",
        "LOCAL_WORLD_SIZE",
        "SLURM_JOB_ID",
        "RANK",
    )
    pieces = [piece[:200] for piece in data.split(b"\0")]
    given = {name: os.fsdecode(piece) for name, piece in zip(names, pieces, strict=False) if piece}
    with mock.patch.dict(os.environ, given, clear=True):
        rank = rendezvous.env_int("RANK", 0, None) if "RANK" in given else 0
        place = rendezvous.place_from_env(rank, SIZE)
        assert all(1 <= port <= 65535 for port in place.ports)
        # A name is not looked up: that takes as long as the network wants.
        with mock.patch.object(socket, "getaddrinfo", _encode_host):
            rendezvous._bind_address(place)


def _encode_host(host: str, *_: object, **__: object) -> list[object]:
    host.encode("idna")
    msg = "nobody is asked"
    raise OSError(msg)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        spoke,
        hub,
        knock,
        guest,
        file_follower,
        file_leader,
        token_text,
        machine_files,
        environment,
    )
}


def fuzz_one(name: str, data: bytes) -> None:
    """Give bytes to a target. What it raises, other than the library's errors, passes."""
    with contextlib.suppress(Error):
        TARGETS[name](data)
