# SPDX-License-Identifier: MIT
"""What `bench` does on GPUs, on the CPU: with stand-ins for what Torch has for GPUs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mscclpp_ep as ep
from mscclpp_ep.bench import gpu_deep_ep, gpu_floor, gpu_ours
from mscclpp_ep.bench.cases import Case
from mscclpp_ep.bench.clock import SpinBarrier
from mscclpp_ep.bench.gpu_calls import Layer
from mscclpp_ep.bench.gpu_clock import GpuClock
from mscclpp_ep.bench.gpu_gate import Gate
from mscclpp_ep.bench.gpu_inputs import Inputs
from mscclpp_ep.bench.gpu_measure import Attempts
from mscclpp_ep.bench.gpu_settings import GpuSettings
from mscclpp_ep.bench.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

RANKS, SMS, ITERATIONS = 2, 4, 2
OURS = {
    *("dispatch", "dispatch, cached", "dispatch, worst-case rows", "dispatch, no block free"),
    *("dispatch, FP8", "dispatch, FP8, cached", "chained", "chained, cached"),
    *("combine", "combine, ordinary input", "combine, with weights"),
}
GRAPH = "chained, CUDA graph"


class Event:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


class Graph:
    """Replays nothing, which its results show."""

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


class Cuda:
    """Marks are noted by thread, and by the profiler each is followed by a kernel."""

    Event = Event
    CUDAGraph = Graph

    def __init__(self) -> None:
        self.marks = threading.local()

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        assert cycles > 0
        self.marks.count = getattr(self.marks, "count", 0) + 1

    def current_stream(self) -> Cuda:
        return self

    def stream(self, _stream: Cuda) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def graph(self, _graph: Graph) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_device_properties(self, _device: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(L2_cache_size=1 << 16)


class Torch:
    """Torch, with something else in the place of its GPUs."""

    def __init__(self) -> None:
        self.cuda = Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Profile:
    cuda: Cuda

    def __init__(self, activities: list[Any]) -> None:
        del activities

    def __enter__(self) -> Profile:
        self.cuda.marks.count = 0
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        events = []
        for mark in range(self.cuda.marks.count):
            for name, begin in (
                ("spin_kernel(long)", mark),
                ("void a::pushKernel<2>()", mark + 0.5),
            ):
                events.append({"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": 3.0})
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123 - as Torch's
            json.dump({"traceEvents": events}, file)


def settings(**changes: Any) -> GpuSettings:
    fields = {
        **{"mode": "ht", "ranks": RANKS, "tokens": 24, "sizes": (24,), "hidden": 256},
        **{"experts": 5, "topk": 3, "iters": 2, "refresh": 2, "warmup": 1, "threads": 1},
        **{"flush": 0, "chain": 8, "seed": 5, "peers": ()},
    }
    return GpuSettings(base=Settings(**(fields | changes)), gpus=1, sms=(SMS,))


def measure(folder: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> list[Any]:
    """Measures a system that `make` makes on each rank; the times and failures of each."""
    stand_in, chosen = Torch(), settings()
    Profile.cuda = stand_in.cuda
    monkeypatch.setattr(torch.profiler, "profile", Profile)

    def body(group: ep.Group) -> Any:
        barrier = SpinBarrier(folder / "barrier", group.rank, RANKS)
        system = make(stand_in, group, chosen)
        is_ours = isinstance(system, gpu_ours.Ours)
        gate = system.gate if is_ours else Gate(torch, ep.Buffer(group, device="cpu"))
        clock = GpuClock(stand_in, "cpu", barrier, gate, warmup=1, flush_bytes=0, patience=20)
        attempts = Attempts(group, clock)
        if is_ours:
            attempts.recover = system.renew
        inputs = Inputs(stand_in, Case(chosen.base, group.rank, 24, 0), "cpu")
        system.measure(attempts, clock, inputs, SMS, ITERATIONS)
        with clock.profiler():
            system.measure(attempts, clock, inputs, SMS, ITERATIONS)
        system.destroy()
        return clock.times, attempts.failures

    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(body, ep.Group.local(RANKS)))


def ours(stand_in: Torch, group: ep.Group, chosen: GpuSettings) -> gpu_ours.Ours:
    return gpu_ours.Ours(stand_in, group, chosen, "cpu")


def test_every_case_is_measured_and_right(tmp_path, monkeypatch):
    for times, failures in measure(tmp_path, monkeypatch, ours):
        assert {op for _, op, _ in times} == OURS
        for each in times.values():
            assert len(each.host) == len(each.events) == len(each.activities) == ITERATIONS
            assert min(each.host) > 0
        assert times["mscclpp_ep", "dispatch", SMS].activities == [{"pushKernel": 3e-6}] * 2
        # 7 of the 8 pairs of a chain.
        share = pytest.approx(3e-6 / 7)
        assert times["mscclpp_ep", "chained", SMS].activities[0] == {"pushKernel": share}
        # This graph does nothing when it is replayed.
        (failure,) = failures
        assert (failure.op, failure.sms, failure.rank) == (GRAPH, SMS, 0)
        assert "rows are wrong, the first is 0" in failure.message
        assert "Traceback" in failure.details


def test_an_error_of_one_rank_ends_the_case_on_all(tmp_path, monkeypatch):
    right = Layer.cached_dispatch

    def wrong(self: Layer, op: str, *, fp8: bool = False) -> None:
        if self.meter.inputs.case.rank == 1 and not fp8:
            raise RuntimeError("it broke")
        right(self, op, fp8=fp8)

    monkeypatch.setattr(Layer, "cached_dispatch", wrong)
    monkeypatch.setattr(gpu_ours, "TIMEOUT_S", 1.0)
    measured = measure(tmp_path, monkeypatch, ours)
    assert measured[0][1] == measured[1][1]
    for times, failures in measured:
        assert [failure.op for failure in failures] == ["dispatch, cached", GRAPH]
        # The other rank waited for it in vain.
        assert (failures[0].rank, failures[0].message) == (1, "RuntimeError: it broke")
        assert {op for _, op, _ in times} == OURS - {"dispatch, cached"}


def test_wrong_rows_are_noticed(tmp_path, monkeypatch):
    right = Layer.send

    def wrong(self: Layer, x: Any, num_worst_tokens: int = 0) -> Any:
        result = right(self, x, num_worst_tokens)
        if num_worst_tokens and self.meter.inputs.case.rank == 1:
            result[0][3, 7] += 1
        return result

    monkeypatch.setattr(Layer, "send", wrong)
    for times, failures in measure(tmp_path, monkeypatch, ours):
        assert ("mscclpp_ep", "dispatch, worst-case rows", SMS) not in times
        assert failures[0].rank == 1
        assert "1 of " in failures[0].message and "the first is 3" in failures[0].message


def test_a_peer_with_the_methods_of_deep_ep(tmp_path, monkeypatch):
    class Reordering(ep.Buffer):
        """Gives the rows in another order; combines put them right again."""

        def dispatch(self, x: Any, *args: Any, **keywords: Any) -> Any:
            result = super().dispatch(x, *args, **keywords)
            rows = [t.flip(0) for t in (result[0] if isinstance(x, tuple) else (result[0],))]
            return (tuple(rows) if isinstance(x, tuple) else rows[0], *result[1:])

        def combine(self, x: Any, *args: Any, **keywords: Any) -> Any:
            return super().combine(x.flip(0).contiguous(), *args, **keywords)

    def make_buffer(group: ep.Group, nvl_bytes: int, rdma_bytes: int) -> ep.Buffer:
        assert nvl_bytes > rdma_bytes == 0
        return Reordering(group, device="cpu")

    make_buffer.set_num_sms = ep.Buffer.set_num_sms  # type: ignore[attr-defined]
    monkeypatch.setattr(ep.Buffer, "num_sms", ep.Buffer.num_sms)
    monkeypatch.setitem(sys.modules, "deep_ep", types.SimpleNamespace(Buffer=make_buffer))
    for times, failures in measure(tmp_path, monkeypatch, gpu_deep_ep.DeepEp):
        assert failures == []
        assert {op for _, op, _ in times} == {
            *("dispatch", "dispatch, cached", "dispatch, FP8", "dispatch, FP8, cached"),
            *("combine", "chained"),
        }


def test_a_floor_that_fails_is_not_tried_again(tmp_path, monkeypatch):
    def pushed(core: Any, sms: int) -> list[float]:
        del core
        if sms == 8:
            raise RuntimeError("no such copy")
        return [0.5]

    monkeypatch.setattr(gpu_ours, "push", pushed)

    class Floor(gpu_ours.Ours):
        def measure(self, attempts: Attempts, *_others: Any) -> None:
            for sms in (4, 8, 4):
                self.measure_floor(attempts, sms)

    made = []

    def make(stand_in: Torch, group: ep.Group, chosen: GpuSettings) -> Floor:
        made.append(Floor(stand_in, group, chosen, "cpu"))
        return made[-1]

    for _, failures in measure(tmp_path, monkeypatch, make):
        assert [(failure.system, failure.sms) for failure in failures] == [("floor", 8)]
    # The second 4 is not tried, as the floor has failed.
    assert made[0].pushes == {4: [0.5]}
    with pytest.raises(RuntimeError, match="has no time_push"):
        gpu_floor.push(object(), 4)
