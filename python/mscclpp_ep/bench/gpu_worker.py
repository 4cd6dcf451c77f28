# SPDX-License-Identifier: MIT
"""One rank of a run on GPUs: everything is measured in turn, on one set of inputs after another."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mscclpp_ep.bench.cases import Case
from mscclpp_ep.bench.clock import SpinBarrier
from mscclpp_ep.bench.gpu_clock import GpuClock, GpuKey, Times
from mscclpp_ep.bench.gpu_inputs import Inputs
from mscclpp_ep.bench.gpu_measure import Attempts, CaseFailure, GpuSystem
from mscclpp_ep.bench.gpu_ours import TIMEOUT_S, Ours
from mscclpp_ep.bench.gpu_peers import join_nccl, make_peer
from mscclpp_ep.bench.gpu_settings import GpuSettings, sms_available
from mscclpp_ep.bench.ops import START

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import mscclpp_ep as ep
    from mscclpp_ep.cli.launch import Rank

# A barrier is given up later than the calls that a rank may wait in meanwhile.
_BARRIER_PATIENCE_S = 2 * TIMEOUT_S


@dataclasses.dataclass(frozen=True)
class GpuTraffic:
    """Rows of one dispatch.

    Attributes:
        rows: that this rank receives, its own included.
        rows_from_others: those of them that come from another rank.
        rows_crossing: the most that any rank sends to others or receives from them.
        iterations: that were measured with them.
    """

    rows: int
    rows_from_others: int
    rows_crossing: int
    iterations: int


@dataclasses.dataclass
class GpuMeasured:
    """What one rank saw.

    Attributes:
        sms: numbers of multiprocessors that were measured.
        times: of each kind of call.
        traffic: of each set of inputs.
        pushes: seconds of plain copies, by multiprocessors.
        failures: the same on every rank.
        profiler_error: why there are no times of the profiler; None if there are.
        device: what the rank is on.
    """

    sms: tuple[int, ...]
    times: dict[GpuKey, Times]
    traffic: list[GpuTraffic]
    pushes: dict[int, list[float]]
    failures: list[CaseFailure]
    profiler_error: str | None
    device: dict[str, Any]


def run_rank(rank: Rank, settings: GpuSettings) -> GpuMeasured:
    """Measures everything on one rank."""
    try:
        return _Worker(rank, settings).run()
    except BaseException:
        # The parent shows the error of one rank only, and of the library's without the traceback.
        text = traceback.format_exc()
        sys.stderr.write(f"rank {rank.index}:\n{text}")
        sys.stderr.flush()
        raise


class _Worker:
    def __init__(self, rank: Rank, settings: GpuSettings) -> None:
        import torch

        self._torch: Any = torch
        self._rank = rank
        self._settings = settings
        self._folder = Path(rank.meeting_point).parent
        torch.cuda.set_device(rank.index % settings.gpus)
        self._device = f"cuda:{rank.index % settings.gpus}"
        # As a model's own: a graph cannot be captured on the default stream.
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call, unused-ignore]
        self._traffic: list[GpuTraffic] = []

    def run(self) -> GpuMeasured:
        base, rank = self._settings.base, self._rank
        device = self._describe()
        with rank.join() as group:
            ours = Ours(self._torch, group, self._settings, self._device)
            clock = GpuClock(
                self._torch,
                self._device,
                SpinBarrier(self._folder / "barrier", rank.index, rank.size),
                ours.gate,
                warmup=base.warmup,
                flush_bytes=base.flush << 20,
                patience=_BARRIER_PATIENCE_S,
            )
            sms = self._agree_on_sms(group)
            attempts = Attempts(group, clock)
            attempts.recover = ours.renew
            with self._peers(attempts) as peers:
                gc.disable()
                for number, iterations in enumerate(base.rounds()):
                    self._measure_round(number, iterations, sms, attempts, clock, ours, peers)
                    gc.collect()
            ours.destroy()
        return GpuMeasured(
            sms=sms,
            times=dict(clock.times),
            traffic=self._traffic,
            pushes=ours.pushes,
            failures=attempts.failures,
            profiler_error=clock.profiler_error,
            device=device,
        )

    def _agree_on_sms(self, group: ep.Group) -> tuple[int, ...]:
        current = self._torch.cuda.current_device()
        count = self._torch.cuda.get_device_properties(current).multi_processor_count
        least = min(int(each) for each in group.all_gather(str(count).encode()))
        return sms_available(self._settings.sms, least)

    @contextlib.contextmanager
    def _peers(self, attempts: Attempts) -> Iterator[list[GpuSystem]]:
        """The peers that can be made; the others are among the failures."""
        made: list[GpuSystem] = []
        wanted = self._settings.base.peers
        if not wanted:
            yield made
            return
        join = _Once(lambda: join_nccl(self._torch, self._settings, self._rank.index, self._folder))
        for name in wanted:

            def make(name: str = name) -> None:
                made.append(make_peer(name, self._torch, join(), self._settings))

            if not attempts.run(name, START, 0, make):
                made[:] = [peer for peer in made if peer.name != name]
        yield made
        for peer in made:
            peer.destroy()
        if self._torch.distributed.is_initialized():
            self._torch.distributed.destroy_process_group()

    def _measure_round(
        self,
        number: int,
        iterations: int,
        sms: tuple[int, ...],
        attempts: Attempts,
        clock: GpuClock,
        ours: Ours,
        peers: list[GpuSystem],
    ) -> None:
        self._rank.report(f"cuda: inputs {number + 1}")
        case = Case(self._settings.base, self._rank.index, self._settings.base.tokens, number)
        inputs = Inputs(self._torch, case, self._device)
        self._torch.cuda.synchronize()
        self._traffic.append(_traffic(case, iterations))
        systems: list[GpuSystem] = [ours, *peers]
        for profiled in (False, True):
            with clock.profiler() if profiled else contextlib.nullcontext():
                for place, count in enumerate(sms):
                    how = "profiler" if profiled else "clocks"
                    self._rank.report(f"cuda: inputs {number + 1}, {count} SMs, {how}")
                    if not profiled:
                        ours.measure_floor(attempts, count)
                    for system in systems:
                        if system.takes_sms or place == 0:
                            number_of = count if system.takes_sms else 0
                            system.measure(attempts, clock, inputs, number_of, iterations)

    def _describe(self) -> dict[str, Any]:
        torch = self._torch
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        distributed = torch.distributed
        has_nccl = distributed.is_available() and distributed.is_nccl_available()
        return {
            "gpu": torch.cuda.current_device(),
            "name": found.name,
            "memory": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "cache": found.L2_cache_size,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        }


class _Once:
    """Calls a function the first time, and gives what came of it every time."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None
        self._error: Exception | None = None
        self._called = False

    def __call__(self) -> Any:
        if not self._called:
            self._called = True
            try:
                self._result = self._function()
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._result


def _traffic(case: Case, iterations: int) -> GpuTraffic:
    return GpuTraffic(
        rows=case.received_by(case.rank),
        rows_from_others=case.received_from_others(case.rank),
        rows_crossing=case.rows_crossing,
        iterations=iterations,
    )
