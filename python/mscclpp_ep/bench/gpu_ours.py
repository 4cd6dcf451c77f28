# SPDX-License-Identifier: MIT
"""The library on a GPU, as its users call it from Torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import mscclpp_ep as ep
from mscclpp_ep.bench.checks import WrongResultError
from mscclpp_ep.bench.gpu_calls import Layer, Meter
from mscclpp_ep.bench.gpu_floor import push
from mscclpp_ep.bench.gpu_gate import Gate
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
    from collections.abc import Callable, Iterator

    from mscclpp_ep.bench.gpu_clock import GpuClock
    from mscclpp_ep.bench.gpu_inputs import Inputs
    from mscclpp_ep.bench.gpu_measure import Attempts
    from mscclpp_ep.bench.gpu_settings import GpuSettings

# A rank that does not come is noticed before others give up on the rest.
TIMEOUT_S = 30.0


class Ours:
    """Measures the library on one rank.

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
        self._connect()

    def _connect(self) -> None:
        self._buffer = ep.Buffer(self._group, device=self._device, timeout=TIMEOUT_S)
        self._gate = Gate(self._torch, self._buffer)

    def gate(self) -> None:
        """Lets the GPUs go on together; collective."""
        self._gate()

    def renew(self) -> None:
        """Goes on with another buffer, after an error that may have ended it; collective."""
        with contextlib.suppress(ep.Error):
            self._buffer._core.leave()
        self._connect()

    def destroy(self) -> None:
        """Leaves the group; collective."""
        self._buffer.destroy()

    def measure(
        self, attempts: Attempts, clock: GpuClock, inputs: Inputs, sms: int, iterations: int
    ) -> None:
        """Times the operations and checks their results; collective."""
        meter = Meter(clock, inputs, OURS, sms, iterations)
        for op, case in self._cases(meter).items():
            attempts.run(OURS, op, sms, case)

    def measure_floor(self, attempts: Attempts, sms: int) -> None:
        """Times plain copies to the next rank; collective."""

        def copy() -> None:
            seconds = push(self._buffer._core, sms)
            self.pushes.setdefault(sms, []).extend(seconds)

        attempts.run(FLOOR, FLOOR, sms, copy)

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

    @contextlib.contextmanager
    def _full(self) -> Iterator[ep.Buffer]:
        """A buffer whose arena is full of blocks that are held, as the results of many layers.

        Only while it is measured: the buffers of a GPU share its multiprocessors.
        """
        room = room_of_dispatch(self._settings.base)
        held: list[Any] = []
        full = ep.Buffer(self._group, device=self._device, timeout=TIMEOUT_S, max_arena_bytes=room)
        try:
            fill(full, held, room, self._torch.uint8)
            yield full
        except BaseException:
            with contextlib.suppress(ep.Error):
                full._core.leave()
            raise
        held.clear()
        full.destroy()

    def _dispatch_without_block(self, meter: Meter) -> None:
        with self._full() as full:
            self._measure_without_block(meter, full)

    def _measure_without_block(self, meter: Meter, full: ep.Buffer) -> None:
        before = full.stats()
        landed, straight = before.landed_rows, before.straight_rows
        self._layer(meter, full).dispatch(NO_BLOCK)
        after = full.stats()
        if len(meter.inputs.rows) and (
            after.landed_rows == landed or after.straight_rows != straight
        ):
            msg = (
                f"{NO_BLOCK}: {after.straight_rows - straight} rows came straight, so that there "
                "was a block for some"
            )
            raise WrongResultError(msg)
