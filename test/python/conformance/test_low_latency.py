# SPDX-License-Identifier: MIT
"""Low-latency dispatch and combine: rows, scales, counts, handle and sums, to the bit."""

from __future__ import annotations

import pytest

from harness.cases import ROUTINGS
from harness.low_latency import KINDS, Case
from harness.programs import low_latency

pytestmark = pytest.mark.cpu_only

FLOATS = ("bfloat16", "float16", "float32")
few = pytest.mark.ranks(1, 3)
several = pytest.mark.ranks(2, 3, 8)

ROUTED = [
    *(Case(f"routing-{r}", routing=r, exact=i % 2 == 0) for i, r in enumerate(ROUTINGS)),
    *(Case(f"early-{r}", routing=r, early_weights=True) for r in ("holes", "duplicates")),
    Case("duplicates-exact-int32", routing="duplicates", exact=True, index="int32", topk=9),
    *(Case(f"experts-{n}", experts=n, topk=min(n, 3)) for n in (1, 2, 3, 7, 10, 33)),
    *(Case(f"topk-{k}", experts=24, topk=k, routing="holes") for k in (0, 1, 2, 9, 22)),
    Case("topk-beyond-experts", experts=5, topk=22, routing="duplicates", exact=True),
    Case("no-tokens", tokens=(0,)),
    Case("some-without-tokens", tokens=(0, 7), room=0, kind="fp8"),
    Case("one-has-tokens", tokens=(0, 0, 0, 0, 0, 0, 0, 19), early_weights=True),
    Case("unequal-tokens", tokens=(1, 70, 17, 40), room=0, experts=20, index="int32"),
    Case("mapped", experts=13, shuffled_experts=True, kind="fp8"),
    Case("mapped-duplicates", experts=6, shuffled_experts=True, routing="duplicates", exact=True),
]
FORMATS = [
    *(Case(f"{k}-groups", kind=k, values="groups", hidden=700) for k in KINDS[1:]),
    *(Case(f"{k}-bits", kind=k, values="bits", hidden=256) for k in KINDS[1:]),
    *(Case(f"{k}-hidden-{h}", kind=k, hidden=h) for k in KINDS for h in (1, 7, 130, 513)),
    *(Case(f"{d}-special", combine_dtype=d, values="special") for d in FLOATS),
    *(Case(f"{d}-bits-exact", combine_dtype=d, values="bits", exact=True) for d in FLOATS),
    *(Case(f"{d}-early", combine_dtype=d, early_weights=True, hidden=129) for d in FLOATS),
    *(Case(f"rows-{d}", dtype=d, hidden=9) for d in ("uint8", "float16", "float32", "int64")),
    Case("rows-float8", dtype="float8_e4m3fn", hidden=77),
    *(Case(f"sums-{h}", hidden=h, exact=h % 2 == 1) for h in (1, 7, 31, 257)),
]


@pytest.mark.many_cases
@pytest.mark.parametrize("case", ROUTED, ids=str)
def test_routing(ranks, case, seed):
    ranks.check(low_latency.check, case, seed)


@pytest.mark.many_cases
@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_format(ranks, case, seed):
    ranks.check(low_latency.check, case, seed)


@pytest.mark.ranks(4, modes=("process",))
@pytest.mark.parametrize("kind", ["none", "ue8m0"])
def test_long_rows(ranks, kind, seed):
    case = Case(tokens=(6, 3), hidden=7168, experts=16, topk=8, kind=kind)
    ranks.check(low_latency.check, case, seed)


@pytest.mark.parametrize("early", [False, True], ids=["late-weights", "early-weights"])
def test_handle_serves_many_combines(ranks, early, seed):
    ranks.check(low_latency.one_handle_many_combines, Case(early_weights=early), seed)


def test_sums_in_one_step_and_in_two(ranks, seed):
    ranks.check(low_latency.exact_and_default_differ, seed)


def test_copies_add_up(ranks, seed):
    ranks.check(low_latency.sum_of_copies, seed)


@several
@pytest.mark.parametrize("dtype", FLOATS)
def test_output_is_given(ranks, dtype, seed):
    case = Case(tokens=(9, 0, 5), hidden=37, combine_dtype=dtype)
    ranks.check(low_latency.outputs_given, case, seed)


def test_zero_copy(ranks, seed):
    ranks.check(low_latency.zero_copy, seed)


def test_stats_are_added_to(ranks, seed):
    ranks.check(low_latency.stats, seed)


@pytest.mark.parametrize("same_order", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_hooks(ranks, order, same_order, seed):
    ranks.check(low_latency.hooks, order, same_order, seed)


def test_dispatch_and_combine_overlap(ranks, seed):
    ranks.check(low_latency.combine_and_dispatch_overlap, seed)


def test_hook_misuse(ranks, seed):
    ranks.check(low_latency.hook_misuse, seed)


@few
def test_newer_hook_first(ranks, seed):
    ranks.check(low_latency.newer_hook_first, seed)


@several
@pytest.mark.parametrize("pending", [1, 2])
def test_hook_is_never_called(ranks, pending, seed):
    ranks.check(low_latency.hooks_never_called, pending, seed)


@several
def test_hook_keeps_inputs_alive(ranks, seed):
    ranks.check(low_latency.hook_outlives_everything_else, seed)


@several
def test_inputs_may_change_once_sent(ranks, seed):
    ranks.check(low_latency.inputs_may_change_once_sent, seed)


@few
@pytest.mark.parametrize("kind", ["none", "fp8"])
def test_inputs_are_only_read(ranks, kind, seed):
    ranks.check(low_latency.inputs_stay, kind, seed)


@several
def test_results_outlive_later_calls(ranks, seed):
    ranks.check(low_latency.results_outlive_calls, seed)


@several
def test_staging_grows(ranks, seed):
    ranks.check(low_latency.grows, seed)


def test_both_modes_in_one_buffer(ranks, seed):
    ranks.check(low_latency.both_modes, seed)


@pytest.mark.ranks(1, 3, 4)
@pytest.mark.parametrize("first", [2**32 - 8, 2**31 - 7, 2**33 - 1], ids=hex)
def test_epoch_wraps(ranks, first, seed):
    ranks.check(low_latency.across_epochs, first, seed)


@few
def test_async_finish(ranks, seed):
    ranks.check(low_latency.async_events, seed)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("hidden", [1, 130, 512, 2048])
def test_rows_of_ten_bits_an_element(ranks, hidden, exact, seed):
    ranks.check(low_latency.logfmt, hidden, exact, seed)
