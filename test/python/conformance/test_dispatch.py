# SPDX-License-Identifier: MIT
"""`dispatch`: rows, scales, local indices, weights, counts and handle, to the bit."""

from __future__ import annotations

import pytest

from harness.cases import ROUTINGS, Case, Scales
from harness.programs import basics

FP8 = Case(dtype="float8_e4m3fn", hidden=256)

CASES = [
    *(Case(f"routing-{routing}", routing=routing) for routing in ROUTINGS),
    *(Case(f"hidden-{h}", hidden=h) for h in (1, 7, 8, 129)),
    Case("hidden-7168", hidden=7168, tokens=(5, 2)),
    *(Case(f"{d}-{h}", dtype=d, hidden=h) for d in ("uint8", "float8_e5m2") for h in (1, 7, 129)),
    *(Case(d, dtype=d, hidden=65) for d in ("float16", "float32", "int8", "int32", "float64")),
    FP8.but(name="fp8-float32", scales=Scales("float32", 2)),
    FP8.but(name="fp8-int32", scales=Scales("int32", 1)),
    FP8.but(name="fp8-e8m0", scales=Scales("float8_e8m0fnu", 8)),
    FP8.but(name="fp8-e8m0-odd", scales=Scales("float8_e8m0fnu", 3), hidden=96),
    FP8.but(name="fp8-columns", scales=Scales("float32", 2, "columns")),
    FP8.but(name="fp8-e8m0-columns", scales=Scales("float8_e8m0fnu", 5, "columns")),
    FP8.but(name="fp8-padded", scales=Scales("float32", 3, "padded")),
    FP8.but(name="fp8-7168", scales=Scales("float32", 56, "columns"), hidden=7168, tokens=(3,)),
    Case("opaque-rows", dtype="uint8", hidden=72, scales=Scales("uint8", 9)),
    Case("bf16-with-scales", scales=Scales("float16", 1), tokens=(0, 13)),
    Case("scales-without-topk", scales=Scales("float32", 4), with_topk=False, dtype="uint8"),
    *(
        Case(f"experts-{n}", experts=n, topk=min(n, 3))
        for n in (1, 2, 3, 7, 10, 257, 511, 512, 1200)
    ),
    *(Case(f"topk-{k}", experts=24, topk=k, routing="holes") for k in (1, 2, 9, 11, 22)),
    Case("topk-beyond-experts", experts=5, topk=22, routing="duplicates"),
    *(Case(f"int32-{r}", index="int32", routing=r) for r in ("holes", "none", "duplicates")),
    Case("no-tokens", tokens=(0,)),
    Case("some-without-tokens", tokens=(0, 7)),
    Case("one-has-tokens", tokens=(0, 0, 0, 0, 0, 0, 0, 19)),
    Case("one-token", tokens=(1,)),
    Case("unequal-tokens", tokens=(1, 130, 17, 64), experts=32),
    Case("without-topk", with_topk=False),
    Case("without-topk-or-tokens", with_topk=False, tokens=(0, 3)),
    Case("rank-without-expert", extra_ranks=True),
    Case("rank-without-expert-or-topk", extra_ranks=True, with_topk=False),
    *(Case(f"aligned-{a}", alignment=a) for a in (2, 7, 128)),
    Case("aligned-empty", alignment=64, routing="one_expert"),
    Case("mapped", experts=13, shuffled_experts=True),
    Case("mapped-duplicates", experts=6, shuffled_experts=True, routing="duplicates"),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch(ranks, case, seed):
    ranks.check(basics.check_dispatch, case, seed)


def test_prefix_matrix_delimits_sources(ranks, seed):
    ranks.check(basics.blocks_follow_the_prefix_matrix, seed)


def test_layout_dispatch_and_combine_fit_together(ranks, seed):
    case = Case(tokens=(40, 3, 0, 22), experts=20, topk=6, routing="holes", source="received")
    ranks.check(basics.as_users_do, case, seed)


def test_stream_arguments_change_nothing(ranks, seed):
    ranks.check(basics.asynchronous, Case(), seed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint8"])
def test_inputs_are_only_read(ranks, dtype, seed):
    ranks.check(basics.inputs_stay, Case(dtype=dtype, bias=1), seed)


def test_results_are_of_the_callers_framework(ranks, seed):
    ranks.check(basics.same_framework_in_and_out, Case(dtype="bfloat16"), seed)
