# SPDX-License-Identifier: MIT
"""Dispatch by a handle: the routing of an earlier dispatch for other rows."""

from __future__ import annotations

import pytest

from harness.cases import Case, Scales
from harness.programs import basics

CASES = [
    Case("plain"),
    Case("odd", hidden=7, experts=5, topk=3, tokens=(11, 0, 30)),
    Case("scales", dtype="float8_e4m3fn", hidden=128, scales=Scales("float32", 1, "columns")),
    Case("e8m0", dtype="uint8", hidden=33, scales=Scales("float8_e8m0fnu", 3)),
    Case("without-topk", with_topk=False),
    Case("none", routing="none"),
    Case("no-tokens", tokens=(0,)),
    Case("holes-int32", routing="holes", index="int32"),
    Case("rank-without-expert", extra_ranks=True, experts=3, topk=2),
    Case("aligned", alignment=32),
    Case("worst-room", worst="room"),
    Case("worst-short", worst="short"),
    Case("mapped", experts=9, shuffled_experts=True),
    Case("arena", source="mixed", bias=1),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cached_dispatch(ranks, case, seed):
    ranks.check(basics.cached, case, seed)


def test_cached_dispatch_of_another_dtype(ranks, seed):
    ranks.check(basics.cached_other_dtype, seed)
