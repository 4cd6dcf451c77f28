# SPDX-License-Identifier: MIT
"""Ranks as processes that meet by host and port, with strangers at the door."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from mscclpp_ep import _rendezvous as rendezvous
from mscclpp_ep import _rendezvous_wire as wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 60
GATHER = """
import json, os
from mscclpp_ep import Group
with Group.from_env(timeout=50) as group:
    parts = group.all_gather(bytes([group.rank]) * (3 * group.rank))
    group.barrier()
print(json.dumps([group.rank, group.size, [part.hex() for part in parts]]))
"""
REPORT = """
import os, sys
from mscclpp_ep import Error, Group
def main():
    {body}
try:
    main()
except Error as error:
    print(type(error).__name__, error)
"""


class Starter(Protocol):
    def __call__(self, script: str, **variables: object) -> subprocess.Popen[str]: ...


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start a rank; what still runs at the end of the test is killed."""
    started = []
    foreign = ("MASTER_", "MSCCLPP_", "TORCHELASTIC_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_")

    def launch(script: str, **variables: object) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        environment |= {key: str(value) for key, value in variables.items()}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.returncode is None:
            process.kill()
            process.communicate()


@pytest.fixture
def place() -> dict[str, object]:
    """The variables of a fresh meeting place for three ranks."""
    return {"MASTER_ADDR": "127.0.0.1", "MSCCLPP_EP_PORT": free_port(), "WORLD_SIZE": 3}


def free_port() -> int:
    """Return a port that no outgoing connection will get, for it is below their range."""
    while True:
        with suppress(OSError):
            port = 20000 + secrets.randbelow(12000)
            socket.create_server(("127.0.0.1", port)).close()
            return port


