# SPDX-License-Identifier: MIT
"""What measures the low-latency mode, on a stand-in for it: figures and wrong results."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from harness.ll_stand_in import StandIn
from harness.threads import on_ranks
from mscclpp_ep.bench import ll
from mscclpp_ep.bench.cases import Case
from mscclpp_ep.bench.checks import WrongResultError
from mscclpp_ep.bench.clock import Clock, SpinBarrier
from mscclpp_ep.bench.ll_limits import LowLatencyLimits, _Routes
from mscclpp_ep.bench.results import Results
from mscclpp_ep.bench.routing import Routing
from mscclpp_ep.bench.settings import Settings
from mscclpp_ep.bench.worker import _traffic

FIELDS = {
    **{"mode": "ll", "tokens": 12, "sizes": (5, 12), "hidden": 256, "experts": 7, "topk": 3},
    **{"iters": 2, "refresh": 2, "warmup": 1, "flush": 0, "chain": 8, "seed": 3, "peers": ()},
}


def measure(folder, monkeypatch, ranks, spoil=lambda op, array: None, threads=1, **changes):
    settings = Settings(**(FIELDS | {"ranks": ranks, "threads": threads} | changes))
    monkeypatch.setattr(ll, "_make", lambda group, settings: StandIn(group, spoil))

    def body(group):
        clock = Clock(SpinBarrier(folder / "barrier", group.rank, ranks), settings)
        limits, system = LowLatencyLimits(group, clock, settings), None
        system = ll.LowLatency(group, clock, settings)
        traffic = {}
        for size in settings.sizes:
            case = Case(settings, group.rank, size, 0)
            traffic[size] = [_traffic(case)] * 2
            limits.measure(case, 2, size == settings.tokens)
            system.measure(case, 2, size == settings.tokens)
        limits.destroy()
        system.destroy()
        return dict(clock.spans), traffic

    spans, traffic = zip(*on_ranks(ranks, body), strict=True)
    return Results(settings, list(spans), list(traffic))


@pytest.mark.parametrize(("count", "threads"), [(2, 1), (3, 2)])
def test_figures_of_the_ll_mode(tmp_path, monkeypatch, count, threads):
    results = measure(tmp_path, monkeypatch, count, threads=threads)
    names = {(row.name, row.tokens) for row in results.rows}
    everywhere = set(itertools.product(("dispatch", "combine"), (5, 12)))
    assert names == everywhere | {("dispatch, FP8", 12), ("chained", 12)}
    row_bytes = {"dispatch": 512, "combine": 512, "dispatch, FP8": 256 + 8, "chained": 1024}
    for row in results.rows:
        # Every choice is a row, of all ranks, on one of them.
        assert row.logical_bytes == pytest.approx(row.tokens * 3 * row_bytes[row.name])
        assert row.wire_bytes < row.logical_bytes
        assert row.percent_of_limit == pytest.approx(100 * row.limit_us / row.median_us)
    assert set(results.limits_to_json()) == {"dispatch", "combine", "ways_us"}


def test_recorded_choices_of_the_ll_mode(tmp_path, monkeypatch):
    step = (np.array([[0, 6], [-1, 3], [-1, -1]]), np.empty((0, 2), np.int64))
    routing = Routing("", 7, (step,))
    changes = {"routing": routing, "topk": 2, "tokens": 3, "sizes": (3,)}
    results = measure(tmp_path, monkeypatch, 2, **changes)
    # Three choices of two ranks; two of them of the rank that holds the experts 4 to 6 or not.
    assert results.find("dispatch").logical_bytes == pytest.approx(3 / 2 * 512)
    assert results.find("dispatch").wire_bytes == pytest.approx(1 / 2 * 512)


def test_rows_without_groups_of_128_have_no_fp8(tmp_path, monkeypatch):
    results = measure(tmp_path, monkeypatch, 2, hidden=72)
    assert "dispatch, FP8" not in {row.name for row in results.rows}


@pytest.mark.parametrize("wrong", ["dispatch", "FP8 dispatch", "scales", "combine"])
def test_wrong_results_of_the_ll_mode_are_noticed(tmp_path, monkeypatch, wrong):
    def spoil(op, array):
        if op == wrong:
            index = (0,) * array.ndim
            array[index] = 3 if array[index] != 3 else 5

    with pytest.raises(WrongResultError, match=f"mscclpp_ep: {wrong.split()[-1]}|FP8"):
        measure(tmp_path, monkeypatch, 1, spoil)


def test_the_limit_copies_the_rows_of_the_operation():
    settings = Settings(**(FIELDS | {"ranks": 2, "threads": 1}))
    for rank in range(2):
        case = Case(settings, rank, 12, 0)
        routes = _Routes(case)
        assert sum(routes.received) == case.received_by(rank)
        assert sum(map(len, routes.slots)) == case.choices_received_by(rank)
        for source in range(2):
            assert len(routes.firsts[source]) == routes.received[source]
            assert sorted(set(routes.slots[source].tolist())) == [*range(routes.received[source])]


def test_quantized_follows_the_definition():
    values = np.zeros((1, 256), np.float32)
    values[0, :4] = [448, -1, 0.5, 3.25]
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    rows, scales = ll.quantized(bits)
    decoded = rows.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert scales[0].tolist() == pytest.approx([1.0, 1e-4 / 448])
    np.testing.assert_array_equal(decoded, values)
