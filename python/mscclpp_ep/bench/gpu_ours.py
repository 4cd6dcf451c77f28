# SPDX-License-Identifier: MIT
"""The library on a GPU, as its users call it from Torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import mscclpp_ep as ep
from mscclpp_ep.bench.checks import WrongResultError
from mscclpp_ep.bench.gpu_calls import Layer, Meter
from mscclpp_ep.bench.gpu_floor import push
from mscclpp_ep.bench.ht import fill, room_of_dispatch
from mscclpp_ep.bench.ops import (
    CACHED_CHAINED,
    CACHED_DISPATCH,
    CACHED_FP8_DISPATCH,
    CHAINED,
    COMBINE,
    COMBINE_ORDINARY,
    DISPATCH,
    FLOOR,
    FP8_DISPATCH,
    GRAPH_CHAINED,
    NO_BLOCK,
    OURS,
    WEIGHTED_COMBINE,
    WORST_DISPATCH,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.gpu_clock import GpuClock
    from mscclpp_ep.bench.gpu_inputs import Inputs
    from mscclpp_ep.bench.gpu_measure import Attempts
    from mscclpp_ep.bench.gpu_settings import GpuSettings

# A rank that does not come is noticed before others give up on the rest.
TIMEOUT_S = 30.0


class Ours:
    """Measures the library on one rank.

    Results find room in `_buffer`. The arena of `_full` is full of blocks that are held, as by a
    program that keeps the results of many layers.

    Attributes:
        pushes: seconds of plain copies, by multiprocessors.
    """

    name = OURS
    takes_sms = True

    def __init__(self, torch: Any, group: ep.Group, settings: GpuSettings, device: str) -> None:
        self.pushes: dict[int, list[float]] = {}
        self._torch = torch
        self._device = device
        self._group = group
        self._settings = settings
        self._held: list[Any] = []
        self._connect()

    def _connect(self) -> None:
        device = self._device
        room = room_of_dispatch(self._settings.base)
        self._buffer = ep.Buffer(self._group, device=device, timeout=TIMEOUT_S)
        self._full = ep.Buffer(self._group, device=device, timeout=TIMEOUT_S, max_arena_bytes=room)
        fill(self._full, self._held, room, self._torch.uint8)

    def _renew(self) -> None:
        """Goes on with other buffers, after an error that may have ended those; collective."""
        self._held.clear()
        for buffer in (self._buffer, self._full):
            with contextlib.suppress(ep.Error):
                buffer._core.leave()
        self._connect()

    def destroy(self) -> None:
        """Leaves the group; collective."""
        self._held.clear()
        self._buffer.destroy()
        self._full.destroy()

    def measure(
        self, attempts: Attempts, clock: GpuClock, inputs: Inputs, sms: int, iterations: int
    ) -> None:
        """Times the operations and checks their results; collective."""
        meter = Meter(clock, inputs, OURS, sms, iterations)
        for op, case in self._cases(meter).items():
            if not attempts.run(OURS, op, sms, case):
                self._renew()

    def measure_floor(self, attempts: Attempts, sms: int) -> None:
        """Times plain copies to the next rank; collective."""

        def copy() -> None:
            seconds = push(self._buffer._core, sms)
            self.pushes.setdefault(sms, []).extend(seconds)

        if not attempts.run(FLOOR, FLOOR, sms, copy):
            self._renew()

    def _layer(self, meter: Meter, buffer: ep.Buffer) -> Layer:
        return Layer(self._torch, buffer, ep.Config(meter.sms), meter, ordered=True)

    def _cases(self, meter: Meter) -> dict[str, Callable[[], None]]:
        def plain() -> Layer:
            return self._layer(meter, self._buffer)

        cases: dict[str, Callable[[], None]] = {
            DISPATCH: lambda: plain().dispatch(DISPATCH),
            CACHED_DISPATCH: lambda: plain().cached_dispatch(CACHED_DISPATCH),
            WORST_DISPATCH: lambda: plain().worst_dispatch(WORST_DISPATCH),
            NO_BLOCK: lambda: self._dispatch_without_block(meter),
            COMBINE: lambda: plain().combine(COMBINE, lambda: self._in_arena(meter)),
            COMBINE_ORDINARY: lambda: plain().combine(
                COMBINE_ORDINARY, lambda: self._torch.empty_like(meter.inputs.output)
            ),
            WEIGHTED_COMBINE: lambda: plain().combine(
                WEIGHTED_COMBINE, lambda: self._in_arena(meter), weighted=True
            ),
        }
        if meter.inputs.fp8 is not None:
            cases |= {
                FP8_DISPATCH: lambda: plain().dispatch(FP8_DISPATCH, fp8=True),
                CACHED_FP8_DISPATCH: lambda: plain().cached_dispatch(CACHED_FP8_DISPATCH, fp8=True),
            }
        if self._settings.base.chain:
            cases |= {
                CHAINED: lambda: plain().chain(CHAINED),
                CACHED_CHAINED: lambda: plain().chain(CACHED_CHAINED, cached=True),
                GRAPH_CHAINED: lambda: plain().graph(GRAPH_CHAINED),
            }
        return cases

    def _in_arena(self, meter: Meter) -> Any:
        output = meter.inputs.output
        return self._buffer.empty(output.shape, output.dtype)

    def _dispatch_without_block(self, meter: Meter) -> None:
        before = self._full.stats()
        landed, straight = before.landed_rows, before.straight_rows
        self._layer(meter, self._full).dispatch(NO_BLOCK)
        after = self._full.stats()
        if len(meter.inputs.rows) and (
            after.landed_rows == landed or after.straight_rows != straight
        ):
            msg = (
                f"{NO_BLOCK}: {after.straight_rows - straight} rows came straight, so that there "
                "was a block for some"
            )
            raise WrongResultError(msg)
