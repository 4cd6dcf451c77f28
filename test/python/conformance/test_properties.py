# SPDX-License-Identifier: MIT
"""Layouts and round trips of shapes and routings that nobody thought of."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from harness.cases import ROUTINGS, Case, Scales
from harness.low_latency import KINDS
from harness.low_latency import Case as LowLatencyCase
from harness.programs import basics, low_latency

FLOATS = ("bfloat16", "float16", "float32")
BYTES = ("uint8", "float8_e4m3fn", "float8_e5m2", "int8")

# The pools are shared by all examples on purpose: what one leaves behind is garbage for the next.
examples = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
seeds = st.integers(0, 2**32 - 1)


def routings(case: dict) -> st.SearchStrategy[Case]:
    """Adds to a case what decides who gets which row."""
    return st.builds(
        Case,
        tokens=st.lists(st.integers(0, 50), min_size=1, max_size=4).map(tuple),
        experts=st.integers(1, 40),
        topk=st.integers(1, 22),
        index=st.sampled_from(["int32", "int64"]),
        routing=st.sampled_from(ROUTINGS),
        **case,
    )


scales = st.builds(
    Scales,
    dtype=st.sampled_from(["float32", "int32", "float16", "uint8", "float8_e8m0fnu"]),
    columns=st.integers(1, 9),
    order=st.sampled_from(["rows", "columns", "padded"]),
)
dispatches = routings(
    {
        "hidden": st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 257, 1024])),
        "dtype": st.sampled_from(FLOATS + BYTES),
        "values": st.sampled_from(["normal", "special", "bits"]),
        "scales": st.none() | scales,
        "with_topk": st.booleans(),
        "extra_ranks": st.booleans(),
        "alignment": st.sampled_from([1, 3, 128]),
        "combine_dtype": st.sampled_from(FLOATS),
        "bias": st.integers(0, 2),
        "weights": st.booleans(),
        "source": st.sampled_from(["ordinary", "arena", "mixed"]),
    }
)
worst_cases = st.builds(
    lambda case, worst: case.but(with_topk=True, worst=worst),
    dispatches,
    st.sampled_from(["exact", "room", "short", "one"]),
)

low_latency_cases = st.builds(
    LowLatencyCase,
    tokens=st.lists(st.integers(0, 30), min_size=1, max_size=4).map(tuple),
    room=st.integers(0, 9),
    hidden=st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 257, 700, 1024])),
    experts=st.integers(1, 40),
    topk=st.integers(1, 22),
    index=st.sampled_from(["int32", "int64"]),
    values=st.sampled_from(["normal", "special", "bits", "groups"]),
    routing=st.sampled_from(ROUTINGS),
    kind=st.sampled_from(KINDS),
    combine_dtype=st.sampled_from(FLOATS),
    early_weights=st.booleans(),
    exact=st.booleans(),
)


@pytest.mark.ranks(1, 3, 8, modes=("thread",))
@settings(examples, max_examples=100)
@given(case=routings({}), seed=seeds)
def test_layout_arithmetic(ranks, case, seed):
    ranks.check(basics.check_layout_dry, case, seed)


@pytest.mark.slow
@pytest.mark.ranks(2, 3)
@settings(examples, max_examples=200)
@given(case=dispatches, seed=seeds)
def test_round_trip(ranks, case, seed):
    ranks.check(basics.check_combine, case, seed)


@pytest.mark.slow
@pytest.mark.ranks(3)
@settings(examples, max_examples=100)
@given(case=worst_cases, seed=seeds)
def test_round_trip_with_worst_tokens(ranks, case, seed):
    ranks.check(basics.drops_are_reported, case, seed)


@pytest.mark.cpu_only
@pytest.mark.ranks(1, 3, modes=("thread",))
@settings(examples, max_examples=60)
@given(case=low_latency_cases, seed=seeds)
def test_low_latency_round_trip(ranks, case, seed):
    ranks.check(low_latency.check, case, seed)


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.ranks(2, 8)
@settings(examples, max_examples=80)
@given(case=low_latency_cases, seed=seeds)
def test_many_low_latency_round_trips(ranks, case, seed):
    ranks.check(low_latency.check, case, seed)
