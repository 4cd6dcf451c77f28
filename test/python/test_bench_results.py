# SPDX-License-Identifier: MIT
"""The arithmetic of `bench`, on times that are given."""

import numpy as np
import pytest

from mscclpp_ep.bench.bounds import Bound
from mscclpp_ep.bench.checks import (
    WrongResultError,
    require_close,
    require_equal,
    require_same_rows,
    require_within,
)
from mscclpp_ep.bench.results import Results, seconds_of_calls, seconds_of_chains
from mscclpp_ep.bench.settings import Settings
from mscclpp_ep.bench.worker import Traffic


def settings(mode="ht", iters=5, **changes):
    fields = {
        **{"mode": mode, "ranks": 2, "tokens": 8, "sizes": (8,), "hidden": 128, "experts": 4},
        **{"topk": 2, "iters": iters, "refresh": 2, "warmup": 1, "threads": 1, "flush": 0},
        **{"chain": 16, "seed": 0, "peers": ("gloo",)},
    }
    return Settings(**(fields | changes))


def lasting(*seconds, begin=0.0):
    return [(begin + number, begin + number + each) for number, each in enumerate(seconds)]


def test_a_call_lasts_from_the_first_begin_to_the_last_end():
    spans = [[(1.0, 2.0), (5.0, 5.5)], [(1.5, 1.75), (5.25, 6.0)]]
    assert seconds_of_calls(spans).tolist() == [1.0, 1.0]
    assert seconds_of_calls(spans[::-1]).tolist() == [1.0, 1.0]


def test_the_period_of_a_chain_is_the_median_over_ranks():
    spans = [[(0.0, 1.0)], [(10.0, 12.0)], [(20.0, 26.0)]]
    assert seconds_of_chains(spans).tolist() == [2.0]


def test_percentiles_are_over_iterations():
    seconds = [0.005, 0.001, 0.004, 0.002, 0.003]
    spans = {
        (8, "limit", "memcpy, private"): lasting(*[0.0015] * 5),
        (8, "limit", "memcpy, shared"): lasting(*[0.0006] * 5),
        (8, "mscclpp_ep", "dispatch"): lasting(*seconds),
    }
    traffic = {8: [Traffic(rows=10, rows_from_others=4, choices=25)] * 5}
    results = Results(settings(), [spans, spans], [traffic, traffic])
    row = results.find("dispatch")
    assert row.calls == 5
    assert row.median_us == pytest.approx(3000)
    # Between the fourth and the fifth of five: 3.6 and 3.96 steps from the first.
    assert row.p90_us == pytest.approx(4600)
    assert row.p99_us == pytest.approx(4960)
    assert row.min_us == pytest.approx(1000)
    assert row.limit_us == pytest.approx(600)
    assert row.percent_of_limit == pytest.approx(20)
    assert results.limit(8, "dispatch") == ("memcpy, shared", pytest.approx(600))


def test_ranks_are_bracketed():
    spans = [
        {(8, "limit", "memcpy, private"): lasting(1, 1), (8, "mscclpp_ep", "combine"): each}
        for each in (lasting(0.001, 0.004), lasting(0.003, 0.002))
    ]
    row = Results(settings(iters=2), spans, [{8: [Traffic(1, 1, 1)]}] * 2).find("combine")
    assert row.fastest_rank_us == pytest.approx(1500)
    assert row.slowest_rank_us == pytest.approx(3500)


