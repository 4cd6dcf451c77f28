# SPDX-License-Identifier: MIT
"""Results that find no block: rows go through rings that are much smaller than the results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mscclpp_ep as ep
from harness.threads import on_ranks

HIDDEN = 7000  # 28 kB a row: a ring of a megabyte has 37
EXPERTS, TOPK = 16, 3


def dispatch(buffer: ep.Buffer, x: np.ndarray, idx: np.ndarray, weights: np.ndarray) -> list[Any]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    scales = x[:, :5] * np.float32(0.5)
    (rows, recv_scales), recv_idx, recv_w, counts, handle, _ = buffer.dispatch(
        (x, scales[:, ::-1]),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
    )
    summed, summed_w, _ = buffer.combine(rows, handle, topk_weights=recv_w)
    return [rows, recv_scales, recv_idx, recv_w, handle[3], summed, summed_w, np.array(counts)]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("full", ["all", "first"], ids=["all-full", "first-full"])
def test_rings_are_used_over_and_over(size: int, num_threads: int, full: str) -> None:
    seed = int(np.random.default_rng().integers(2**32))
    print("seed", seed)

    def body(group: ep.Group) -> None:
        rng = np.random.default_rng((seed, group.rank))
        tokens = 150 + 130 * group.rank
        need = 430 * size * (HIDDEN + 100) * 4
        lands = full == "all" or group.rank == 0
        limit = {"max_arena_bytes": need} if lands else {}
        with (
            ep.Buffer(group, timeout=60, num_threads=num_threads) as roomy,
            ep.Buffer(group, timeout=60, num_threads=num_threads, **limit) as tight,
        ):
            held = [tight.empty((need // 8 - 4096,), np.uint8) for _ in range(7)] if lands else []
            for _ in range(3):
                x = rng.standard_normal((tokens, HIDDEN), np.float32)
                idx = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOPK].copy()
                weights = rng.random((tokens, TOPK), np.float32)
                expected = dispatch(roomy, x, idx, weights)
                before = tight.stats().landed_rows
                got = dispatch(tight, x, idx, weights)
                landed = tight.stats().landed_rows - before
                assert landed == (len(got[0]) if lands else 0)
                for ours, theirs in zip(got, expected, strict=True):
                    np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
            del held

    on_ranks(size, body)
