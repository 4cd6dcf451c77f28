# SPDX-License-Identifier: MIT
"""Ranks as processes that any launcher may start, with rows of bfloat16.

python numpy_processes.py                       # starts four processes itself
torchrun --nproc-per-node 4 numpy_processes.py  # or let a launcher do it
"""

import os
import socket
import subprocess
import sys

import ml_dtypes
import numpy as np

import mscclpp_ep as ep

RANKS, HIDDEN, EXPERTS, TOPK = 4, 512, 16, 4


def launch():
    """Start this script once a rank, with the variables that launchers set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ
            | {name: str(value) for name, value in (common | {"RANK": rank}).items()},
        )
        for rank in range(RANKS)
    ]
    return max(abs(process.wait()) for process in processes)


def main():
    rank = int(os.environ["RANK"])
    random = np.random.default_rng(rank)
    tokens = 64 * rank  # as many as each rank likes, none included
    x = random.integers(-8, 8, (tokens, HIDDEN)).astype(ml_dtypes.bfloat16)
    topk_idx = random.integers(-1, EXPERTS, (tokens, TOPK))  # -1: no expert

    with ep.Group.from_env() as group, ep.Buffer(group, device="cpu") as buffer:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
        recv_x, _, _, counts, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=np.ones((tokens, TOPK), np.float32),
        )
        # Sent back as they came, rows are summed: each token once for every rank it went to.
        output, _, _ = buffer.combine(recv_x, handle)
        expected = x.astype(np.float32) * in_rank.sum(axis=1, keepdims=True)
        np.testing.assert_array_equal(output.astype(np.float32), expected)
        print(f"rank {rank}: sent {per_rank}, {counts} for its experts; the result is right")


if __name__ == "__main__":
    sys.exit(main() if "RANK" in os.environ else launch())
