# SPDX-License-Identifier: MIT
"""Rank processes end together, whatever ends them, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.cli import PROGRAM, SMALL, run

pytestmark = pytest.mark.multirank


def ranks_of(parent):
    """The rank processes that a program has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
            if int(fields[1]) == parent and b"spawn_main" in command:
                found.append(int(entry.name))
    return sorted(found)


def alive(processes):
    def state(process):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return "gone"

    return [process for process in processes if state(process) not in {"gone", "Z"}]


@pytest.fixture
def endless(tmp_path):
    """A demo that would run for long, with its rank processes."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = subprocess.Popen(
        [*PROGRAM, "demo", "--ranks=3", *SMALL[:-1], "--repeats=1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while len(ranks_of(program.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    processes = ranks_of(program.pid)
    assert len(processes) == 3, program.communicate()
    yield program, processes, temporary
    program.kill()
    program.communicate()


def ended(program, processes):
    """Standard error of a program that must end at once, and its ranks with it."""
    output, errors = program.communicate(timeout=20)
    assert not output
    deadline = time.monotonic() + 5
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(processes)
    return errors


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_an_interrupted_demo_leaves_nothing(endless, number, status):
    program, processes, temporary = endless
    os.killpg(program.pid, number) if number == signal.SIGINT else program.send_signal(number)
    errors = ended(program, processes)
    assert program.returncode == status
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert "interrupted; all ranks were ended" in errors
    assert not list(temporary.iterdir())


def test_a_killed_rank_ends_the_demo(endless):
    program, processes, temporary = endless
    os.kill(processes[1], signal.SIGKILL)
    errors = ended(program, processes)
    assert program.returncode == 1
    assert "was killed by SIGKILL; all ranks were ended" in errors
    assert not list(temporary.iterdir())


def test_ranks_do_not_outlive_a_killed_demo(endless):
    program, processes, _ = endless
    program.kill()
    ended(program, processes)


RANKS = """
import os, sys, time
from mscclpp_ep.cli.launch import RankError, run_ranks

def returns(rank, argument):
    rank.report("step")
    return rank.index, rank.size, argument

def raises(rank, argument):
    group = rank.join()
    if rank.index == 1:
        raise ValueError("of rank 1")
    group.barrier()

def exits(rank, argument):
    if rank.index == 2:
        os._exit(3)
    time.sleep(1000)

def hangs(rank, argument):
    if rank.index == 1:
        time.sleep(1000)

if __name__ == "__main__":
    steps = []
    try:
        print(run_ranks(globals()[sys.argv[1]], "x", 3, timeout=float(sys.argv[2]),
                        on_step=lambda rank, step: steps.append((rank, step))))
        print(sorted(steps))
    except RankError as error:
        print(error)
        print(error.details)
"""


@pytest.mark.parametrize(
    ("function", "timeout", "lines"),
    [
        (
            "returns",
            60,
            [
                "[(0, 3, 'x'), (1, 3, 'x'), (2, 3, 'x')]",
                "[(0, 'step'), (1, 'step'), (2, 'step')]",
            ],
        ),
        ("raises", 60, ["rank 1 failed: ValueError: of rank 1; all ranks were ended", "Traceback"]),
        ("exits", 60, ["rank 2 ended early, with exit status 3; all ranks were ended"]),
        ("hangs", 3, ["has not finished in time; all ranks were ended"]),
    ],
)
def test_ranks_end_together(tmp_path, function, timeout, lines):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    start = time.monotonic()
    done = run(function, timeout, program=(sys.executable, str(script)))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 20
    for got, expected in zip(done.stdout.splitlines(), lines, strict=False):
        assert expected in got
