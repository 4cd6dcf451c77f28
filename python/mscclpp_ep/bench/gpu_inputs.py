# SPDX-License-Identifier: MIT
"""One set of inputs on a GPU, and the results that they must give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mscclpp_ep.bench.cases import Case

FP8_GROUP = 128  # elements that share a scale
_FP8_MOST = 448.0
_LEAST_AMAX = 1e-4


class Inputs:
    """Tensors of Torch, as rank `case.rank` sees them.

    Attributes:
        x: tokens, bfloat16 [T, H].
        topk_idx: int64 [T, K].
        topk_weights: float32 [T, K].
        output: what the experts make of the rows received, bfloat16 [N, H].
        rows: what dispatch must give.
        recv_idx: what comes with it.
        recv_weights: likewise.
        sums: what combine must give of `output`.
        echo: what it must give of `rows`.
        weights: the sums of `recv_weights` that it must give.
        fp8: `x` in FP8 and its scales; None if H is not a multiple of `FP8_GROUP`.
        fp8_rows: `rows` likewise.
    """

    def __init__(self, torch: Any, case: Case, device: str) -> None:
        def on_gpu(array: Any) -> Any:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        def rows(bits: np.ndarray) -> Any:
            return on_gpu(bits.view(np.int16)).view(torch.bfloat16)

        self.case = case
        self.x = rows(case.tokens_of(case.rank))
        self.topk_idx = on_gpu(case.choices_of(case.rank))
        self.topk_weights = on_gpu(case.weights_of(case.rank))
        self.output = rows(case.expert_output_of(case.rank))
        self.rows = rows(case.expected_rows())
        self.recv_idx, self.recv_weights = map(on_gpu, case.expected_choices())
        self.sums = rows(case.expected_sums())
        self.echo = rows(case.expected_echo())
        self.weights = self.topk_weights.masked_fill(self.topk_idx < 0, 0)
        whole = case.settings.hidden % FP8_GROUP == 0
        self.fp8 = quantized(torch, self.x) if whole else None
        # A row's quantization depends on that row alone.
        self.fp8_rows = quantized(torch, self.rows) if whole else None

    @property
    def most_rows(self) -> int:
        """Rows that may arrive, whatever the routing is."""
        return self.case.settings.ranks * max(self.case.counts)


def quantized(torch: Any, rows: Any) -> tuple[Any, Any]:
    """Rows in FP8 [T, H] and their scales, float32 [T, H / FP8_GROUP]."""
    groups = rows.float().view(len(rows), -1, FP8_GROUP)
    scales = groups.abs().amax(dim=2).clamp(min=_LEAST_AMAX) / _FP8_MOST
    small = (groups / scales.unsqueeze(2)).to(torch.float8_e4m3fn)
    return small.view(rows.shape), scales


def fp8_row_bytes(hidden: int) -> int:
    """Of one token in FP8, with its scales."""
    return hidden + hidden // FP8_GROUP * 4
