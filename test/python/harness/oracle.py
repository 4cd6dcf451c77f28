# SPDX-License-Identifier: MIT
"""What dispatch and combine return, to the bit, in a few lines of NumPy.

Everything is computed from the inputs of all ranks at once; nothing here knows of buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CANONICAL_NAN = {2: 0x7FFF, 4: 0x7FFFFFFF}


@dataclass(frozen=True)
class Placement:
    """`owner[e]` is the rank of expert e, `local[e]` its index there."""

    owner: np.ndarray
    local: np.ndarray

    def experts_of(self, rank: int) -> np.ndarray:
        return np.flatnonzero(self.owner == rank)


@dataclass(frozen=True)
class Layout:
    per_rank: np.ndarray
    per_expert: np.ndarray
    in_rank: np.ndarray


@dataclass(frozen=True)
class Sent:
    """What one rank gives to dispatch."""

    x: np.ndarray
    scales: np.ndarray | None
    topk_idx: np.ndarray | None
    topk_weights: np.ndarray | None
    layout: Layout


@dataclass(frozen=True)
class Route:
    """The source rank and token of each row that one rank receives, in order."""

    source: np.ndarray
    token: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def first(self, rows: int) -> Route:
        return Route(self.source[:rows], self.token[:rows])

    def gather(self, per_source: list[np.ndarray]) -> np.ndarray:
        """The rows of the route, taken from one array a source rank."""
        parts = [rows[self.token[self.source == rank]] for rank, rows in enumerate(per_source)]
        return np.concatenate(parts)


def place(num_experts: int, num_ranks: int, expert_map: np.ndarray | None = None) -> Placement:
    block = -(-num_experts // num_ranks)
    owner = np.arange(num_experts) // block if expert_map is None else np.asarray(expert_map)
    local = np.array([np.count_nonzero(owner[:e] == owner[e]) for e in range(num_experts)], int)
    return Placement(owner, local)


def layout(topk_idx: np.ndarray, num_ranks: int, placement: Placement) -> Layout:
    chosen = topk_idx >= 0
    in_rank = np.zeros((len(topk_idx), num_ranks), bool)
    in_rank[np.nonzero(chosen)[0], placement.owner[topk_idx[chosen]]] = True
    per_expert = np.bincount(topk_idx[chosen], minlength=len(placement.owner))
    return Layout(in_rank.sum(0, dtype=np.int32), per_expert.astype(np.int32), in_rank)


def route(in_rank: list[np.ndarray], rank: int) -> Route:
    tokens = [np.flatnonzero(mask[:, rank]) for mask in in_rank]
    source = np.repeat(np.arange(len(tokens)), [len(t) for t in tokens])
    return Route(source, np.concatenate(tokens))


def localise(topk_idx: np.ndarray, topk_weights: np.ndarray, rank: int, placement: Placement):
    """Global ids and their weights as `rank` sees them: −1 and 0 where it does not own them."""
    mine = (topk_idx >= 0) & (placement.owner[topk_idx] == rank)
    idx = np.where(mine, placement.local[topk_idx], -1).astype(topk_idx.dtype)
    return idx, np.where(mine, topk_weights, np.float32(0))


def counts_per_expert(sent: list[Sent], rank: int, placement: Placement) -> np.ndarray:
    return sum(s.layout.per_expert[placement.experts_of(rank)].astype(np.int64) for s in sent)


def round_up(counts: np.ndarray, alignment: int) -> list[int]:
    return [int(-(-count // alignment) * alignment) for count in counts]


def send_head(in_rank: np.ndarray) -> np.ndarray:
    """The ordinal of each token among those that go to a rank; −1 where it does not go."""
    return np.where(in_rank, np.cumsum(in_rank, axis=0) - 1, -1).astype(np.int32)


def rank_prefix_matrix(in_rank: list[np.ndarray], rank: int) -> np.ndarray:
    matrix = np.full((len(in_rank), len(in_rank)), -1, np.int32)
    matrix[:, rank] = np.cumsum([mask[:, rank].sum() for mask in in_rank])
    return matrix


def rounded(acc: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 to `dtype`, to nearest even; every NaN becomes the canonical one."""
    dtype = np.dtype(dtype)
    with np.errstate(all="ignore"):
        out = acc.astype(dtype)
    out.view(f"u{dtype.itemsize}")[np.isnan(acc)] = CANONICAL_NAN[dtype.itemsize]
    return out


def combine(
    outputs: list[np.ndarray],
    routes: list[Route],
    source: int,
    num_tokens: int,
    biases: tuple[np.ndarray, ...] = (),
) -> np.ndarray:
    """Sums, for each token of `source`, its rows of all ranks, in ascending order of rank."""
    first, second = [*(b.astype(np.float32) for b in biases), np.float32(0), np.float32(0)][:2]
    with np.errstate(all="ignore"):
        acc = np.empty((num_tokens, outputs[0].shape[1]), np.float32)
        acc[:] = first + second
        for rows, taken in zip(outputs, routes, strict=True):
            mine = taken.source == source
            acc[taken.token[mine]] += rows[: len(taken)][mine].astype(np.float32)
    return rounded(acc, outputs[0].dtype)
