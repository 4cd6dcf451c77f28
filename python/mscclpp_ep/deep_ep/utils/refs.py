# SPDX-License-Identifier: MIT
"""What dispatch and combine must give, by plain collectives of the default process group."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from mscclpp_ep._core import InvalidArgument
from mscclpp_ep.deep_ep.utils.envs import get_global_seed

_PRIME = 131071


def dispatch(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_max_tokens_per_rank: int,
    num_experts: int,
) -> tuple[
    torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
]:
    """Sends each token to the ranks that hold its experts, once a rank. Collective.

    Args:
        x: [T, H], or a pair of it and scales [T, S].
        topk_idx: Integers [T, K], -1 for none.
        topk_weights: float32 [T, K] or None.
        num_max_tokens_per_rank: M; no rank has more tokens.
        num_experts: E, a multiple of the number of ranks R.

    Returns:
        Rows [N, H] in order of (source rank, source token), or a pair of them and their scales;
        `topk_idx` [N, K] with local ids, -1 for experts elsewhere; the weights [N, K], 0 there, or
        None; `source rank · M + source token` int64 [N]; rows from each rank, int32 [R].

    Raises:
        InvalidArgument: The ranks do not divide the experts, or there are too many tokens.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if num_experts % size != 0 or len(topk_idx) > num_max_tokens_per_rank:
        msg = (
            f"num_experts is {num_experts}, for {size} ranks, and num_max_tokens_per_rank "
            f"{num_max_tokens_per_rank}, for {len(topk_idx)} tokens; they do not fit"
        )
        raise InvalidArgument(msg)
    local = num_experts // size
    owners = torch.where(topk_idx >= 0, topk_idx // local, -1)
    tokens = [(owners == to).any(dim=1).nonzero()[:, 0] for to in range(size)]
    sent = torch.cat(tokens)
    counts = torch.tensor([len(part) for part in tokens], dtype=torch.int64, device=sent.device)
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts)
    splits = (received.tolist(), counts.tolist())

    def exchange(tensor: torch.Tensor) -> torch.Tensor:
        return _exchange(tensor[sent], *splits)

    source = exchange(rank * num_max_tokens_per_rank + torch.arange(len(topk_idx)).to(sent))
    recv_x = (exchange(x[0]), exchange(x[1])) if isinstance(x, tuple) else exchange(x)
    recv_idx = exchange(topk_idx)
    elsewhere = (recv_idx < 0) | (recv_idx // local != rank)
    recv_idx = (recv_idx - rank * local).masked_fill(elsewhere, -1)
    recv_weights = None
    if topk_weights is not None:
        recv_weights = exchange(topk_weights).masked_fill(elsewhere, 0)
    return recv_x, recv_idx, recv_weights, source, received.int()


def _exchange(rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
    """Sends rows of any dtype: as bytes, since backends know few dtypes."""
    matrix = rows.contiguous().view(len(rows), math.prod(rows.shape[1:]))
    raw = matrix.view(torch.uint8)
    out = raw.new_empty((sum(received), raw.shape[1]))
    dist.all_to_all_single(out, raw, received, sent)
    return out.view(rows.dtype).view(len(out), *rows.shape[1:])


def generate_pre_combine_data(
    src_token_global_idx: torch.Tensor, num_max_tokens_per_rank: int, num_topk: int, hidden: int
) -> torch.Tensor:
    """What the experts are to have made of tokens, the same whichever rank asks.

    Element k of choice j of token i is sin((s · 131071 mod m + 1) / m · (k + 1) + sin(seed)), where
    s = `src_token_global_idx[i]` · K + j, m = R · M · K, and `seed` is that of `init_seed`.

    Args:
        src_token_global_idx: `source rank · M + source token`, integers [N].
        num_max_tokens_per_rank: M.
        num_topk: K.
        hidden: H.

    Returns:
        bfloat16 [N, K, H].
    """
    device = src_token_global_idx.device
    largest = dist.get_world_size() * num_max_tokens_per_rank * num_topk
    choices = torch.arange(num_topk, dtype=torch.int64, device=device)
    seeds = src_token_global_idx.long().unsqueeze(1) * num_topk + choices
    frequency = ((seeds * _PRIME % largest + 1).float() / largest).unsqueeze(2)
    place = torch.arange(1, hidden + 1, dtype=torch.float32, device=device)
    angles = frequency * place + math.sin(get_global_seed())
    return angles.sin().to(torch.bfloat16)


def ordered_accumulate(
    data: torch.Tensor, initial_value: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over the choices in float32, one after the other, and rounds once.

    Args:
        data: [T, K, H].
        initial_value: [T, H], with which the sums begin; None: 0.

    Returns:
        [T, H] of the dtype of `data`.
    """
    if initial_value is None:
        total = torch.zeros_like(data[:, 0], dtype=torch.float32)
    else:
        total = initial_value.float().clone()
    for choice in range(data.shape[1]):
        total += data[:, choice].float()
    return total.to(data.dtype)


def combine(
    y: torch.Tensor,
    topk_idx: torch.Tensor,
    num_scaleout_ranks: int,
    num_scaleup_ranks: int,
    num_experts: int,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    reduce_in_local: bool,
    reduce_in_scaleup: bool,
) -> torch.Tensor:
    """Sums what the experts made of this rank's tokens, rounding where messages would be.

    Args:
        y: [T, K, H], of each token and choice; 0 where `topk_idx` is -1.
        topk_idx: Integers [T, K], -1 for none.
        num_scaleout_ranks: Domains of ranks.
        num_scaleup_ranks: Ranks of a domain.
        num_experts: E.
        bias: [T, H], or two of them, or None.
        reduce_in_local: Choices held by one rank are summed there first.
        reduce_in_scaleup: What remains of one domain is summed there next.

    Returns:
        [T, H] of the dtype of `y`.

    Raises:
        InvalidArgument: The ranks do not divide the experts.
    """
    num_ranks = num_scaleout_ranks * num_scaleup_ranks
    if num_experts % num_ranks != 0:
        msg = f"num_experts is {num_experts}; it must be a multiple of the {num_ranks} ranks"
        raise InvalidArgument(msg)
    owner = torch.where(topk_idx >= 0, topk_idx // (num_experts // num_ranks), -1)
    if reduce_in_local:
        y = _reduce_groups(y, owner)
    if reduce_in_scaleup:
        domain = torch.where(owner >= 0, owner // num_scaleup_ranks, -1)
        y = _reduce_groups(y, domain)
    biases = bias if isinstance(bias, tuple) else (bias,)
    given = [one.float() for one in biases if one is not None]
    return ordered_accumulate(y, sum(given[1:], given[0]) if given else None)


def _reduce_groups(y: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Puts the sum of the choices of a group in the place of its last one, and 0 in the others."""
    result = torch.zeros_like(y)
    for choice in range(y.shape[1]):
        same = group == group[:, choice : choice + 1]
        last = (group[:, choice] >= 0) & ~same[:, choice + 1 :].any(dim=1)
        rows = last.nonzero()[:, 0]
        members = y[rows].masked_fill(~same[rows].unsqueeze(2), 0)
        result[rows, choice] = ordered_accumulate(members)
    return result
