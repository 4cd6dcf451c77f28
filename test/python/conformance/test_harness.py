# SPDX-License-Identifier: MIT
"""The pools themselves: a failure must be seen, and a hang must end with the stacks."""

from __future__ import annotations

import numpy as np
import pytest

from harness import steps
from harness.pool import RanksFailed
from harness.programs import selftest

both = pytest.mark.ranks(1, 3)


@both
def test_every_rank_answers(ranks):
    values = ranks.check(selftest.square, 7)
    assert values == [(rank, 49 + rank) for rank in range(ranks.size)]


@both
def test_failure_is_reported_and_the_pool_replaced(ranks):
    with pytest.raises(RanksFailed, match=r"rank 0 of .*: ValueError: no such thing"):
        ranks.check(selftest.refuse)
    test_every_rank_answers(ranks)


@both
def test_hang_ends_with_the_stacks_of_all_ranks(ranks):
    run = ranks.start(selftest.wait_for_mail_that_never_comes)
    for rank in range(ranks.size):
        run.report(rank)
    for outcome in run.result(timeout=0.2):
        assert outcome.failure.kind == "Hang"
        assert "in wait_for_mail_that_never_comes" in outcome.failure.trace
    test_every_rank_answers(ranks)


@pytest.mark.ranks(3, modes=("process",))
def test_death_is_reported(ranks):
    with pytest.raises(RanksFailed, match=r"rank 1 of .*: Died: process ended with 3"):
        ranks.check(selftest.exit_on_rank, 1)
    test_every_rank_answers(ranks)


@both
def test_ranks_talk_with_the_test(ranks):
    run = ranks.start(selftest.echo)
    run.send_all(5)
    assert [run.report(rank) for rank in range(ranks.size)] == [5 + r for r in range(ranks.size)]
    assert [o.failure for o in run.result()] == [None] * ranks.size


def test_comparison_sees_one_bit():
    expected = np.array([[0.0, 1.0]], np.float32)
    steps.same_bits(expected.copy(), expected, "x")
    with pytest.raises(AssertionError, match=r"first at \[0, 0\]"):
        steps.same_bits(np.array([[-0.0, 1.0]], np.float32), expected, "x")
    with pytest.raises(AssertionError, match="float64"):
        steps.same_bits(expected.astype(float), expected, "x")
