# SPDX-License-Identifier: MIT
"""Four ranks as threads of one process: dispatch tokens to experts, combine, check.

python numpy_threads.py
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

import mscclpp_ep as ep

RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 4, 100, 256, 8, 2


def expert(index, x):
    """Expert e multiplies by e + 1."""
    return (index + 1) * x


def run(group):
    random = np.random.default_rng(group.rank)
    x = random.standard_normal((TOKENS, HIDDEN), dtype=np.float32)
    topk_idx = np.argsort(random.random((TOKENS, EXPERTS)))[:, :TOPK].copy()
    topk_weights = random.random((TOKENS, TOPK), dtype=np.float32)

    with ep.Buffer(group, device="cpu") as buffer:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )

        # One row a (token, rank): the weighted sum of this rank's experts that the token chose.
        first = group.rank * EXPERTS // RANKS
        expert_output = buffer.empty(recv_x.shape, recv_x.dtype)
        expert_output[:] = 0
        for local in range(EXPERTS // RANKS):
            rows, choices = np.nonzero(recv_idx == local)
            weights = recv_weights[rows, choices, np.newaxis]
            expert_output[rows] += weights * expert(first + local, recv_x[rows])

        output, _, _ = buffer.combine(expert_output, handle)

        expected = (topk_weights * (topk_idx + 1)).sum(axis=1, keepdims=True) * x
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
        return len(recv_x), counts


if __name__ == "__main__":
    with ThreadPoolExecutor(RANKS) as threads:
        for rank, (rows, counts) in enumerate(threads.map(run, ep.Group.local(RANKS))):
            print(f"rank {rank}: {rows} rows, {counts} for its experts; the result is right")
