# SPDX-License-Identifier: MIT
"""Ranks that die, stop or stay away in low-latency operations."""

from __future__ import annotations

import os
import signal

import pytest

from conformance.test_failures import (
    SHORT,
    TIMEOUT,
    expect_death_of,
    expect_named,
    expect_nothing_left,
    leftovers,
)
from harness.programs import low_latency_failures as failures

pytestmark = pytest.mark.cpu_only


def expect_all_well(outcomes) -> None:
    assert [str(o.failure) for o in outcomes] == ["None"] * len(outcomes)


def test_killed_before_the_hook(doomed, seed):
    pool, victim = doomed(3), seed % 3
    before = leftovers(pool)
    outcomes = pool.start(failures.killed_before_the_hook, victim, TIMEOUT, seed).result()
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


def test_stopped_beyond_the_timeout_then_continued(doomed, seed):
    pool, victim = doomed(3), 2
    run = pool.start(failures.stopped, victim, SHORT, seed)
    run.report(victim)
    os.kill(pool.pids()[victim], signal.SIGSTOP)
    run.send_all()
    run.await_finished({0, 1})
    os.kill(pool.pids()[victim], signal.SIGCONT)
    outcomes = run.result()
    expect_all_well(outcomes)
    expect_named(victim, outcomes)


@pytest.mark.ranks(3)
def test_rank_that_never_receives(ranks, seed):
    run = ranks.start(failures.absent, SHORT, seed)
    for rank in range(1, ranks.size):
        run.report(rank)
    run.send(0)
    outcomes = run.result()
    expect_all_well(outcomes)
    assert "Timeout" in [o.value for o in outcomes[1:]]


@pytest.mark.ranks(2, 3)
def test_rank_that_destroys_its_buffer_alone(ranks, seed):
    ranks.check(failures.destroyed_alone, SHORT, seed)
