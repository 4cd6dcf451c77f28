# SPDX-License-Identifier: MIT
"""The same work by `mscclpp.ep`, whose communicator does bfloat16 rows by token."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from mscclpp_ep.bench.gpu_calls import Meter
from mscclpp_ep.bench.gpu_checks import require_close, require_same_rows
from mscclpp_ep.bench.gpu_peers import MSCCLPP
from mscclpp_ep.bench.ops import COMBINE, DISPATCH

if TYPE_CHECKING:
    from mscclpp_ep.bench.gpu_clock import GpuClock
    from mscclpp_ep.bench.gpu_inputs import Inputs
    from mscclpp_ep.bench.gpu_measure import Attempts
    from mscclpp_ep.bench.gpu_settings import GpuSettings


class Mscclpp:
    """`mscclpp.ep.MoECommunicator` in its mode for many tokens; one for each number of blocks."""

    name = MSCCLPP
    takes_sms = True

    def __init__(self, torch: Any, process_group: Any, settings: GpuSettings) -> None:
        self._torch = torch
        self._module: Any = importlib.import_module("mscclpp.ep")
        self._base = settings.base
        self._communicators: dict[int, Any] = {}
        mscclpp: Any = importlib.import_module("mscclpp")
        self._group = mscclpp.CommGroup(torch_group=process_group)

    def destroy(self) -> None:
        """Drops them."""
        self._communicators.clear()

    def measure(
        self, attempts: Attempts, clock: GpuClock, inputs: Inputs, sms: int, iterations: int
    ) -> None:
        """Times the operations and checks their results; collective."""
        meter = Meter(clock, inputs, MSCCLPP, sms, iterations)
        attempts.run(MSCCLPP, DISPATCH, sms, lambda: self._dispatch(meter))
        attempts.run(MSCCLPP, COMBINE, sms, lambda: self._combine(meter))

    def _communicator(self, sms: int) -> Any:
        if sms not in self._communicators:
            # The name of the mode and of the number of blocks differ between its versions.
            modes, config = self._module.MoEMode, self._module.MoECommunicatorConfig
            fields = {field.name for field in dataclasses.fields(config)}
            mode = modes.THROUGHPUT if hasattr(modes, "THROUGHPUT") else modes.OVERLAP
            blocks = "num_blocks" if "num_blocks" in fields else "num_sms"
            self._communicators[sms] = self._module.MoECommunicator(
                comm=self._group,
                num_experts=self._base.experts,
                hidden_size=self._base.hidden,
                topk=self._base.topk,
                max_tokens_per_rank=self._base.tokens,
                mode=mode,
                **{blocks: sms},
            )
        return self._communicators[sms]

    def _send(self, meter: Meter) -> Any:
        inputs = meter.inputs
        communicator = self._communicator(meter.sms)
        return communicator.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)

    # It wants dispatches and combines in turn: what is not timed comes before each that is.

    def _dispatch(self, meter: Meter) -> None:
        communicator = self._communicator(meter.sms)
        pending: list[Any] = []

        def finish() -> None:
            while pending:
                output, handle = pending.pop()
                communicator.combine(output.tokens, handle)

        def send() -> Any:
            pending.append(self._send(meter))
            output, handle = pending[-1]
            return output.tokens, handle  # by themselves, so that they are spoiled

        tokens, _ = meter.time(DISPATCH, send, before=finish)
        rows = tokens[: len(meter.inputs.rows)].clone()
        finish()
        require_same_rows(self._torch, f"{MSCCLPP}: {DISPATCH}", rows, meter.inputs.rows)

    def _combine(self, meter: Meter) -> None:
        communicator = self._communicator(meter.sms)
        sent: list[Any] = []

        def send() -> None:
            sent[:] = self._send(meter)

        result = meter.time(
            COMBINE, lambda: communicator.combine(sent[0].tokens, sent[1]), before=send
        )
        require_close(self._torch, f"{MSCCLPP}: {COMBINE}", result, meter.inputs.echo)
