# SPDX-License-Identifier: MIT
"""Ranks that meet through files, with what earlier runs left beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import pytest

from mscclpp_ep import Error, Group, InvalidArgument
from mscclpp_ep import SystemError as EpSystemError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
PATIENCE = 60


def on_threads(size: int, body: Callable[[int], T]) -> list[T]:
    """Return what the ranks return that run as threads."""
    with ThreadPoolExecutor(size) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(body, r) for r in range(size)]]


def outcome(call: Callable[[], object]) -> str:
    """Return the type and message of the error that a call raises."""
    try:
        call()
    except Error as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def spawn(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, out + err
    return out


FILES = """
import sys
from mscclpp_ep import Group
path, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for _ in range(3):
    with Group.from_file(path, rank, size, timeout=50) as group:
        for i in range(5):
            parts = group.all_gather(b"%d %d" % (i, rank) * rank)
            assert parts == [b"%d %d" % (i, other) * other for other in range(size)], parts
        group.barrier()
"""
CRASH = """
import os, sys
from mscclpp_ep import Group
path, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
group = Group.from_file(path, rank, size, timeout=50)
group.all_gather(b"stale")
group.all_gather(b"stale")
os._exit(3)
"""


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_meet_through_files(tmp_path: Path, size: int, inside: bool) -> None:
    path = tmp_path if inside else tmp_path / "meet"
    for process in [spawn(FILES, path, rank, size) for rank in range(size)]:
        output(process)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_crashed_run_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "meet"
    for process in [spawn(CRASH, path, rank, 4) for rank in range(4)]:
        output(process, 3)
    assert any(tmp_path.iterdir())
    for process in [spawn(FILES, path, rank, 3) for rank in range(3)]:
        output(process)
    assert list(tmp_path.iterdir()) == []


def test_hellos_of_a_run_that_never_met_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "meet"
    stale = [spawn(FILES, path, rank, 3) for rank in (0, 1)]
    until(lambda: sum("hello" in entry.name for entry in tmp_path.iterdir()) == len(stale))
    for process in stale:
        process.kill()
        process.communicate()
    leader = spawn(FILES, path, 0, 3)
    third = spawn(FILES, path, 2, 3)
    # Rank 0 finds three hellos, of which one is stale, and publishes a roster nobody completes.
    until(lambda: any(entry.name.endswith("ack-2") for entry in tmp_path.iterdir()))
    for process in (leader, third, spawn(FILES, path, 1, 3)):
        output(process)
    assert list(tmp_path.iterdir()) == []


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_garbage_files_do_no_harm(tmp_path: Path) -> None:
    for name in ("hello-0", "hello-1", "ack-1", "roster", "hello-7", f"tmp-{'0' * 32}"):
        (tmp_path / f"meet.mscclpp_ep-{name}").write_bytes(b"\xff{[")
    groups = on_threads(2, lambda rank: Group.from_file(tmp_path / "meet", rank, 2, PATIENCE))
    on_threads(2, lambda rank: groups[rank].close())
    assert list(tmp_path.iterdir()) == []


def test_two_groups_at_one_path(tmp_path: Path) -> None:
    def body(rank: int) -> list[bytes]:
        with Group.from_file(tmp_path, rank, 3, PATIENCE) as first:
            first.all_gather(b"first")
            with Group.from_file(tmp_path, rank, 3, PATIENCE) as second:
                parts = second.all_gather(b"second")
            return parts + first.all_gather(b"third")

    assert on_threads(3, body) == [[b"second"] * 3 + [b"third"] * 3] * 3
    assert list(tmp_path.iterdir()) == []


def test_absence_at_the_files_is_named(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(outcome, lambda: Group.from_file(tmp_path, 2, 3, timeout=5))
        until(lambda: any(entry.name.endswith("hello-2") for entry in tmp_path.iterdir()))
        said = outcome(lambda: Group.from_file(tmp_path, 0, 3, timeout=0.3))
        assert said == "Timeout: rank 1 did not come to the rendezvous in 0.3 s"
        # Rank 0 has left by now.
        assert late.result(PATIENCE) == "Timeout: ranks 0, 1 did not come to the rendezvous in 5 s"
    assert list(tmp_path.iterdir()) == []


def test_absence_from_a_gather_through_files_is_named(tmp_path: Path) -> None:
    groups = on_threads(3, lambda rank: Group.from_file(tmp_path, rank, 3, timeout=2))
    said = on_threads(3, lambda rank: outcome(groups[rank].barrier) if rank != 1 else "")
    assert said[0] == said[2] == "Timeout: rank 1 did not come to gather 1 in 2 s"
    assert outcome(groups[0].barrier) == said[0]
    on_threads(3, lambda rank: groups[rank].close())
    assert list(tmp_path.iterdir()) == []


def test_rank_that_closed_its_files_is_named(tmp_path: Path) -> None:
    groups = on_threads(3, lambda rank: Group.from_file(tmp_path, rank, 3, timeout=PATIENCE))

    def body(rank: int) -> str:
        return outcome(groups[rank].close if rank == 2 else groups[rank].barrier)

    assert on_threads(3, body) == ["PeerFailure: rank 2 closed its group"] * 2 + ["no error"]
    on_threads(2, lambda rank: groups[rank].close())
    assert list(tmp_path.iterdir()) == []


def test_second_process_of_a_rank_is_noticed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(outcome, lambda: Group.from_file(tmp_path, 0, 2, PATIENCE))
        until(lambda: any(entry.name.endswith("hello-0") for entry in tmp_path.iterdir()))
        groups = on_threads(2, lambda rank: Group.from_file(tmp_path, rank, 2, PATIENCE))
        assert first.result(PATIENCE).startswith("InvalidArgument: rank 0 was taken by another")
    on_threads(2, lambda rank: groups[rank].close())
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_wait_for_files(tmp_path: Path) -> None:
    process = spawn(FILES, tmp_path, 1, 2)
    until(lambda: any(entry.name.endswith("hello-1") for entry in tmp_path.iterdir()))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE / 2)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.iterdir()) == []


def test_path_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^path is .*whose folder does not exist"):
        Group.from_file(tmp_path / "no" / "such", 0, 1)
    (tmp_path / ("y" * 240)).touch()
    with pytest.raises(EpSystemError, match=r"^no access to .*File name too long"):
        Group.from_file(tmp_path / ("y" * 240), 0, 1)


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (0, 0), ("0", 2), (0, 2.0)])
def test_rank_and_size_are_checked(tmp_path: Path, rank: int, size: int) -> None:
    with pytest.raises(InvalidArgument, match=r"^(rank|size) is .*allowed is"):
        Group.from_file(tmp_path, rank, size)


def test_close_after_the_folder_has_gone(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    group = Group.from_file(folder, 0, 1)
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()
    with pytest.raises(EpSystemError):
        group.barrier()
    group.close()
    assert not os.path.lexists(folder)
