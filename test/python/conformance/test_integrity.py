# SPDX-License-Identifier: MIT
"""`integrity_check`: rows are checked on arrival, and results stay what they are."""

from __future__ import annotations

import pytest

from harness.cases import Case, Scales
from harness.programs import integrity, lifetime

CASES = [
    Case("plain"),
    Case("odd", hidden=7, experts=5, topk=3, tokens=(11, 0, 30), index="int32"),
    Case("long", hidden=7168, tokens=(60, 33), bias=2),
    Case("scales", dtype="float8_e4m3fn", hidden=128, scales=Scales("float32", 2, "columns")),
    Case("without-topk", with_topk=False),
    Case("no-tokens", tokens=(0,)),
    Case("worst-room", worst="room"),
    Case("worst-short", worst="short"),
    Case("arena", source="arena"),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", CASES, ids=str)
def test_high_throughput(ranks, case, seed):
    ranks.check(integrity.high_throughput, case, seed)


def test_indices_are_the_callers(ranks, seed):
    ranks.check(integrity.indices_are_the_callers, Case(), seed)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("results", [0, 3])
def test_an_arena_that_is_full(ranks, results, seed):
    ranks.check(lifetime.sixty_layers, results, seed, True)


@pytest.mark.ranks(1, 2, 3)
def test_an_arena_that_is_frozen(ranks, seed):
    ranks.check(lifetime.frozen, seed, True)


LOW_LATENCY = {
    "plain": {"use_fp8": False},
    "weights": {"use_fp8": False, "with_weights": True},
    "float8": {"use_fp8": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


@pytest.mark.cpu_only
@pytest.mark.many_cases
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("options", LOW_LATENCY.values(), ids=LOW_LATENCY)
def test_low_latency(ranks, options, exact, seed):
    ranks.check(integrity.low_latency, options, exact, seed)


@pytest.mark.ranks(2, 3)
def test_ranks_agree(ranks):
    ranks.check(integrity.ranks_agree)


@pytest.mark.gpu_only
@pytest.mark.ranks(2, 3, modes=("process",))  # Torch captures one graph at a time in a process
@pytest.mark.parametrize("operation", ["dispatch", "combine", "combine, ordinary input"])
def test_rows_that_change_on_the_way(ranks, operation, seed):
    messages = ranks.check(integrity.changed_on_the_way, operation, seed)
    assert any("integrity check failed for what rank 0 sent" in text for text in messages), messages


@pytest.mark.gpu_only
@pytest.mark.ranks(1, 2, modes=("process",))
def test_in_graphs(ranks, seed):
    ranks.check(integrity.replayed, Case(tokens=(20, 7)), seed)
