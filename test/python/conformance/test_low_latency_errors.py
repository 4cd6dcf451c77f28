# SPDX-License-Identifier: MIT
"""Bad low-latency calls are refused with what is wrong and who did it; and all ranks go on."""

from __future__ import annotations

import pytest

from harness.programs import low_latency_errors as errors

pytestmark = pytest.mark.cpu_only

few = pytest.mark.ranks(1, 3)
several = pytest.mark.ranks(2, 3, 8)


@few
@pytest.mark.parametrize("name", list(errors.MISTAKES))
def test_mistake(ranks, name, seed):
    ranks.check(errors.refused, name, seed % 2 == 1, seed)


def test_every_rank_makes_a_mistake(ranks, seed):
    ranks.check(errors.refused_by_all, seed)


@several
def test_ranks_take_turns_at_mistakes(ranks, seed):
    ranks.check(errors.refused_over_and_over, seed)


def test_one_rank_makes_mistakes_again_and_again(ranks, seed):
    ranks.check(errors.refuses_alone_many_times, seed)


@few
@pytest.mark.parametrize("what", ["alive", "destroyed", "other-mode"])
def test_handle_of_another(ranks, what, seed):
    ranks.check(errors.foreign_handle, what, seed)


@several
@pytest.mark.parametrize("what", list(errors.DISAGREEMENTS))
def test_ranks_disagree(ranks, what, seed):
    ranks.check(errors.disagree, what, seed)


@several
@pytest.mark.parametrize("what", ["operation", "dtype", "handle", "exact"])
def test_ranks_disagree_in_combine(ranks, what, seed):
    ranks.check(errors.combines_differ, what, seed)


@few
def test_clean_takes_integers(ranks, seed):
    ranks.check(errors.clean_checks_its_arguments, seed)


@few
def test_no_room(ranks, seed):
    ranks.check(errors.no_room, seed)


@pytest.mark.ranks(2, 3)
def test_ranks_that_call_different_modes(ranks, seed):
    ranks.check(errors.modes_differ, seed)
