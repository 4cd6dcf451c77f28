# SPDX-License-Identifier: MIT
"""Cases as data, and the inputs of all ranks that a case and a seed stand for."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from harness import oracle

ROUTINGS = ("random", "holes", "none", "one_expert", "duplicates", "one_rank", "skewed")


@dataclass(frozen=True)
class Scales:
    dtype: str = "float32"
    columns: int = 2
    order: str = "rows"  # or "columns": column-major; "padded": every other column of a wider array


@dataclass(frozen=True)
class Case:
    """One dispatch and the combine that undoes it. Rank r has `tokens[r % len(tokens)]` tokens."""

    name: str = ""
    tokens: tuple[int, ...] = (16, 9, 21)
    hidden: int = 64
    experts: int = 8
    topk: int = 4
    index: str = "int64"
    dtype: str = "bfloat16"
    values: str = "normal"  # or "special", "bits"
    routing: str = "random"
    scales: Scales | None = None
    with_topk: bool = True
    extra_ranks: bool = False
    alignment: int = 1
    worst: str = ""
    shuffled_experts: bool = False
    combine_dtype: str = "bfloat16"
    bias: int = 0
    weights: bool = True
    source: str = "ordinary"  # where combine's rows are: "ordinary", "arena", "mixed", "received"

    def __str__(self) -> str:
        return self.name or "case"

    def but(self, **changes) -> Case:
        return replace(self, **changes)


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def is_summable(dtype: np.dtype) -> bool:
    return dtype in (dtype_of("bfloat16"), np.dtype("float16"), np.dtype("float32"))


# Zeros, infinities, the ends of the denormals and of the normals, values half-way between two
# neighbours of bfloat16, and NaNs of either sign, quiet and signalling, with payloads.
SPECIAL_FLOAT32 = np.array(
    [
        *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x00000001, 0x80000001),
        *(0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000),
        *(0x3F808000, 0x3F818000, 0x3F807FFF, 0x00008000, 0x00018000, 0x7F7F8000),
        *(0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFABCDEF, 0x7FFFFFFF, 0x33800000),
    ],
    np.uint32,
)
SPECIAL_16 = np.array(
    [
        *(0x0000, 0x8000, 0x7F80, 0xFF80, 0x7C00, 0xFC00, 0x0001, 0x8001, 0x007F, 0x0080, 0x7F7F),
        *(0xFF7F, 0x3F80, 0xBF80, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x3C01, 0x7FC0, 0x7E00),
        *(0x7F81, 0x7C01, 0xFFFF, 0xFE12),
    ],
    np.uint16,
)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    *outer, last = shape
    raw = rng.integers(0, 256, (*outer, last * dtype.itemsize), dtype=np.uint8)
    return raw.view(dtype)


# For each type the bits that stay random, which are the sign, the mantissa and the last three of
# the exponent; and what its other bits become.
NORMAL = {
    "bfloat16": (0x83FF, 0x3C00),
    "float16": (0x9FFF, 0x2000),
    "float32": (0x83FFFFFF, 0x3C000000),
}


def normal(raw: np.ndarray) -> np.ndarray:
    """Changes random bits to numbers between 2^-7 and 2 in magnitude, as many in each octave."""
    bits = raw.view(f"u{raw.itemsize}")
    kept, exponent = NORMAL[raw.dtype.name]
    bits &= kept
    bits |= exponent
    return raw


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, values: str):
    if not is_summable(dtype) or values == "bits":
        return random_bits(rng, shape, dtype)
    if values == "special":
        table = SPECIAL_FLOAT32 if dtype.itemsize == 4 else SPECIAL_16
        return rng.choice(table, shape).view(dtype)
    return normal(random_bits(rng, shape, dtype))


def draw_scales(rng: np.random.Generator, tokens: int, scales: Scales) -> np.ndarray:
    dtype = dtype_of(scales.dtype)
    if scales.order == "padded":
        return random_bits(rng, (tokens, 2 * scales.columns), dtype)[:, ::2]
    if scales.order == "columns":
        return random_bits(rng, (scales.columns, tokens), dtype).T
    return random_bits(rng, (tokens, scales.columns), dtype)


def draw_topk(rng: np.random.Generator, tokens: int, case: Case, num_ranks: int) -> np.ndarray:
    shape, experts = (tokens, case.topk), case.experts
    if case.routing == "none":
        idx = np.full(shape, -1)
    elif case.routing == "one_expert":
        idx = np.full(shape, -1)
        idx[:, case.topk // 2] = experts - 1
    elif case.routing == "duplicates":
        idx = rng.integers(-1, min(experts, 3), shape)
    elif case.routing == "one_rank":
        idx = rng.integers(0, -(-experts // num_ranks), shape)
    elif case.routing == "skewed":
        idx = np.minimum(rng.geometric(0.4, shape) - 1, experts - 1)
    else:
        idx = draw_distinct(rng, tokens, case)
        idx[rng.random(shape) < (0.3 if case.routing == "holes" else 0)] = -1
    return idx.astype(case.index)


def draw_distinct(rng: np.random.Generator, tokens: int, case: Case) -> np.ndarray:
    """A router's choice: distinct experts; −1 for choices beyond the number of experts."""
    padded = np.full((tokens, max(case.experts, case.topk)), -1)
    padded[:, : case.experts] = np.argsort(rng.random((tokens, case.experts)), axis=1)
    return rng.permuted(padded[:, : case.topk], axis=1)


def routed(topk_idx: np.ndarray, case: Case, num_ranks: int, placement, rng) -> oracle.Layout:
    """The layout of `topk_idx`; with `extra_ranks` tokens also go where they have no expert."""
    layout = oracle.layout(topk_idx, num_ranks, placement)
    if not case.extra_ranks:
        return layout
    in_rank = layout.in_rank | (rng.random(layout.in_rank.shape) < 0.3)
    return oracle.Layout(in_rank.sum(0, dtype=np.int32), layout.per_expert, in_rank)


