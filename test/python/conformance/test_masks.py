# SPDX-License-Identifier: MIT
"""Ranks that are masked, by hand or because they died or came too late; the others go on."""

from __future__ import annotations

import os
import signal

import pytest

from conformance.test_failures import (
    TIMEOUT,
    expect_death_of,
    expect_nothing_left,
    leftovers,
)
from conformance.test_low_latency_failures import expect_all_well
from harness.programs import masked_graphs, masks

STOPPED_FOR = 2.0
REPLAY_TIMEOUT = 4.0


@pytest.mark.parametrize("name", masks.CASES)
@pytest.mark.ranks(2, 3)
def test_masked_by_hand(ranks, name, seed):
    ranks.check(masks.masked_by_hand, name, seed)


@pytest.mark.parametrize("name", ["scales", "arena"])
@pytest.mark.ranks(2, 3)
def test_masked_by_hand_with_integrity(ranks, name, seed):
    ranks.check(masks.masked_by_hand, name, seed, True)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", masks.LOW_LATENCY_CASES)
@pytest.mark.ranks(2, 3)
def test_masked_by_hand_in_low_latency(ranks, name, seed):
    ranks.check(masks.masked_by_hand_in_low_latency, name, seed)


@pytest.mark.ranks(3)
def test_masked_for_long(ranks, seed):
    ranks.check(masks.masked_for_long, seed)


@pytest.mark.ranks(3)
def test_memory_shared_while_masked(ranks, seed):
    ranks.check(masks.grown_apart, seed)


@pytest.mark.cpu_only
@pytest.mark.ranks(2, 3)
def test_operations_out_when_unmasked(ranks, seed):
    ranks.check(masks.masked_with_operations_out, seed)


@pytest.mark.ranks(2, 3)
def test_one_side_masks(ranks, seed):
    ranks.check(masks.one_side_masks, seed)


@pytest.mark.ranks(3)
def test_refusals_with_a_masked_rank(ranks, seed):
    ranks.check(masks.refusals, seed)


@pytest.mark.ranks(1, 3)
def test_mistakes(ranks, seed):
    ranks.check(masks.mistakes, seed)


@pytest.mark.ranks(2, 3)
def test_ranks_disagree_whether_to_mask(ranks):
    ranks.check(masks.disagree)


@pytest.mark.parametrize("size", [2, 3])
def test_killed(doomed, size, seed):
    pool, victim = doomed(size), seed % size
    before = leftovers(pool)
    outcomes = pool.run(masks.killed, victim, TIMEOUT, seed)
    expect_death_of(victim, outcomes)
    expect_nothing_left(pool, before)


@pytest.mark.cpu_only
def test_killed_with_hooks_out(doomed, seed):
    pool, victim = doomed(3), seed % 3
    run = pool.start(masks.killed_with_hooks_out, victim, TIMEOUT, seed)
    for rank in range(3):
        run.report(rank)
    os.kill(pool.pids()[victim], signal.SIGKILL)
    pool.host_of(victim).process.wait(timeout=60)
    run.send_all()
    expect_death_of(victim, run.result())


def test_killed_in_large_operations(doomed, seed):
    kill_at_work(doomed(3), masks.killed_in_operations, TIMEOUT, seed)


@pytest.mark.gpu_only
def test_killed_in_large_replays(doomed, seed):
    kill_at_work(doomed(3), masked_graphs.killed_in_replays, REPLAY_TIMEOUT, seed)


def kill_at_work(pool, program, timeout: float, seed: int) -> None:
    """Ends a rank when it says that it is at work; the others agree on when they end."""
    victim = seed % 3
    run = pool.start(program, victim, timeout, seed)
    run.report(victim)
    os.kill(pool.pids()[victim], signal.SIGKILL)
    survivors = [rank for rank in range(3) if rank != victim]
    last = max(run.report(rank) for rank in survivors)
    for rank in survivors:
        run.send(rank, last)
    expect_death_of(victim, run.result())


def test_stopped_beyond_the_timeout_then_continued(doomed, seed):
    pool, victim = doomed(3), seed % 3
    run = pool.start(masks.stopped, victim, STOPPED_FOR, seed)
    for rank in range(3):
        run.report(rank)
    run.send_all()
    for rank in set(range(3)) - {victim}:
        run.report(rank)
    os.kill(pool.pids()[victim], signal.SIGCONT)
    run.report(victim)
    run.send_all()
    expect_all_well(run.result())


def test_stopped_in_large_operations(doomed, seed):
    pool, victim = doomed(2), seed % 2
    run = pool.start(masks.stopped_in_operations, victim, STOPPED_FOR, seed)
    run.report(victim)
    os.kill(pool.pids()[victim], signal.SIGSTOP)
    run.report(1 - victim)
    os.kill(pool.pids()[victim], signal.SIGCONT)
    run.report(victim)
    run.send_all()
    expect_all_well(run.result())


@pytest.mark.gpu_only
@pytest.mark.ranks(2, 3, modes=("process",))
def test_graph_with_a_masked_rank(ranks, seed):
    ranks.check(masked_graphs.masked_replays, seed)


@pytest.mark.gpu_only
@pytest.mark.ranks(2, 3, modes=("process",))
def test_late_for_a_replay(ranks, seed):
    ranks.check(masked_graphs.late_for_a_replay, REPLAY_TIMEOUT, seed)


@pytest.mark.gpu_only
def test_killed_between_replays(doomed, seed):
    victim = seed % 3
    expect_death_of(
        victim, doomed(3).run(masked_graphs.killed_between_replays, victim, REPLAY_TIMEOUT, seed)
    )


@pytest.mark.gpu_only
def test_killed_before_calls(doomed, seed):
    victim = seed % 3
    expect_death_of(
        victim, doomed(3).run(masked_graphs.killed_before_calls, victim, REPLAY_TIMEOUT, seed)
    )


@pytest.mark.ranks(4)
def test_short_soak_without_deaths(ranks, seed):
    assert ranks.check(masks.soak, 200, {}, seed) == [200] * 4


def soak(pool, operations: int, seed: int, timeout: float) -> None:
    """Two of four ranks die on the way."""
    first = seed % 4
    deaths = {first: operations // 3, (first + 1 + seed // 4 % 3) % 4: operations * 2 // 3}
    outcomes = pool.run(masks.soak, operations, deaths, seed, timeout=timeout)
    for rank, outcome in enumerate(outcomes):
        if rank in deaths:
            assert outcome.failure is not None
            assert outcome.failure.kind == "Died", str(outcome.failure)
        else:
            assert outcome.failure is None, str(outcome.failure)
            assert outcome.value == operations


def test_short_soak(doomed, seed):
    soak(doomed(4), 200, seed, 80)


@pytest.mark.slow
@pytest.mark.parametrize("operations", [1000, pytest.param(5000, marks=pytest.mark.grid)])
def test_soak(doomed, operations, seed):
    soak(doomed(4), operations, seed, 500)
