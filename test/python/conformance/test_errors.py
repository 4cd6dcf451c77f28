# SPDX-License-Identifier: MIT
"""Bad input is refused with its name, what was given and what is allowed; and all ranks go on."""

from __future__ import annotations

import pytest

from harness.programs import errors

few = pytest.mark.ranks(1, 3)
several = pytest.mark.ranks(2, 3, 8)


def named(name: str):
    return pytest.param(name, marks=[pytest.mark.cpu_only] * (name in errors.CPU_MISTAKES))


@few
@pytest.mark.parametrize("name", [named(name) for name in errors.MISTAKES])
def test_mistake(ranks, name, seed):
    ranks.check(errors.refused, name, seed)


@pytest.mark.parametrize("names", errors.MISTAKES_OF_ALL)
def test_every_rank_makes_a_mistake(ranks, names, seed):
    ranks.check(errors.refused_by_all, names, seed)


@several
def test_ranks_take_turns_at_mistakes(ranks, seed):
    ranks.check(errors.refused_over_and_over, seed)


@pytest.mark.gpu_only
def test_mistakes_are_noticed_later(ranks, seed):
    ranks.check(errors.noticed_later, seed)


@few
@pytest.mark.parametrize("destroyed", [False, True], ids=["alive", "destroyed"])
@pytest.mark.parametrize("call", ["cached", "combine"])
def test_handle_of_another_buffer(ranks, destroyed, call, seed):
    ranks.check(errors.foreign_handle, destroyed, call, seed)


@several
@pytest.mark.parametrize("what", list(errors.DISAGREEMENTS))
def test_ranks_disagree(ranks, what, seed):
    ranks.check(errors.disagree, what, seed)


@several
@pytest.mark.parametrize("what", ["dtype", "handle", "weights"])
def test_ranks_disagree_in_combine(ranks, what, seed):
    ranks.check(errors.combines_differ, what, seed)
