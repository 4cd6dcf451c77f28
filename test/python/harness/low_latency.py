# SPDX-License-Identifier: MIT
"""Low-latency cases as data, their inputs on all ranks, the calls, and the comparison."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness import low_latency_oracle as oracle
from harness.cases import draw, draw_topk, dtype_of
from harness.oracle import place
from harness.steps import same_bits, wait

KINDS = ("none", "fp8", "rounded", "ue8m0")
GARBAGE = 0xA5


@dataclass(frozen=True)
class Case:
    """A dispatch and a combine. Rank r has `tokens[r % len(tokens)]` tokens, M is `room` more."""

    name: str = ""
    tokens: tuple[int, ...] = (12, 7, 15)
    room: int = 3
    hidden: int = 64
    experts: int = 8
    topk: int = 4
    index: str = "int64"
    dtype: str = "bfloat16"
    values: str = "normal"  # or "special", "bits", "groups"
    routing: str = "random"
    kind: str = "none"
    shuffled_experts: bool = False
    combine_dtype: str = "bfloat16"
    early_weights: bool = False  # are given to dispatch
    exact: bool = False

    def __str__(self) -> str:
        return self.name or "case"

    def but(self, **changes) -> Case:
        return replace(self, **changes)


def draw_groups(rng: np.random.Generator, tokens: int, hidden: int) -> np.ndarray:
    """bfloat16 in groups unlike each other: tiny, huge, zero, denormal, with NaN or infinity."""
    groups = -(-hidden // oracle.GROUP)
    size = np.ldexp(1.0, rng.integers(-150, 120, (tokens, groups, 1)))
    size[rng.random(size.shape) < 0.4] = 1
    x = (rng.standard_normal((tokens, groups, oracle.GROUP)) * size).astype(np.float32)
    kind = rng.integers(0, 8, (tokens, groups))
    x[kind == 0] = 0
    x[kind == 1] = (x[kind == 1] % 1) * np.float32(2.0**-127)
    for value, chosen in ((np.nan, 2), (np.inf, 3), (-np.inf, 4)):
        x[(kind == chosen)[..., None] & (rng.random(x.shape) < 0.02)] = value
    # Quotients half-way between two values of e4m3, if the scale is a power of two.
    x[kind == 5] = np.rint(x[kind == 5] * 32).clip(-448, 448)
    rows = x.reshape(tokens, groups * oracle.GROUP)
    return oracle.narrowed(rows[:, :hidden].copy(), oracle.BFLOAT16)


class World:
    """The inputs of every rank for a case, and what every rank must get."""

    def __init__(self, case: Case, seed: int, size: int) -> None:
        self.case, self.seed, self.size = case, seed, size
        self.expert_map = None
        if case.shuffled_experts:
            rng = self._rng(1000)
            self.expert_map = rng.integers(0, size, case.experts, dtype=np.int32)
        self.placement = place(case.experts, size, self.expert_map)
        self.topk_idx = [self._topk_idx(rank) for rank in range(size)]
        self.topk_weights = [
            draw(self._rng(rank, 1), idx.shape, np.dtype(np.float32), self._plain(case.values))
            for rank, idx in enumerate(self.topk_idx)
        ]
        self.slots = oracle.Slots(self.topk_idx, self.placement)
        self.sent = functools.lru_cache(2)(self._sent)
        self.rows = functools.lru_cache(2)(self._rows)

    def num_tokens(self, rank: int) -> int:
        return self.case.tokens[rank % len(self.case.tokens)]

    @property
    def most(self) -> int:
        """M, the same on every rank."""
        return max(1, *map(self.num_tokens, range(self.size))) + self.case.room

    def num_experts(self, rank: int) -> int:
        return len(self.placement.experts_of(rank))

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, 77, *purpose))

    @staticmethod
    def _plain(values: str) -> str:
        return "normal" if values == "groups" else values

    def _topk_idx(self, rank: int) -> np.ndarray:
        return draw_topk(self._rng(rank, 0), self.num_tokens(rank), self.case, self.size)

    def x(self, rank: int, turn: int = 0) -> np.ndarray:
        case, rng, shape = self.case, self._rng(rank, 2, turn), (self.num_tokens(rank),)
        if case.values == "groups":
            return draw_groups(rng, *shape, case.hidden)
        return draw(rng, (*shape, case.hidden), dtype_of(case.dtype), case.values)

    def _sent(self, turn: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Rows and scales of each rank's tokens, as they arrive."""
        xs = [self.x(rank, turn) for rank in range(self.size)]
        if self.case.kind == "none":
            return [(x, None) for x in xs]
        return [oracle.quantised(x, self.case.kind) for x in xs]

    def _rows(self, turn: int) -> list[np.ndarray]:
        """What the experts of each rank make; the rows beyond the counts are NaN."""
        return [self._rows_of(rank, turn) for rank in range(self.size)]

    def _rows_of(self, rank: int, turn: int) -> np.ndarray:
        dtype, values = dtype_of(self.case.combine_dtype), self._plain(self.case.values)
        shape = (self.num_experts(rank), self.size * self.most, self.case.hidden)
        rows = np.full(shape, -1, f"i{dtype.itemsize}").view(dtype)
        rng = self._rng(rank, 3, turn)
        for own, count in zip(rows, self.slots.counts(rank), strict=True):
            own[:count] = draw(rng, (count, self.case.hidden), dtype, values)
        return rows

    def combined(self, rank: int, turn: int = 0, exact: bool | None = None) -> np.ndarray:
        exact = self.case.exact if exact is None else exact
        idx, weights = self.topk_idx[rank], self.topk_weights[rank]
        return oracle.combined(self.slots, rank, idx, weights, self.rows(turn), exact)


