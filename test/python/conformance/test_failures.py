# SPDX-License-Identifier: MIT
"""Ranks that die, stop, are interrupted or never come; and what they leave behind: nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness import steps
from harness.programs import failures, torrent

TIMEOUT = 20.0
SHORT = 1.0


def leftovers(pool) -> set[Path]:
    """What a run may leave in shared memory, and in the temporary folder of its processes."""
    return {*Path("/dev/shm").glob("*mscclpp*"), *pool.scratch.iterdir()}


def processes_of(sessions: list[int]) -> list[str]:
    """Command lines of the processes that belong to one of the sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_text()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[3]) in sessions:
            found.append(command)
    return found


def expect_death_of(victim: int, outcomes) -> None:
    kinds = [o.failure and o.failure.kind for o in outcomes]
    assert kinds[victim] == "Died"
    assert "-9" in outcomes[victim].failure.message
    others = [o.failure for rank, o in enumerate(outcomes) if rank != victim]
    assert others == [None] * len(others), "\n".join(str(failure) for failure in others)


def expect_named(rank: int, outcomes) -> None:
    """The rank that was lost is named by whoever noticed first; every message names a rank."""
    messages = [o.value for o in outcomes if o.value]
    assert any(steps.names_rank(message, rank) for message in messages), messages
    assert all("rank" in message for message in messages), messages


def expect_nothing_left(pool, before: set[Path]) -> None:
    assert leftovers(pool) <= before
    sessions = pool.pids()
    pool.kill()
    assert processes_of(sessions) == []


@pytest.mark.parametrize("size", [2, 4])
def test_killed_while_waiting(doomed, size, seed):
    pool, victim = doomed(size), size - 1
    before = leftovers(pool)
    run = pool.start(failures.killed_while_waiting, victim, TIMEOUT, seed)
    pool.host_of(victim).process.wait(timeout=60)
    run.send(0)
    outcomes = run.result()
    expect_death_of(victim, outcomes)
    expect_named(victim, outcomes)
    expect_nothing_left(pool, before)


@pytest.mark.parametrize("size", [2, 3])
def test_killed_at_work(doomed, size, seed):
    pool, victim = doomed(size), seed % size
    before = leftovers(pool)
    run = pool.start(failures.killed_at_work, victim, 2 + seed % 7, TIMEOUT, seed)
    run.report(victim)
    os.kill(pool.pids()[victim], signal.SIGKILL)
    outcomes = run.result()
    expect_death_of(victim, outcomes)
    expect_named(victim, outcomes)
    expect_nothing_left(pool, before)


@pytest.mark.gpu_only
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dispatches", [False, True], ids=["checked", "dispatching"])
def test_killed_in_its_kernel(doomed, size, dispatches, seed):
    pool, victim = doomed(size), size - 1
    before = leftovers(pool)
    run = pool.start(
        torrent.killed_in_kernel, victim, dispatches, TIMEOUT if dispatches else 3.0, seed
    )
    outcomes = run.result()
    expect_death_of(victim, outcomes)
    expect_named(victim, outcomes)
    expect_nothing_left(pool, before)


@pytest.mark.parametrize("size", [2, 3])
def test_stopped_beyond_the_timeout_then_continued(doomed, size, seed):
    pool, victim = doomed(size), size - 1
    run = pool.start(failures.stopped, victim, SHORT, seed)
    run.report(victim)
    os.kill(pool.pids()[victim], signal.SIGSTOP)
    for rank in range(size):
        run.send(rank)
    run.await_finished(set(range(size)) - {victim})
    os.kill(pool.pids()[victim], signal.SIGCONT)
    outcomes = run.result()
    assert [str(o.failure) for o in outcomes] == ["None"] * size
    expect_named(victim, outcomes)


@pytest.mark.ranks(2, 3)
def test_rank_that_never_comes(ranks, seed):
    run = ranks.start(failures.absent, SHORT, seed)
    for rank in range(1, ranks.size):
        run.report(rank)
    run.send(0)
    outcomes = run.result()
    assert [str(o.failure) for o in outcomes] == ["None"] * ranks.size
    assert "Timeout" in [o.value for o in outcomes[1:]]


@pytest.mark.ranks(2, 3)
def test_rank_that_destroys_its_buffer_alone(ranks, seed):
    ranks.check(failures.destroyed_alone, SHORT, seed)


@pytest.mark.ranks(2, 3, 8)
@pytest.mark.parametrize("drops", [False, True], ids=["raises", "drops"])
def test_rank_that_leaves_behind_a_combine(ranks, drops, seed):
    ranks.check(failures.left_behind_a_combine, drops, seed)


@pytest.mark.gpu_only
@pytest.mark.ranks(1, 2)
def test_buffer_dropped_behind_long_work(ranks, seed):
    ranks.check(failures.dropped_behind_long_work, seed)


@pytest.mark.ranks(2, 3, modes=("process",))
def test_interrupt(ranks, seed):
    victim = ranks.size - 1
    run = ranks.start(failures.interrupted, victim, TIMEOUT, seed)
    run.await_finished([victim])
    for rank in range(victim):
        run.send(rank)
    outcomes = run.result()
    assert [str(o.failure) for o in outcomes] == ["None"] * ranks.size
    expect_named(victim, outcomes)


@pytest.mark.cpu_only
@pytest.mark.ranks(1, 2, modes=("process",))
def test_forked_child_is_refused(ranks, seed):
    ranks.check(failures.forked, seed)


@pytest.mark.cpu_only
@pytest.mark.ranks(1, 3)
def test_size_is_a_hint(ranks, seed):
    ranks.check(failures.starts_small, seed)
