# SPDX-License-Identifier: MIT
"""The same work by DeepEP: its `Buffer`, and its `ElasticBuffer`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mscclpp_ep.bench.gpu_calls import Layer, Meter
from mscclpp_ep.bench.gpu_checks import require_close, require_same_rows
from mscclpp_ep.bench.gpu_peers import DEEP_EP, DEEP_EP_V2
from mscclpp_ep.bench.ops import (
    CACHED_DISPATCH,
    CACHED_FP8_DISPATCH,
    CHAINED,
    COMBINE,
    DISPATCH,
    FP8_DISPATCH,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.gpu_clock import GpuClock
    from mscclpp_ep.bench.gpu_inputs import Inputs
    from mscclpp_ep.bench.gpu_measure import Attempts
    from mscclpp_ep.bench.gpu_settings import GpuSettings

_RING_BYTES = 2 << 30  # more than its own tests ask for


class DeepEp:
    """`deep_ep.Buffer`, with its tuned numbers for this many ranks."""

    name = DEEP_EP
    takes_sms = True

    def __init__(self, torch: Any, process_group: Any, settings: GpuSettings) -> None:
        self._torch = torch
        self._module: Any = importlib.import_module("deep_ep")
        self._buffer = self._module.Buffer(process_group, _RING_BYTES, 0)
        self._chained = settings.base.chain > 0

    def destroy(self) -> None:
        """Drops it."""
        self._buffer = None

    def measure(
        self, attempts: Attempts, clock: GpuClock, inputs: Inputs, sms: int, iterations: int
    ) -> None:
        """Times the operations and checks their results; collective."""
        meter = Meter(clock, inputs, DEEP_EP, sms, iterations)

        def layer() -> Layer:
            self._module.Buffer.set_num_sms(sms)
            return Layer(self._torch, self._buffer, None, meter, ordered=False)

        cases: dict[str, Callable[[], None]] = {
            DISPATCH: lambda: layer().dispatch(DISPATCH),
            CACHED_DISPATCH: lambda: layer().cached_dispatch(CACHED_DISPATCH),
            COMBINE: lambda: layer().combine_echo(COMBINE),
        }
        if inputs.fp8 is not None:
            cases |= {
                FP8_DISPATCH: lambda: layer().dispatch(FP8_DISPATCH, fp8=True),
                CACHED_FP8_DISPATCH: lambda: layer().cached_dispatch(CACHED_FP8_DISPATCH, fp8=True),
            }
        if self._chained:
            cases[CHAINED] = lambda: layer().chain(CHAINED)
        for op, case in cases.items():
            attempts.run(DEEP_EP, op, sms, case)


class Elastic:
    """`deep_ep.ElasticBuffer`; rows come in an order of its own."""

    name = DEEP_EP_V2
    takes_sms = True

    def __init__(self, torch: Any, process_group: Any, settings: GpuSettings) -> None:
        base = settings.base
        self._torch = torch
        self._experts = base.experts
        self._most = base.tokens
        self._buffer: Any = importlib.import_module("deep_ep").ElasticBuffer(
            process_group,
            num_max_tokens_per_rank=base.tokens,
            hidden=base.hidden,
            num_topk=base.topk,
        )

    def destroy(self) -> None:
        """Drops it."""
        self._buffer = None

    def measure(
        self, attempts: Attempts, clock: GpuClock, inputs: Inputs, sms: int, iterations: int
    ) -> None:
        """Times the operations and checks their results; collective."""
        meter = Meter(clock, inputs, DEEP_EP_V2, sms, iterations)
        cases: dict[str, Callable[[], None]] = {
            DISPATCH: lambda: self._dispatch(meter),
            COMBINE: lambda: self._combine(meter),
        }
        if inputs.fp8 is not None:
            cases[FP8_DISPATCH] = lambda: self._dispatch_fp8(meter)
        for op, case in cases.items():
            attempts.run(DEEP_EP_V2, op, sms, case)

    def _send(self, meter: Meter, x: Any) -> Any:
        return self._buffer.dispatch(
            x,
            topk_idx=meter.inputs.topk_idx,
            topk_weights=meter.inputs.topk_weights,
            num_experts=self._experts,
            num_max_tokens_per_rank=self._most,
            num_sms=meter.sms,
        )

    def _dispatch(self, meter: Meter) -> None:
        result = meter.time(DISPATCH, lambda: self._send(meter, meter.inputs.x))
        named = f"{DEEP_EP_V2}: {DISPATCH}"
        require_same_rows(self._torch, named, result[0], meter.inputs.rows)

    def _dispatch_fp8(self, meter: Meter) -> None:
        inputs = meter.inputs
        assert inputs.fp8_rows is not None
        result = meter.time(FP8_DISPATCH, lambda: self._send(meter, inputs.fp8))
        named = f"{DEEP_EP_V2}: {FP8_DISPATCH}"
        require_same_rows(self._torch, named, result[0][0], inputs.fp8_rows[0])

    def _combine(self, meter: Meter) -> None:
        recv_x, _, _, handle, _ = self._send(meter, meter.inputs.x)
        rows = recv_x.clone()
        result = meter.time(COMBINE, lambda: self._buffer.combine(rows, handle, num_sms=meter.sms))
        named = f"{DEEP_EP_V2}: {COMBINE}"
        require_close(self._torch, named, result[0], meter.inputs.echo)
