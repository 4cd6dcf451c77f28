# SPDX-License-Identifier: MIT
"""The HT mode of the library, as its users call it, with NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import mscclpp_ep as ep
from mscclpp_ep.bench.checks import Bits, WrongResultError, require_equal
from mscclpp_ep.bench.ops import (
    CHAINED,
    COLD_COMBINE,
    COLD_DISPATCH,
    COMBINE,
    COMBINE_ORDINARY,
    DISPATCH,
    LAYOUT,
    NO_BLOCK,
    OURS,
    SEALED_COMBINE,
    SEALED_DISPATCH,
)
from mscclpp_ep.bench.settings import BFLOAT16

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.cases import Case
    from mscclpp_ep.bench.clock import Clock
    from mscclpp_ep.bench.settings import Settings

_SMALLEST_BLOCK = 256
_TIMEOUT_S = 60.0


class _Turn:
    """The calls of one layer on one set of inputs, timed and checked."""

    def __init__(self, clock: Clock, case: Case, iterations: int) -> None:
        self._clock = clock
        self._case = case
        self.iterations = iterations
        self.warmup = case.settings.warmup
        self.x = case.tokens_of(case.rank).view(BFLOAT16)
        self.topk_idx = case.choices_of(case.rank)
        self.topk_weights = case.weights_of(case.rank)
        self.output = case.expert_output_of(case.rank).view(BFLOAT16)
        self.rows = case.expected_rows()
        self.sums = case.expected_sums()
        self.layout: tuple[Any, ...] = ()

    def _measure(self, op: str, call: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        key = (self._case.tokens, OURS, op)
        return self._clock.measure(key, call, self.iterations, self.warmup)

    def count_tokens(self, buffer: ep.Buffer) -> None:
        """Makes what the dispatches need."""
        experts = self._case.settings.experts
        self.layout = self._measure(
            LAYOUT, lambda: buffer.get_dispatch_layout(self.topk_idx, experts)
        )

    def _dispatch(self, buffer: ep.Buffer) -> tuple[Any, ...]:
        per_rank, _, per_expert, in_rank, _ = self.layout
        return buffer.dispatch(
            self.x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
        )

    def dispatch(self, op: str, buffer: ep.Buffer) -> Any:
        """Sends tokens, choices and weights; returns the handle."""
        result = self._measure(op, lambda: self._dispatch(buffer))
        _check_dispatch(op, result, self.rows, self._case)
        return result[4]

    def combine(self, op: str, buffer: ep.Buffer, x: Any, handle: Any) -> None:
        """Sums what the experts made of the tokens."""
        combined, _, _ = self._measure(op, lambda: buffer.combine(x, handle))
        require_equal(f"{OURS}: {op}", combined.view(np.uint16), self.sums)

    def chain(self, buffer: ep.Buffer) -> None:
        """Dispatches and combines what came, again and again."""

        def pair() -> Any:
            recv_x, _, _, _, handle, _ = self._dispatch(buffer)
            return buffer.combine(recv_x, handle)[0]

        combined = self._clock.measure_chain((self._case.tokens, OURS, CHAINED), pair)
        require_equal(f"{OURS}: {CHAINED}", combined.view(np.uint16), self._case.expected_echo())


class HighThroughput:
    """Measures the library on one rank.

    Results find room in `_buffer`. The arena of `_full` is full of blocks that are held, as by a
    program that keeps the results of many layers.
    """

    def __init__(self, group: ep.Group, clock: Clock, settings: Settings) -> None:
        self._group = group
        self._clock = clock
        self._threads = settings.threads
        self._buffer = self._make(0)
        room = room_of_dispatch(settings)
        self._full = self._make(room)
        self._sealed = self._make(0, integrity_check=True)
        self._held: list[Any] = []
        fill(self._full, self._held, room, np.uint8)

    def _make(self, max_arena_bytes: int, *, integrity_check: bool = False) -> ep.Buffer:
        return ep.Buffer(
            self._group,
            device="cpu",
            timeout=_TIMEOUT_S,
            max_arena_bytes=max_arena_bytes,
            num_threads=self._threads,
            integrity_check=integrity_check,
        )

    def destroy(self) -> None:
        """Leaves the group; collective."""
        self._buffer.destroy()
        self._full.destroy()
        self._sealed.destroy()

    def measure(self, case: Case, iterations: int, thorough: bool) -> None:
        """Times a layer, and checks its results.

        `thorough`: not only what is compared between sizes.
        """
        turn = _Turn(self._clock, case, iterations)
        turn.count_tokens(self._buffer)
        handle = turn.dispatch(DISPATCH, self._buffer)
        turn.combine(COMBINE, self._buffer, _in_arena(self._buffer, turn.output), handle)
        if not thorough:
            return
        turn.combine(COMBINE_ORDINARY, self._buffer, turn.output, handle)
        if case.settings.chain:
            turn.chain(self._buffer)
        self._measure_no_block(turn)
        self._measure_sealed(turn)
        self._measure_cold(turn)

    def _measure_sealed(self, turn: _Turn) -> None:
        handle = turn.dispatch(SEALED_DISPATCH, self._sealed)
        turn.combine(SEALED_COMBINE, self._sealed, _in_arena(self._sealed, turn.output), handle)

    def _measure_no_block(self, turn: _Turn) -> None:
        # The first call makes the landing block and the ordinary memory that results are copied
        # to; it is not among those timed.
        before = self._full.stats().landed_rows
        turn.dispatch(NO_BLOCK, self._full)
        landed = self._full.stats().landed_rows - before
        if landed != len(turn.rows) * (turn.iterations + turn.warmup):
            msg = f"{NO_BLOCK}: {landed} rows landed, so that there was a block for some"
            raise WrongResultError(msg)

    def _measure_cold(self, turn: _Turn) -> None:
        fresh = self._make(0)
        turn.iterations, turn.warmup = 1, 0
        handle = turn.dispatch(COLD_DISPATCH, fresh)
        turn.combine(COLD_COMBINE, fresh, turn.output, handle)
        fresh.destroy()


def _in_arena(buffer: ep.Buffer, rows: Any) -> Any:
    copy = buffer.empty(rows.shape, BFLOAT16)
    copy[:] = rows
    return copy


def room_of_dispatch(settings: Settings) -> int:
    """Bytes of the arena that are enough for what one dispatch receives."""
    row_bytes = settings.row_bytes + settings.topk * (8 + 4) + 4
    return settings.ranks * settings.tokens * row_bytes + (1 << 16)


def fill(buffer: ep.Buffer, held: list[Any], size: int, dtype: Any) -> None:
    """Takes all blocks of the arena, from large ones to small ones, as bytes of `dtype`."""
    while size >= _SMALLEST_BLOCK:
        before = buffer.stats().held_bytes
        block = buffer.empty([size], dtype)
        if buffer.stats().held_bytes > before:
            held.append(block)
        else:
            size //= 2


def _check_dispatch(op: str, result: tuple[Any, ...], rows: Bits, case: Case) -> None:
    recv_x, recv_idx, recv_weights, counts, _, _ = result
    require_equal(f"{OURS}: {op}", recv_x.view(np.uint16), rows)
    if len(recv_idx) != len(rows) or len(recv_weights) != len(rows):
        msg = f"{op}: {len(recv_idx)} indices and {len(recv_weights)} weights, {len(rows)} rows"
        raise WrongResultError(msg)
    choices, weights = case.expected_choices()
    same = (
        np.array_equal(recv_idx, choices)
        and np.array_equal(recv_weights, weights)
        and sum(counts) == int((choices >= 0).sum())
    )
    if not same:
        msg = f"{op}: the choices or weights received are wrong"
        raise WrongResultError(msg)