@pytest.mark.parametrize(
    ("mode", "system", "op", "logical", "wire"),
    [
        ("ht", "mscclpp_ep", "dispatch", 11 * 256, 5 * 256),
        ("ht", "mscclpp_ep", "combine, cold", 11 * 256, 5 * 256),
        ("ht", "gloo", "combine", 11 * 256, 5 * 256),
        ("ht", "mscclpp_ep", "chained", 2 * 11 * 256, 2 * 5 * 256),
        # A row for each expert, made of one that is sent to each rank.
        ("ll", "mscclpp_ep", "dispatch", 25 * 256, 5 * 256),
        ("ll", "mscclpp_ep", "combine", 25 * 256, 5 * 256),
        ("ll", "mscclpp_ep", "dispatch, FP8", 25 * (128 + 4), 5 * (128 + 4)),
        ("ll", "gloo", "dispatch", 11 * 256, 5 * 256),
    ],
)
def test_logical_and_wire_bytes(mode, system, op, logical, wire):
    limits = ("memcpy, private",) if mode == "ht" else ("dispatch", "dispatch, FP8", "combine")
    spans = {(8, "limit", way): lasting(0.001) for way in limits}
    spans[8, system, op] = lasting(0.004)
    # Means over ranks: 11, 5 and 25.
    traffic = [{8: [Traffic(10, 4, 20)]}, {8: [Traffic(12, 6, 30)]}]
    row = Results(settings(mode), [spans, spans], traffic).find(op, system=system)
    assert row.logical_bytes == pytest.approx(logical)
    assert row.wire_bytes == pytest.approx(wire)
    assert row.logical_gbps == pytest.approx(logical / 0.004 / 1e9)
    assert row.wire_gbps == pytest.approx(wire / 0.004 / 1e9)
    assert row.percent_of_limit == pytest.approx(50 if op == "chained" else 25)


def test_each_operation_of_the_ll_mode_has_its_limit():
    ways = {"dispatch": 0.001, "dispatch, FP8": 0.002, "combine": 0.004}
    spans = {(8, "limit", op): lasting(each) for op, each in ways.items()}
    spans |= {(8, "mscclpp_ep", op): lasting(0.008) for op in (*ways, "chained")}
    results = Results(settings("ll"), [spans] * 2, [{8: [Traffic(1, 1, 1)]}] * 2)
    shares = {row.name: row.percent_of_limit for row in results.rows}
    expected = {"dispatch": 12.5, "dispatch, FP8": 25, "combine": 50, "chained": 62.5}
    assert shares == pytest.approx(expected)


def test_peers_are_compared_with_every_variant():
    spans = {
        (8, "limit", "memcpy, private"): lasting(0.001),
        (8, "mscclpp_ep", "combine"): lasting(0.002),
        (8, "mscclpp_ep", "combine, cold"): lasting(0.004),
        (8, "gloo", "combine"): lasting(0.010),
        (8, "mpi", "combine"): lasting(0.003),
    }
    results = Results(settings(), [spans] * 2, [{8: [Traffic(1, 1, 1)]}] * 2)
    faster = {row.name: row.times_faster for row in results.rows if row.system == "mscclpp_ep"}
    assert faster["combine"] == pytest.approx({"gloo": 5.0, "mpi": 1.5})
    assert faster["combine, cold"] == pytest.approx({"gloo": 2.5, "mpi": 0.75})
    assert results.find("combine", system="gloo").times_faster == {}


@pytest.mark.parametrize(
    ("bound", "met"),
    [
        (Bound("", None, least=1), False),
        (Bound("", 1.0, least=1), True),
        (Bound("", 0.9, least=1), False),
        (Bound("", 1.1, least=0.9, most=1.0), False),
    ],
)
def test_bounds(bound, met):
    assert bound.met is met


def test_iterations_are_shared_out_to_sets_of_inputs():
    assert settings(iters=5).rounds() == [2, 2, 1]
    assert settings(iters=4).rounds() == [2, 2]
    assert settings().chain_warmup == 2


def test_wrong_results_are_noticed():
    bits = np.array([[0x3F80, 0x4000], [0x4040, 0x4080]], np.uint16)
    other = bits.copy()
    other[1, 0] += 1
    require_equal("", bits, bits.copy())
    require_close("", other, bits)
    other[1, 0] += 8
    rows = bits.view(np.uint8)
    require_same_rows("", rows[::-1], rows)
    ones = np.ones((1, 2), np.float32)
    require_within("", ones * np.float32(1.007), ones, ones)
    for call in (
        lambda: require_equal("it", other, bits),
        lambda: require_equal("it", bits[:1], bits),
        lambda: require_close("it", other, bits),
        lambda: require_same_rows("it", rows[[0, 0]], rows),
        lambda: require_same_rows("it", rows[:1], rows),
        lambda: require_within("it", ones * np.float32(1.02), ones, ones),
        lambda: require_within("it", ones * np.float32("nan"), ones, ones),
    ):
        with pytest.raises(WrongResultError, match="it"):
            call()
