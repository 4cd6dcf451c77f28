# SPDX-License-Identifier: MIT
"""`get_dispatch_layout`: which ranks and experts each token goes to."""

from __future__ import annotations

import pytest

from harness.cases import ROUTINGS, Case
from harness.programs import basics

CASES = [
    *(Case(f"routing-{routing}", routing=routing) for routing in ROUTINGS),
    *(Case(f"experts-{n}", experts=n, topk=min(n, 3)) for n in (1, 2, 3, 5, 7, 257)),
    *(Case(f"topk-{k}", experts=24, topk=k) for k in (1, 2, 8, 9, 22)),
    Case("topk-beyond-experts", experts=5, topk=22, routing="duplicates"),
    Case("int32", index="int32", routing="holes"),
    Case("no-tokens", tokens=(0,)),
    Case("some-without-tokens", tokens=(0, 7)),
    Case("many-tokens", tokens=(3000, 1, 257), experts=64, topk=8),
    Case("mapped", experts=11, shuffled_experts=True),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout(ranks, case, seed):
    ranks.check(basics.check_layout, case, seed)


def test_layout_is_local(ranks, seed):
    ranks.check(basics.layout_is_local, Case(tokens=(6, 1)), seed)
