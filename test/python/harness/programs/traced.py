# SPDX-License-Identifier: MIT
"""Operations to be seen in a trace."""

from __future__ import annotations

import numpy as np

import mscclpp_ep as ep

EXPERTS = 6


def exchange(buffer: ep.Buffer, hidden: int = 64, tokens: int = 40) -> None:
    """A dispatch, and a combine of memory that others cannot read, which is staged."""
    topk_idx = np.random.default_rng(buffer.rank).integers(0, EXPERTS, (tokens, 2))
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    recv, *_, handle, _ = buffer.dispatch(
        np.ones((tokens, hidden), np.float32),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )
    buffer.combine(recv.copy(), handle)


def twice(context, path: str) -> None:
    """Two rounds of operations on one buffer."""
    buffer = context.buffer(trace=path)
    exchange(buffer)
    exchange(buffer)
