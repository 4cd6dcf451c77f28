# SPDX-License-Identifier: MIT
"""`integrity_check`: rows are checked on arrival, and results stay what they are."""

from __future__ import annotations

import pytest

from harness.cases import Case, Scales
from harness.programs import integrity

pytestmark = pytest.mark.cpu_only

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


LOW_LATENCY = {
    "plain": {"use_fp8": False},
    "weights": {"use_fp8": False, "with_weights": True},
    "float8": {"use_fp8": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


@pytest.mark.many_cases
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("options", LOW_LATENCY.values(), ids=LOW_LATENCY)
def test_low_latency(ranks, options, exact, seed):
    ranks.check(integrity.low_latency, options, exact, seed)


@pytest.mark.ranks(2, 3)
def test_ranks_agree(ranks):
    ranks.check(integrity.ranks_agree)
