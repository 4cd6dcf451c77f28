# SPDX-License-Identifier: MIT
"""`combine`: the sum in float32, by ascending rank, biases first, rounded once."""

from __future__ import annotations

import pytest

from harness.cases import ROUTINGS, Case
from harness.programs import basics

DTYPES = ("bfloat16", "float16", "float32")

CASES = [
    *(Case(f"{d}-bias-{b}", combine_dtype=d, bias=b) for d in DTYPES for b in (0, 1, 2)),
    *(Case(f"{d}-arena", combine_dtype=d, source="arena") for d in DTYPES),
    *(Case(f"{d}-received", dtype=d, combine_dtype=d, source="received") for d in DTYPES),
    Case("arena-and-ordinary", source="mixed", bias=1, tokens=(40, 11, 0, 25)),
    *(Case(f"routing-{routing}", routing=routing, bias=1) for routing in ROUTINGS),
    *(Case(f"hidden-{h}", hidden=h, bias=1) for h in (1, 7, 8, 129)),
    *(Case(f"hidden-{h}-float32", hidden=h, combine_dtype="float32") for h in (1, 3, 129)),
    Case("hidden-7168", hidden=7168, tokens=(6, 3), bias=2),
    Case("no-tokens", tokens=(0,), bias=1),
    Case("some-without-tokens", tokens=(0, 7), bias=2),
    Case("no-token-goes-anywhere", routing="none", bias=2),
    Case("experts-3", experts=3, topk=2),
    Case("topk-22", experts=40, topk=22),
    Case("without-weights", weights=False),
    Case("without-topk", with_topk=False, bias=1),
    Case("rank-without-expert", extra_ranks=True),
    Case("fp8-dispatch", dtype="float8_e4m3fn", hidden=128, bias=1),
    Case("mapped", experts=13, shuffled_experts=True),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", CASES, ids=str)
def test_combine(ranks, case, seed):
    ranks.check(basics.check_combine, case, seed)


def test_copies_add_up(ranks, seed):
    ranks.check(basics.sum_of_copies, seed)


@pytest.mark.parametrize("source", ["ordinary", "arena", "mixed"])
def test_handle_serves_many_combines(ranks, source, seed):
    ranks.check(basics.combine_twice, Case(source=source, bias=1), seed)
