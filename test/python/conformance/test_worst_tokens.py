# SPDX-License-Identifier: MIT
"""`num_worst_tokens`: outputs of a given number of rows; what does not fit is dropped, and told."""

from __future__ import annotations

import pytest

from harness.cases import Case, Scales
from harness.programs import basics

FITS = [
    *(Case(f"{w}", worst=w) for w in ("exact", "room")),
    Case("room-none", worst="room", routing="none"),
    Case("room-no-tokens", worst="room", tokens=(0,)),
    Case("room-scales", worst="room", dtype="uint8", scales=Scales("float32", 3), hidden=130),
    Case("room-aligned", worst="room", alignment=16),
    Case("room-int32", worst="room", index="int32", routing="holes", topk=9, experts=20),
    Case("room-mapped", worst="room", experts=13, shuffled_experts=True),
    Case("room-arena", worst="room", source="mixed", bias=1),
    Case("room-odd", worst="room", hidden=7, experts=3, topk=2, tokens=(0, 31)),
]
DROPS = [
    *(Case(f"{w}", worst=w) for w in ("short", "one")),
    Case("short-one-rank", worst="short", routing="one_rank", bias=1),
    Case("short-one-expert", worst="short", routing="one_expert"),
    Case("short-unequal", worst="short", tokens=(50, 0, 3, 21), experts=5, topk=2),
    Case("short-scales", worst="short", dtype="uint8", scales=Scales("uint8", 5), hidden=33),
    Case("short-int32", worst="short", index="int32", combine_dtype="float32"),
    Case("short-arena", worst="short", source="mixed"),
    Case("short-mapped", worst="short", experts=9, shuffled_experts=True),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", FITS, ids=str)
def test_all_rows_fit(ranks, case, seed):
    ranks.check(basics.drops_are_reported, case, seed)


@pytest.mark.many_cases
@pytest.mark.parametrize("case", DROPS, ids=str)
def test_last_rows_are_dropped_and_reported(ranks, case, seed):
    ranks.check(basics.drops_are_reported, case, seed)


def test_same_rows_as_without(ranks, seed):
    ranks.check(basics.same_as_without, Case(alignment=4, routing="holes"), seed)
