# SPDX-License-Identifier: MIT
"""Calls that are captured into CUDA graphs."""

from __future__ import annotations

import pytest

from harness.cases import Case
from harness.programs import graphs

# Torch captures one graph at a time in a process.
pytestmark = [pytest.mark.gpu_only, pytest.mark.ranks(1, 2, 3, 4, 8, modes=("process",))]

CASES = [
    Case("plain", tokens=(20, 7, 33, 5)),
    Case("no-tokens", tokens=(0, 12)),
    Case("int32", index="int32", hidden=130, topk=3, experts=9, tokens=(16, 25)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replays(ranks, case, seed):
    ranks.check(graphs.replays, case, seed, 10)


@pytest.mark.ranks(2, modes=("process",))
def test_a_thousand_replays(ranks, seed):
    ranks.check(graphs.replays, Case(tokens=(32, 17)), seed, 1000)


def test_cached_dispatch(ranks, seed):
    ranks.check(graphs.cached, Case(tokens=(20, 7, 33, 5)), seed)


@pytest.mark.ranks(1, 2, modes=("process",))
def test_graphs_and_buffers_come_and_go(ranks, seed):
    ranks.check(graphs.outlive, Case(tokens=(20, 7)), seed)


@pytest.mark.ranks(2, 3, modes=("process",))
def test_rank_that_leaves_behind_a_replay(ranks, seed):
    ranks.check(graphs.left_behind_a_replay, seed)


@pytest.mark.ranks(2, modes=("process",))
def test_without_room(ranks, seed):
    ranks.check(graphs.without_room, seed)