def output(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, out + err
    return out


def knock(place: dict[str, object]) -> socket.socket:
    """Connect to rank 0 as soon as it listens."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            port = int(str(place["MSCCLPP_EP_PORT"]))
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.005)


def assert_gathered(processes: list[subprocess.Popen[str]]) -> None:
    expected = [(bytes([rank]) * (3 * rank)).hex() for rank in range(len(processes))]
    for rank, process in enumerate(processes):
        assert json.loads(output(process)) == [rank, len(processes), expected]


def report(body: str) -> str:
    return REPORT.format(body=body.strip().replace("\n", "\n    "))


def test_master_port_belongs_to_the_launcher(start: Starter) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as launcher:
        common = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": launcher.getsockname()[1],
            "WORLD_SIZE": 4,
        }
        assert_gathered([start(GATHER, RANK=rank, **common) for rank in range(4)])
        launcher.setblocking(False)
        with pytest.raises(BlockingIOError):
            launcher.accept()


def test_jobs_on_neighbouring_ports(start: Starter) -> None:
    port = free_port()
    jobs = []
    for job in range(3):
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port + job, "WORLD_SIZE": 2}
        jobs.append([start(GATHER, RANK=rank, **common) for rank in (1, 0)][::-1])
    for ranks in jobs:
        assert_gathered(ranks)


def test_many_groups_one_after_the_other(start: Starter, place: dict[str, object]) -> None:
    script = """
from mscclpp_ep import Group
groups = []
for i in range(12):
    groups.append(Group.from_env(timeout=50))
    if i % 3 == 2:
        groups.pop(0).close()
    for j, group in enumerate(groups):
        parts = group.all_gather(b"%d %d %d" % (i, j, group.rank))
        assert parts == [b"%d %d %d" % (i, j, rank) for rank in range(3)], parts
"""
    for process in [start(script, RANK=rank, **place) for rank in range(3)]:
        output(process)


def test_large_parts(start: Starter, place: dict[str, object]) -> None:
    script = """
from mscclpp_ep import Group
with Group.from_env(timeout=50) as group:
    parts = group.all_gather(bytes([group.rank]) * (5_000_000 * group.rank))
    assert parts == [bytes([rank]) * (5_000_000 * rank) for rank in range(3)]
    group.barrier()
"""
    for process in [start(script, RANK=rank, **place) for rank in range(3)]:
        output(process)


def stay_silent(stranger: socket.socket) -> None:
    stranger.settimeout(PATIENCE)
    assert stranger.recv(8) == wire.MAGIC


def send_garbage(stranger: socket.socket) -> None:
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)


def send_huge_length(stranger: socket.socket) -> None:
    stranger.sendall(wire.FRAME.pack(wire.DATA, 1, 1 << 62) + b"x" * 200)


def send_wrong_proof(stranger: socket.socket) -> None:
    stranger.sendall(wire.HELLO.pack(wire.MAGIC, b"n" * 32, 1, 3, b"p" * 32))
    challenge = stranger.recv(wire.CHALLENGE.size)
    assert challenge.startswith(wire.MAGIC)
    assert stranger.recv(1) == b""


def hang_up(stranger: socket.socket) -> None:
    stranger.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "act", [stay_silent, send_garbage, send_huge_length, send_wrong_proof, hang_up]
)
def test_strangers_disturb_nobody(
    start: Starter, place: dict[str, object], act: Callable[[socket.socket], None]
) -> None:
    ranks = [start(GATHER, RANK=0, **place)]
    strangers = [knock(place) for _ in range(5)]
    try:
        for stranger in strangers:
            act(stranger)
        ranks += [start(GATHER, RANK=rank, **place) for rank in (1, 2)]
        assert_gathered(ranks)
    finally:
        for stranger in strangers:
            stranger.close()


def test_crowd_of_strangers(start: Starter, place: dict[str, object]) -> None:
    ranks = [start(GATHER, RANK=0, **place)]
    crowd = [knock(place) for _ in range(200)]
    try:
        ranks += [start(GATHER, RANK=rank, **place) for rank in (1, 2)]
        assert_gathered(ranks)
    finally:
        for stranger in crowd:
            stranger.close()


def test_rank_that_left_may_come_again(
    start: Starter, place: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    place["MSCCLPP_EP_TOKEN"] = "shared"
    rank0 = start(GATHER, RANK=0, **place)
    knock(place).close()
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    ours = rendezvous.place_from_env(1, 3)
    for _ in range(5):
        rendezvous._knock(ours, ours.ports[0], PATIENCE, wire.Deadline(PATIENCE)).close()
    assert_gathered([rank0, *(start(GATHER, RANK=rank, **place) for rank in (1, 2))])


def silent_server(guest: socket.socket) -> None:
    assert guest.recv(1) == b""


def web_server(guest: socket.socket) -> None:
    guest.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 10)


def lying_server(guest: socket.socket) -> None:
    guest.sendall(wire.CHALLENGE.pack(wire.MAGIC, b"n" * 32))
    hello = guest.recv(wire.HELLO.size, socket.MSG_WAITALL)
    if hello:
        guest.sendall(wire.VERDICT.pack(wire.JOINED, 0, b"p" * 32))
        guest.sendall(wire.FRAME.pack(wire.WELCOME, 0, 0))
        guest.recv(1)


@pytest.mark.parametrize("serve", [silent_server, web_server, lying_server])
def test_ranks_check_the_server(start: Starter, serve: Callable[[socket.socket], None]) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as impostor:
        port = impostor.getsockname()[1]
        served = []

        def run() -> None:
            with suppress(OSError):  # accept fails after shutdown
                while True:
                    guest = impostor.accept()[0]
                    served.append(guest)
                    with guest, suppress(OSError):
                        guest.settimeout(PATIENCE)
                        serve(guest)

        thread = threading.Thread(target=run)
        thread.start()
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port - 1, "WORLD_SIZE": 3}
        try:
            assert_gathered([start(GATHER, RANK=rank, **common) for rank in range(3)])
        finally:
            impostor.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
        assert served


def test_duplicate_rank_is_refused(start: Starter, place: dict[str, object]) -> None:
    rank0 = start(GATHER, RANK=0, **place)
    twins = [start(GATHER, RANK=1, **place) for _ in range(2)]
    end = time.monotonic() + PATIENCE
    while all(twin.poll() is None for twin in twins):
        assert time.monotonic() < end
        time.sleep(0.005)
    twins.sort(key=lambda twin: twin.poll() is None)
    _, err = twins[0].communicate(timeout=PATIENCE)
    assert "InvalidArgument: RANK is 1, and another process already is rank 1" in err
    assert_gathered([rank0, twins[1], start(GATHER, RANK=2, **place)])


def test_second_rank_0_is_refused(start: Starter, place: dict[str, object]) -> None:
    rank0 = start(GATHER, RANK=0, **place)
    knock(place).close()
    _, err = start(GATHER, RANK=0, **place).communicate(timeout=PATIENCE)
    assert "InvalidArgument: RANK is 0, and another process already is rank 0" in err
    assert_gathered([rank0, *(start(GATHER, RANK=rank, **place) for rank in (1, 2))])


def test_wrong_world_size_is_refused(start: Starter, place: dict[str, object]) -> None:
    place["MSCCLPP_EP_TOKEN"] = "shared"
    rank0 = start(GATHER, RANK=0, **place)
    offender = start(GATHER, RANK=1, **(place | {"WORLD_SIZE": 4}))
    _, err = offender.communicate(timeout=PATIENCE)
    assert "InvalidArgument: WORLD_SIZE is 4 here and 3 on rank 0" in err
    assert_gathered([rank0, *(start(GATHER, RANK=rank, **place) for rank in (1, 2))])


def test_wrong_token_is_refused(start: Starter, place: dict[str, object]) -> None:
    place["MSCCLPP_EP_TOKEN"] = "right"
    rank0 = start(GATHER, RANK=0, **place)
    knock(place).close()
    body = "Group.from_env(timeout=1)"
    said = output(start(report(body), RANK=1, **(place | {"MSCCLPP_EP_TOKEN": "wrong"})))
    assert said.startswith("Timeout rank 1: rank 0 is missing")
    assert "MSCCLPP_EP_TOKEN" in said
    assert_gathered([rank0, *(start(GATHER, RANK=rank, **place) for rank in (1, 2))])


DYING = """
group = Group.from_env(timeout=50)
group.barrier()
if group.rank == {victim}:
    os.kill(os.getpid(), 9)
try:
    group.barrier()
finally:
    try:
        group.barrier()
    except Error as again:
        print(type(again).__name__, end=" ")
"""


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_death_is_named(start: Starter, place: dict[str, object], victim: int) -> None:
    script = report(DYING.format(victim=victim))
    ranks = [start(script, RANK=rank, **place) for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        assert output(ranks[rank]).startswith(f"PeerFailure PeerFailure rank {victim} died")
    output(ranks[victim], -signal.SIGKILL)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_absence_from_a_gather_is_named(
    start: Starter, place: dict[str, object], absent: int
) -> None:
    body = f"""
group = Group.from_env(timeout=50)
group._channel._timeout = 2
if group.rank == {absent}:
    sys.stdin.read()
group.barrier()
"""
    ranks = [start(report(body), RANK=rank, **place) for rank in range(3)]
    for rank in {0, 1, 2} - {absent}:
        ranks[rank].wait(PATIENCE)
        said = output(ranks[rank])
        assert said.startswith(f"Timeout rank {absent} did not come to gather 1 within 2 s")
    assert output(ranks[absent]).startswith(f"Timeout rank {absent} did not come to gather 1")


def test_absence_from_the_rendezvous_is_named(start: Starter, place: dict[str, object]) -> None:
    body = "Group.from_env(timeout=float(os.environ['SECONDS']))"
    patient = start(report(body), RANK=1, SECONDS=50, **place)
    leader = start(report(body), RANK=0, SECONDS=2, **place)
    for process in (leader, patient):
        assert output(process).startswith("Timeout rank 2 of 3 did not come to rank 0 at 127.0.0.1")


def test_absence_of_rank_0_is_named(start: Starter, place: dict[str, object]) -> None:
    said = output(start(report("Group.from_env(timeout=0.5)"), RANK=1, **place))
    assert said.startswith("Timeout rank 1: rank 0 is missing")


def test_ctrl_c_ends_the_wait_for_ranks(start: Starter, place: dict[str, object]) -> None:
    leader = start(GATHER, RANK=0, **place)
    with knock(place) as stranger:
        stay_silent(stranger)
        leader.send_signal(signal.SIGINT)
        _, err = leader.communicate(timeout=PATIENCE / 2)
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_ends_the_wait_for_rank_0(start: Starter, place: dict[str, object]) -> None:
    with socket.create_server(("127.0.0.1", int(str(place["MSCCLPP_EP_PORT"])))) as server:
        server.settimeout(PATIENCE)
        rank = start(GATHER, RANK=1, **place)
        with server.accept()[0]:
            rank.send_signal(signal.SIGINT)
            _, err = rank.communicate(timeout=PATIENCE / 2)
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_ends_a_gather_and_is_told_to_the_others(
    start: Starter, place: dict[str, object]
) -> None:
    body = """
group = Group.from_env(timeout=50)
group.barrier()
print("here", flush=True)
if group.rank == 0:
    sys.stdin.readline()
group.barrier()
"""
    ranks = [start(report(body), RANK=rank, **place) for rank in range(3)]
    assert ranks[1].stdout is not None
    assert ranks[1].stdout.readline() == "here\n"
    ranks[1].send_signal(signal.SIGINT)
    _, err = ranks[1].communicate(timeout=PATIENCE / 2)
    assert err.rstrip().endswith("KeyboardInterrupt")
    out, _ = ranks[0].communicate("go\n", timeout=PATIENCE / 2)
    assert out.startswith("here\nPeerFailure rank 1 died or closed its group")
    assert output(ranks[2]).startswith("here\nPeerFailure rank 1 died or closed its group")


def test_one_rank_opens_no_socket(start: Starter) -> None:
    script = """
import sys
from mscclpp_ep import Group
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
with Group.from_env() as group:
    assert group.all_gather(b"x") == [b"x"]
    group.barrier()
assert "os.putenv" not in seen and not [event for event in seen if event.startswith("socket")], seen
"""
    output(start(script, RANK=0, WORLD_SIZE=1))


def test_listening_socket_is_on_loopback(start: Starter, place: dict[str, object]) -> None:
    start(GATHER, RANK=0, **place)
    knock(place).close()
    port = int(str(place["MSCCLPP_EP_PORT"]))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    loopback = struct.unpack("=I", socket.inet_aton("127.0.0.1"))[0]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert listening == [f"{loopback:08X}:{port:04X}"]


def test_busy_port_is_an_error(start: Starter, place: dict[str, object]) -> None:
    port = int(str(place["MSCCLPP_EP_PORT"]))
    with socket.create_server(("127.0.0.1", port)):
        said = output(start(report("Group.from_env(timeout=50)"), RANK=0, **place))
    assert said.startswith(f"SystemError rank 0 could not listen ({port}: ")
    assert "set MSCCLPP_EP_PORT" in said