_lock = threading.Lock()


@functools.lru_cache(maxsize=64)
def _make_world(case: Case, seed: int, size: int) -> World:
    return World(case, seed, size)


def world_of(case: Case, seed: int, size: int) -> World:
    """The world of a case; threads of one process share it."""
    with _lock:
        return _make_world(case, seed, size)


@dataclass
class Dispatched:
    """What a dispatch returned."""

    x: Any
    scales: Any
    count: Any
    handle: Any
    event: Any
    hook: Any


def dispatch_arguments(context, world: World, turn: int = 0) -> dict:
    array, case, rank = context.backend.array, world.case, context.rank
    arguments = {
        "x": array(world.x(rank, turn)),
        "topk_idx": array(world.topk_idx[rank]),
        "num_max_dispatch_tokens_per_rank": world.most,
        "num_experts": case.experts,
        "use_fp8": case.kind != "none",
        "round_scale": case.kind in ("rounded", "ue8m0"),
        "use_ue8m0": case.kind == "ue8m0",
    }
    if case.early_weights:
        arguments["topk_weights"] = array(world.topk_weights[rank])
    return arguments


def unpack(returned: tuple) -> Dispatched:
    x, *rest = returned
    return Dispatched(*(x if isinstance(x, tuple) else (x, None)), *rest)


def dispatch(context, buffer, world: World, turn: int = 0, **extra) -> Dispatched:
    arguments = dispatch_arguments(context, world, turn) | extra
    return unpack(buffer.low_latency_dispatch(**arguments))


def verify_dispatch(context, world: World, result: Dispatched, turn: int = 0) -> None:
    wait(result.event)
    verify_counts(context, world, result)
    verify_handle(context, world, result)
    verify_rows(context, world, result, turn)


def verify_counts(context, world: World, result: Dispatched) -> None:
    counts = world.slots.counts(context.rank)
    same_bits(context.backend.host(result.count), counts, "recv_count")


def verify_handle(context, world: World, result: Dispatched) -> None:
    host, rank, handle = context.backend.host, context.rank, result.handle
    assert isinstance(handle, tuple)
    sources, ranges, *sizes = handle
    assert sizes == [world.most, world.case.hidden, world.case.experts]
    same_bits(host(ranges), world.slots.ranges(rank), "packed_recv_layout_range")
    sources = host(sources)
    assert sources.dtype == np.int32
    assert sources.shape == (world.num_experts(rank), world.size * world.most)
    for local, expert in enumerate(world.placement.experts_of(rank)):
        expected = world.slots.sources(expert)
        same_bits(sources[local, : len(expected)], expected, f"packed_recv_src_info[{local}]")


def verify_rows(context, world: World, result: Dispatched, turn: int = 0) -> None:
    host, rank, case = context.backend.host, context.rank, world.case
    rows, scales = zip(*world.sent(turn), strict=True)
    x = host(result.x)
    assert x.shape == (world.num_experts(rank), world.size * world.most, case.hidden)
    assert x.dtype == rows[0].dtype
    assert x.flags.c_contiguous
    assert (result.scales is None) == (case.kind == "none")
    if result.scales is not None:
        got = host(result.scales)
        assert got.shape == (*x.shape[:2], scales[0].shape[1])
        assert got.transpose(0, 2, 1).flags.c_contiguous
    for local, expert in enumerate(world.placement.experts_of(rank)):
        expected = world.slots.gather(expert, rows)
        same_bits(x[local, : len(expected)], expected, f"recv_x[{local}]")
        if result.scales is not None:
            expected = world.slots.gather(expert, scales)
            same_bits(got[local, : len(expected)], expected, f"scales[{local}]")


def combine_arguments(context, world: World, handle, turn: int = 0) -> dict:
    array, rank = context.backend.array, context.rank
    return {
        "x": array(world.rows(turn)[rank]),
        "topk_idx": array(world.topk_idx[rank]),
        "topk_weights": array(world.topk_weights[rank]),
        "handle": handle,
        "exact": world.case.exact,
    }


def combine(context, buffer, world: World, handle, turn: int = 0, **extra) -> tuple:
    arguments = combine_arguments(context, world, handle, turn) | extra
    return buffer.low_latency_combine(**arguments)


def verify_combine(context, world: World, returned: tuple, turn: int = 0, **extra) -> None:
    x, event, _ = returned
    wait(event)
    same_bits(context.backend.host(x), world.combined(context.rank, turn, **extra), "combined x")


def round_trip(context, buffer, case: Case, seed: int, turn: int = 0) -> None:
    """Dispatch and combine of a case, both compared with the oracle."""
    world = world_of(case, seed, context.size)
    result = dispatch(context, buffer, world, turn)
    verify_dispatch(context, world, result, turn)
    returned = combine(context, buffer, world, result.handle, turn)
    verify_combine(context, world, returned, turn)


def poison(context, *tensors) -> None:
    """Overwrites results, whose memory the next ones are made of."""
    for tensor in tensors:
        if tensor is not None:
            context.backend.host(tensor).view(np.uint8)[...] = GARBAGE


def poison_dispatch(context, result: Dispatched) -> None:
    scales = result.scales if result.scales is None else result.scales.transpose(0, 2, 1)
    poison(context, result.x, scales, result.count, *result.handle[:2])
