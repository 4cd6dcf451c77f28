# SPDX-License-Identifier: MIT
"""The same work over NCCL, by way of torch.distributed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from mscclpp_ep.bench.all_to_all import AllToAll
from mscclpp_ep.bench.gpu_calls import Meter
from mscclpp_ep.bench.gpu_checks import require_close, require_same
from mscclpp_ep.bench.gpu_peers import NCCL
from mscclpp_ep.bench.ops import CHAINED, COMBINE, DISPATCH, FP8_DISPATCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.gpu_clock import GpuClock
    from mscclpp_ep.bench.gpu_inputs import Inputs
    from mscclpp_ep.bench.gpu_measure import Attempts
    from mscclpp_ep.bench.gpu_settings import GpuSettings


class Nccl:
    """Dispatch and combine over `all_to_all_single`, on one rank."""

    name = NCCL
    takes_sms = False

    def __init__(self, torch: Any, process_group: Any, settings: GpuSettings) -> None:
        del process_group  # it is the default one
        base = settings.base
        self._torch = torch
        self._work = AllToAll(base.ranks, base.experts_held)
        self._chained = base.chain > 0

    def destroy(self) -> None:
        """Does nothing: the process group is the worker's."""

    def measure(
        self, attempts: Attempts, clock: GpuClock, inputs: Inputs, sms: int, iterations: int
    ) -> None:
        """Times the operations and checks their results; collective."""
        meter = Meter(clock, inputs, NCCL, sms, iterations)
        cases: dict[str, Callable[[Meter], None]] = {
            DISPATCH: self._dispatch,
            COMBINE: self._combine,
        }
        if inputs.fp8 is not None:
            cases[FP8_DISPATCH] = self._dispatch_fp8
        if self._chained:
            cases[CHAINED] = self._chain
        for op, case in cases.items():
            attempts.run(NCCL, op, sms, partial(case, meter))

    def _dispatch(self, meter: Meter) -> None:
        inputs = meter.inputs
        arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights)
        layout = self._work.layout(inputs.topk_idx)
        received, _ = meter.time(DISPATCH, lambda: self._work.dispatch(arrays, layout))
        require_same(self._torch, f"{NCCL}: {DISPATCH}", received[0], inputs.rows)

    def _dispatch_fp8(self, meter: Meter) -> None:
        inputs, torch = meter.inputs, self._torch
        assert inputs.fp8 is not None and inputs.fp8_rows is not None
        # Not every NCCL knows FP8.
        rows = inputs.fp8[0].view(torch.uint8)
        arrays = (rows, inputs.fp8[1], inputs.topk_idx, inputs.topk_weights)
        layout = self._work.layout(inputs.topk_idx)
        received, _ = meter.time(FP8_DISPATCH, lambda: self._work.dispatch(arrays, layout))
        expected = inputs.fp8_rows[0].view(torch.uint8)
        require_same(torch, f"{NCCL}: {FP8_DISPATCH}", received[0], expected)

    def _combine(self, meter: Meter) -> None:
        inputs = meter.inputs
        layout = self._work.layout(inputs.topk_idx)
        _, counts = self._work.dispatch((inputs.topk_idx,), layout)
        count = len(inputs.x)
        result = meter.time(
            COMBINE, lambda: self._work.combine(inputs.output, count, layout[0], counts)
        )
        require_close(self._torch, f"{NCCL}: {COMBINE}", result, inputs.sums)

    def _chain(self, meter: Meter) -> None:
        inputs = meter.inputs
        arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights)
        layout = self._work.layout(inputs.topk_idx)

        def pair() -> Any:
            received, counts = self._work.dispatch(arrays, layout)
            return self._work.combine(received[0], len(inputs.x), layout[0], counts)

        result = meter.time_chain(CHAINED, pair)
        require_close(self._torch, f"{NCCL}: {CHAINED}", result, inputs.echo)
