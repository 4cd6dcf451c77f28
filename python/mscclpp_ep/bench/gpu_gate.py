# SPDX-License-Identifier: MIT
"""Lets the GPUs of all ranks begin something together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mscclpp_ep as ep

if TYPE_CHECKING:
    from collections.abc import Callable

# Of a row, the fewest that all ways of copying take.
_ELEMENTS = 64


class Gate:
    """Enqueues what ends on no GPU before every GPU has come to it.

    Hosts that leave a barrier together launch kernels a few microseconds apart, and a rank that
    begins first waits for the last one in a collective call: its time would have that in it. Here
    a row goes from every rank to every other one, so that all know of each other's arrival within
    the time of one signal.
    """

    def __init__(self, torch: Any, buffer: ep.Buffer) -> None:
        """By operations of a buffer; collective."""
        ranks, device = buffer.group_size, buffer.device
        row: Any = torch.zeros((1, _ELEMENTS), dtype=torch.bfloat16, device=device)
        ones = torch.ones(ranks, dtype=torch.int32, device=device)
        handle = buffer.dispatch(
            row,
            num_tokens_per_rank=ones,
            num_tokens_per_expert=ones,
            is_token_in_rank=torch.ones((1, ranks), dtype=torch.bool, device=device),
        )[4]
        one = ep.Config(1)
        self._enqueue: Callable[[], object] = lambda: buffer.dispatch(
            row, handle=handle, config=one
        )

    def __call__(self) -> None:
        """On the current stream; collective."""
        self._enqueue()
