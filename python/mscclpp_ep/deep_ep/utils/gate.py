# SPDX-License-Identifier: MIT
"""Gates that send rank 0 more tokens than the other ranks."""

from __future__ import annotations

import functools

import torch

from mscclpp_ep._core import InvalidArgument
from mscclpp_ep.deep_ep.utils.math import ceil_div

# On how many tokens the weight of rank 0 is found, and in how many halvings of its range.
_SAMPLE_TOKENS = 2048
_HALVINGS = 24
_GREATEST_WEIGHT = 1e4


def get_unbalanced_scores(
    num_tokens: int,
    num_experts: int,
    num_ranks: int,
    num_topk: int,
    ratio: float,
    precise: bool,
) -> torch.Tensor:
    """Random scores with which rank 0 gets `ratio` times the tokens of any other rank.

    A token counts once for each rank that holds one of its `num_topk` experts of highest score.

    Args:
        num_tokens: T.
        num_experts: E, a multiple of `num_ranks`.
        num_ranks: R.
        num_topk: K.
        ratio: Tokens of rank 0 over those of another rank; at least 1.
        precise: Count tokens out to the ranks, so that the ratio is right but for rounding.
            Otherwise scores are independent of each other, those of rank 0 drawn from a better
            distribution, and the ratio is approximate, or the greatest that can be had so.

    Returns:
        float32 [T, E] between 0 and 1, on torch's default device.

    Raises:
        InvalidArgument: The numbers do not fit each other, or, if `precise`, no choice of experts
            has that ratio.
    """
    _check(num_experts, num_ranks, num_topk, ratio)
    if precise:
        return _precise_scores(num_tokens, num_experts, num_ranks, num_topk, ratio)
    weight = _weight_of_rank_0(num_experts, num_ranks, num_topk, ratio)
    noise = torch.rand(num_tokens, num_experts, dtype=torch.float32)
    return _weighted_scores(noise, num_ranks, weight)


def _check(num_experts: int, num_ranks: int, num_topk: int, ratio: float) -> None:
    if num_ranks < 1 or num_experts % num_ranks != 0:
        msg = f"num_ranks is {num_ranks}; it must divide the number of experts, {num_experts}"
        raise InvalidArgument(msg)
    if not 1 <= num_topk <= num_experts:
        msg = f"num_topk is {num_topk}; it must be from 1 to the number of experts, {num_experts}"
        raise InvalidArgument(msg)
    if not ratio >= 1:
        msg = f"ratio is {ratio}; it must be at least 1"
        raise InvalidArgument(msg)


def _precise_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float
) -> torch.Tensor:
    experts_per_rank = num_experts // num_ranks
    chosen = _choose_ranks(num_tokens, experts_per_rank, num_ranks, num_topk, ratio)
    # Three tiers: one expert of each chosen rank, so that all are reached; then the other experts
    # of chosen ranks, which suffice for the remaining choices; then the rest.
    tier = chosen.float().repeat_interleave(experts_per_rank, dim=1)
    first = torch.randint(experts_per_rank, (num_tokens, num_ranks))
    column = first + torch.arange(num_ranks) * experts_per_rank
    tier.scatter_add_(1, column, chosen.float())
    return (tier + torch.rand(num_tokens, num_experts, dtype=torch.float32)) / 3


def _choose_ranks(
    num_tokens: int, experts_per_rank: int, num_ranks: int, num_topk: int, ratio: float
) -> torch.Tensor:
    """Bool [T, R]: which ranks each token goes to, in numbers that have the ratio."""
    fewest = max(1, ceil_div(num_topk, experts_per_rank))
    most = min(num_topk, num_ranks, int((num_ranks - 1) / ratio) + 1)
    if fewest > most:
        msg = (
            f"no choice of {num_topk} experts, {experts_per_rank} a rank, of {num_ranks} ranks has "
            f"the ratio {ratio}: a token must go to {fewest} ranks at least and {most} at most"
        )
        raise InvalidArgument(msg)
    # As many ranks a token as a uniform gate would reach.
    usual = num_ranks * (1 - (1 - 1 / num_ranks) ** num_topk)
    total = round(num_tokens * min(max(usual, fewest), most))
    of_rank_0 = min(num_tokens, round(total * ratio / (ratio + num_ranks - 1)))
    counts = torch.full((num_ranks,), of_rank_0)
    if num_ranks > 1:
        share, rest = divmod(total - of_rank_0, num_ranks - 1)
        counts[1:] = share
        counts[1 + torch.randperm(num_ranks - 1)[:rest]] += 1
    return _deal(counts, num_tokens)


def _deal(counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Bool [T, R] with so many tokens in each column, and rows that differ by one at most."""
    num_ranks = len(counts)
    order = torch.randperm(num_ranks)
    dealt = order.repeat_interleave(counts[order])
    # Tokens in turn: no rank has more than there are tokens, so none meets a token twice.
    turn = torch.arange(len(dealt)) % max(num_tokens, 1)
    chosen = torch.zeros((num_tokens, num_ranks), dtype=torch.bool)
    chosen[torch.randperm(num_tokens)[turn], dealt] = True
    return chosen


def _weighted_scores(noise: torch.Tensor, num_ranks: int, weight: float) -> torch.Tensor:
    """Scores whose order is that of drawing experts one by one, those of rank 0 likelier."""
    scores = noise.clone()
    scores[:, : noise.shape[1] // num_ranks] **= 1 / weight
    return scores


@functools.cache
def _weight_of_rank_0(num_experts: int, num_ranks: int, num_topk: int, ratio: float) -> float:
    """How much likelier the experts of rank 0 must be, found on a sample."""
    if ratio == 1 or num_ranks == 1:
        return 1.0
    # Of a generator of its own, so that the program's own numbers do not depend on this cache.
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.rand(
        _SAMPLE_TOKENS, num_experts, generator=generator, dtype=torch.float32, device="cpu"
    )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = _measure(noise, num_ranks, num_topk, _GREATEST_WEIGHT**middle)
        low, high = (middle, high) if found < ratio else (low, middle)
    return float(_GREATEST_WEIGHT**high)


def _measure(noise: torch.Tensor, num_ranks: int, num_topk: int, weight: float) -> float:
    """Tokens of rank 0 over the mean of the other ranks."""
    tokens, experts = noise.shape
    scores = _weighted_scores(noise, num_ranks, weight)
    owners = scores.topk(num_topk, dim=1).indices // (experts // num_ranks)
    reached = torch.zeros((tokens, num_ranks), dtype=torch.bool, device="cpu")
    reached.scatter_(1, owners, value=True)
    per_rank = reached.sum(0)
    others = float(per_rank[1:].sum()) / (num_ranks - 1)
    return float(per_rank[0]) / max(others, 1.0)
