# SPDX-License-Identifier: MIT
"""NaN, infinities, signed zeros, denormals and ties: copied as they are, summed as IEEE says."""

from __future__ import annotations

import pytest

from harness.cases import Case
from harness.programs import basics

DTYPES = ("bfloat16", "float16", "float32")
KINDS = ("special", "bits")


def both(dtype: str, **changes) -> Case:
    return Case(dtype=dtype, combine_dtype=dtype, **changes)


CASES = [
    *(
        both(d, name=f"{d}-{kind}-bias-{b}", values=kind, bias=b, hidden=67)
        for d in DTYPES
        for kind in KINDS
        for b in (0, 1, 2)
    ),
    *(both(d, name=f"{d}-arena", values="special", source="arena", hidden=128) for d in DTYPES),
    *(both(d, name=f"{d}-received", values="bits", source="received") for d in DTYPES),
    *(both(d, name=f"{d}-one-rank", values="special", routing="one_rank") for d in DTYPES),
    Case("float8_e4m3fn", dtype="float8_e4m3fn", values="bits", hidden=130),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(ranks, case, seed):
    ranks.check(basics.check_combine, case, seed)
