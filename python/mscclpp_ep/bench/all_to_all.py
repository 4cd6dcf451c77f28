# SPDX-License-Identifier: MIT
"""Dispatch and combine as they are written without a library, over torch.distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Counts = tuple[list[int], list[int]]  # rows that a rank sends to each, and receives from each


class AllToAll:
    """The work over `all_to_all_single`, on the device of the tensors given.

    A token goes once to each rank that holds some of its experts, with its choices and weights, and
    what comes back is summed in float32.
    """

    def __init__(self, ranks: int, experts_held: int) -> None:
        import torch
        from torch import distributed

        self._torch: Any = torch
        self._exchange: Any = distributed.all_to_all_single
        self._ranks = ranks
        self._experts_held = experts_held

    def layout(self, topk_idx: Any) -> tuple[Any, Any]:
        """The tokens to send, by destination, and how many to each."""
        torch, device = self._torch, topk_idx.device
        # One column more, for the choices that are none.
        in_rank = torch.zeros(len(topk_idx), self._ranks + 1, dtype=torch.bool, device=device)
        holders = topk_idx // self._experts_held
        in_rank.scatter_(1, holders.masked_fill_(topk_idx < 0, self._ranks), True)
        chosen = [in_rank[:, rank].nonzero().squeeze(1) for rank in range(self._ranks)]
        sizes = torch.tensor([len(tokens) for tokens in chosen], device=device)
        return torch.cat(chosen), sizes

    def dispatch(self, arrays: Sequence[Any], layout: tuple[Any, Any]) -> tuple[list[Any], Counts]:
        """Sends rows of every array; returns those received, by source, and how many."""
        torch = self._torch
        order, to_send = layout
        to_receive = torch.empty_like(to_send)
        self._exchange(to_receive, to_send)
        sent, received = to_send.tolist(), to_receive.tolist()
        outputs = [
            torch.empty(sum(received), a.shape[1], dtype=a.dtype, device=a.device) for a in arrays
        ]
        for output, array in zip(outputs, arrays, strict=True):
            self._exchange(output, array[order], received, sent)
        return outputs, (sent, received)

    def combine(self, output: Any, num_tokens: int, order: Any, counts: Counts) -> Any:
        """Sends rows back and sums those of a token."""
        torch = self._torch
        sent, received = counts
        width, device = output.shape[1], output.device
        back = torch.empty(len(order), width, dtype=output.dtype, device=device)
        self._exchange(back, output, sent, received)
        total = torch.zeros(num_tokens, width, device=device)
        return total.index_add_(0, order, back.float()).to(output.dtype)