class World:
    """The inputs of every rank for a case, and what every rank must get."""

    def __init__(self, case: Case, seed: int, size: int) -> None:
        self.case, self.seed, self.size = case, seed, size
        self.payloads = functools.lru_cache(2)(self._payloads)
        self.outputs = functools.lru_cache(2)(self._outputs)
        self.output_weights = functools.lru_cache(2)(self._output_weights)
        self.expert_map = None
        if case.shuffled_experts:
            rng = np.random.default_rng((seed, 1000))
            self.expert_map = rng.integers(0, size, case.experts, dtype=np.int32)
        self.placement = oracle.place(case.experts, size, self.expert_map)
        self.sent = [self._sent(rank) for rank in range(size)]
        masks = [s.layout.in_rank for s in self.sent]
        self.full_routes = [oracle.route(masks, rank) for rank in range(size)]
        self.num_worst = self._num_worst(max(len(r) for r in self.full_routes))
        self.routes = [r.first(self.num_worst or len(r)) for r in self.full_routes]

    def num_tokens(self, rank: int) -> int:
        return self.case.tokens[rank % len(self.case.tokens)]

    @property
    def capacity(self) -> int:
        """Rows that a rank receives at most."""
        return sum(self.num_tokens(rank) for rank in range(self.size))

    def num_rows(self, rank: int) -> int:
        """Rows of the outputs of `rank`, those that nothing arrives in included."""
        return self.num_worst or len(self.routes[rank])

    def _num_worst(self, most: int) -> int:
        sizes = {"": 0, "exact": most, "room": self.capacity + 5, "short": most // 2, "one": 1}
        return max(sizes[self.case.worst], 1) if self.case.worst else 0

    def _rng(self, rank: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, rank, *purpose))

    def _sent(self, rank: int) -> oracle.Sent:
        case, rng, tokens = self.case, self._rng(rank, 0), self.num_tokens(rank)
        idx = draw_topk(rng, tokens, case, self.size)
        weights = draw(rng, idx.shape, np.dtype(np.float32), case.values)
        layout = routed(idx, case, self.size, self.placement, rng)
        x, scales = self._payload(rank, 0)
        if not case.with_topk:
            return oracle.Sent(x, scales, None, None, layout)
        return oracle.Sent(x, scales, idx, weights, layout)

    def _payload(self, rank: int, turn: int) -> tuple[np.ndarray, np.ndarray | None]:
        case, rng, tokens = self.case, self._rng(rank, 1, turn), self.num_tokens(rank)
        x = draw(rng, (tokens, case.hidden), dtype_of(case.dtype), case.values)
        return x, draw_scales(rng, tokens, case.scales) if case.scales else None

    def _payloads(self, turn: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """What each rank sends; turn 0 is the dispatch that made the handle, later ones repeat."""
        return [self._payload(rank, turn) for rank in range(self.size)]

    def received(self, rank: int, turn: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows, and scales, that `rank` gets."""
        xs, scales = zip(*self.payloads(turn), strict=True)
        route = self.routes[rank]
        return route.gather(xs), route.gather(scales) if self.case.scales else None

    def received_topk(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        route = self.routes[rank]
        idx = route.gather([s.topk_idx for s in self.sent])
        weights = route.gather([s.topk_weights for s in self.sent])
        return oracle.localise(idx, weights, rank, self.placement)

    def counts(self, rank: int) -> np.ndarray:
        return oracle.counts_per_expert(self.sent, rank, self.placement)

    def _outputs(self, turn: int = 0) -> list[np.ndarray]:
        """Rows that the experts of each rank make; those beyond the received ones are garbage."""
        if self.case.source == "received":
            return [self.received(rank)[0] for rank in range(self.size)]
        dtype, values = dtype_of(self.case.combine_dtype), self.case.values
        shapes = [(self.num_rows(rank), self.case.hidden) for rank in range(self.size)]
        return [draw(self._rng(r, 2, turn), s, dtype, values) for r, s in enumerate(shapes)]

    def _output_weights(self, turn: int = 0) -> list[np.ndarray]:
        shapes = [(self.num_rows(rank), self.case.topk) for rank in range(self.size)]
        dtype = np.dtype(np.float32)
        rngs = [self._rng(rank, 3, turn) for rank in range(self.size)]
        return [draw(g, s, dtype, self.case.values) for g, s in zip(rngs, shapes, strict=True)]

    def biases(self, rank: int, turn: int = 0) -> tuple[np.ndarray, ...]:
        shape, rng = (self.num_tokens(rank), self.case.hidden), self._rng(rank, 4, turn)
        dtype = dtype_of(self.case.combine_dtype)
        return tuple(draw(rng, shape, dtype, self.case.values) for _ in range(self.case.bias))

    def combined(self, rank: int, turn: int = 0) -> np.ndarray:
        tokens, biases = self.num_tokens(rank), self.biases(rank, turn)
        return oracle.combine(self.outputs(turn), self.routes, rank, tokens, biases)

    def combined_weights(self, rank: int, turn: int = 0) -> np.ndarray:
        tokens = self.num_tokens(rank)
        return oracle.combine(self.output_weights(turn), self.routes, rank, tokens)


_lock = threading.Lock()


@functools.lru_cache(maxsize=64)
def _make_world(case: Case, seed: int, size: int) -> World:
    return World(case, seed, size)


def world_of(case: Case, seed: int, size: int) -> World:
    """The world of a case; threads of one process share it."""
    with _lock:
        return _make_world(case, seed, size)
