# SPDX-License-Identifier: MIT
"""The sequences of calls that vLLM and SGLang make in DeepEP's low-latency mode.

Each model below has the arguments that the program passes, and is judged by the dense computation
of a layer whose expert e multiplies a token by `factor(e)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mscclpp_ep as ep
from harness.threads import on_ranks
from mscclpp_ep.deep_ep import Buffer
from mscclpp_ep.deep_ep.utils.math import calc_diff, per_token_cast_back

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = (2, 3, 4)
# M is more than any rank has, and hidden one of the sizes that the programs allow.
LOCAL, TOPK, HIDDEN, MOST = 4, 3, 2048, 32
# Of a token whose elements FP8 has rounded, with scales that are powers of two or not.
FP8_DIFF = 1e-3
# What DeepEP's own test allows.
SUM_DIFF = 1e-5
# How rows are sent: use_fp8, round_scale, use_ue8m0.
FORMATS = {
    "bf16": (False, False, False),
    "fp8": (True, False, False),
    "fp8_rounded": (True, True, False),
    "ue8m0": (True, True, True),
}

any_ranks = pytest.mark.parametrize("ranks", RANKS)
any_format = pytest.mark.parametrize("sent_as", FORMATS)


def factor(expert: int) -> float:
    """What an expert does: exact in bfloat16."""
    return 0.5 * (1 + expert % 4)


def route(rank: int, ranks: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights, some choices missing, the last token's all."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    scores = torch.rand(tokens, LOCAL * ranks, generator=generator)
    weights, topk_idx = scores.topk(TOPK, dim=1)
    topk_idx[torch.rand(tokens, TOPK, generator=generator) < 0.1] = -1
    topk_idx[-1:] = -1
    return topk_idx, weights


def rows(rank: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7 + 100 * seed + rank)
    return torch.randn(tokens, HIDDEN, generator=generator).bfloat16()


def dense(x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The layer in one process, in float32."""
    out = torch.zeros(x.shape)
    for token in range(len(x)):
        for choice, expert in enumerate(topk_idx[token].tolist()):
            if expert >= 0:
                made = (x[token].float() * factor(expert)).bfloat16()
                out[token] += made.float() * weights[token, choice]
    return out


def masked_gemm(recv_x: Any, masked_m: torch.Tensor, rank: int) -> torch.Tensor:
    """What the experts make of the rows that came; NaN in all others."""
    packed = recv_x[0] if isinstance(recv_x, tuple) else recv_x
    y = torch.full(packed.shape, torch.nan, dtype=torch.bfloat16)
    for local, count in enumerate(masked_m.tolist()):
        x = packed[local, :count]
        if isinstance(recv_x, tuple):
            x = per_token_cast_back(x, recv_x[1][local, :count])
        y[local, :count] = (x.float() * factor(rank * LOCAL + local)).bfloat16()
    return y


def check_received(
    recv_x: Any,
    recv_count: torch.Tensor,
    handle: Any,
    rank: int,
    inputs: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Every expert has, once each, the tokens of each rank that chose it, and tells whose."""
    source, ranges, most, hidden, experts = handle[:5]
    assert (most, hidden, experts) == (MOST, HIDDEN, LOCAL * len(inputs))
    assert (recv_count.dtype, recv_count.shape) == (torch.int32, (LOCAL,))
    for local in range(LOCAL):
        total = 0
        for sender, (x, topk_idx) in enumerate(inputs):
            chose = (topk_idx == rank * LOCAL + local).any(dim=1).nonzero()[:, 0].tolist()
            begin, count = divmod(int(ranges[local, sender]), 1 << 32)
            assert count == len(chose)
            mine = slice(begin, begin + count)
            tokens = source[local, mine].tolist()
            assert sorted(tokens) == chose
            if isinstance(recv_x, tuple):
                got = per_token_cast_back(recv_x[0][local, mine], recv_x[1][local, mine])
                assert calc_diff(got, x[tokens]) < FP8_DIFF
            else:
                assert torch.equal(recv_x[local, mine], x[tokens])
            total += count
        assert recv_count[local] == total


def check_layout(recv_x: Any, ranks: int, ue8m0: bool) -> None:
    """Shapes, dtypes and strides that the programs' kernels take."""
    shape = (LOCAL, ranks * MOST, HIDDEN)
    if not isinstance(recv_x, tuple):
        assert (recv_x.dtype, recv_x.shape) == (torch.bfloat16, shape)
        return
    packed, scales = recv_x
    assert (packed.dtype, packed.shape) == (torch.float8_e4m3fn, shape)
    assert scales.dtype == (torch.int32 if ue8m0 else torch.float32)
    assert scales.shape == (*shape[:2], HIDDEN // (512 if ue8m0 else 128))
    assert scales.stride(-2) == 1


def check_sum(out: torch.Tensor, expected: torch.Tensor, fp8: bool = False) -> None:
    """The same but for roundings: to bfloat16 on the way, and of FP8 if it was used."""
    assert calc_diff(out, expected) < (FP8_DIFF if fp8 else SUM_DIFF)


def size_hint(ranks: int) -> int:
    return Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MOST,
        hidden=HIDDEN,
        num_ranks=ranks,
        num_experts=LOCAL * ranks,
    )


# vLLM


class VllmLowLatency:
    """Prepares and finalizes a micro-batch; each step returns what ends it."""

    def __init__(self, group: ep.Group, sent_as: str, enable_shrink: bool = False) -> None:
        self.use_fp8, self.round_scale, self.use_ue8m0 = FORMATS[sent_as]
        self.rank, self.size = group.rank, group.size
        self.buffer = Buffer(
            group=group,
            num_nvl_bytes=1024 * 1024,
            num_rdma_bytes=size_hint(group.size),
            low_latency_mode=True,
            num_qps_per_rank=LOCAL,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False,
            explicitly_destroy=True,
            enable_shrink=enable_shrink,
        )

    def prepare(self, a1: torch.Tensor, topk_ids: torch.Tensor) -> Callable[[], tuple]:
        recv_x, recv_count, handle, _, hook = self.buffer.low_latency_dispatch(
            a1,
            topk_ids,
            MOST,
            LOCAL * self.size,
            use_fp8=self.use_fp8,
            round_scale=self.round_scale,
            use_ue8m0=self.use_ue8m0,
            async_finish=False,
            return_recv_hook=True,
        )

        def receive() -> tuple:
            hook()
            return recv_x, recv_count, handle

        return receive

    def finalize(
        self,
        output: torch.Tensor,
        y: torch.Tensor,
        topk_ids: torch.Tensor,
        weights: torch.Tensor,
        handle: Any,
        overlap: bool,
    ) -> Callable[[], Any]:
        _, _, hook = self.buffer.low_latency_combine(
            y,
            topk_ids,
            weights,
            handle,
            async_finish=False,
            zero_copy=False,
            return_recv_hook=overlap,
            out=output,
        )
        assert callable(hook) == overlap
        return hook if overlap else lambda: None


@any_ranks
@any_format
@pytest.mark.parametrize("overlap", [False, True])
def test_vllm(ranks: int, sent_as: str, overlap: bool) -> None:
    def body(group: ep.Group) -> None:
        vllm = VllmLowLatency(group, sent_as)
        for tokens in (12, 0, MOST):
            inputs = [(rows(r, tokens), route(r, ranks, tokens)[0]) for r in range(ranks)]
            x, topk_ids = inputs[group.rank]
            weights = route(group.rank, ranks, tokens)[1]
            recv_x, recv_count, handle = vllm.prepare(x, topk_ids)()
            check_layout(recv_x, ranks, vllm.use_ue8m0)
            check_received(recv_x, recv_count, handle, group.rank, inputs)
            y = masked_gemm(recv_x, recv_count, group.rank)
            output = torch.full_like(x, torch.nan)
            vllm.finalize(output, y, topk_ids, weights, handle, overlap)()
            check_sum(output, dense(x, topk_ids, weights), vllm.use_fp8)
        vllm.buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
        vllm.buffer.destroy()

    on_ranks(ranks, body)


def test_vllm_overlaps_two_micro_batches() -> None:
    def body(group: ep.Group) -> None:
        vllm = VllmLowLatency(group, "bf16")
        for _ in range(2):
            given = [
                (rows(group.rank, tokens, seed), *route(group.rank, group.size, tokens, seed))
                for seed, tokens in ((1, 10), (2, 15))
            ]
            receives = [vllm.prepare(x, topk_ids) for x, topk_ids, _ in given]
            outputs = [torch.full_like(x, torch.nan) for x, _, _ in given]
            ends = []
            for receive, output, (_, topk_ids, weights) in zip(
                receives, outputs, given, strict=True
            ):
                recv_x, recv_count, handle = receive()
                y = masked_gemm(recv_x, recv_count, group.rank)
                ends.append(vllm.finalize(output, y, topk_ids, weights, handle, True))
            for end, output, inputs in zip(ends, outputs, given, strict=True):
                end()
                check_sum(output, dense(*inputs))
        vllm.buffer.destroy()

    on_ranks(3, body)


def test_vllm_asks_which_ranks_are_masked() -> None:
    def body(group: ep.Group) -> None:
        vllm = VllmLowLatency(group, "bf16", enable_shrink=True)
        masked = torch.full((group.size,), 7, dtype=torch.int32)
        vllm.buffer.low_latency_query_mask_buffer(masked)
        assert masked.tolist() == [0] * group.size
        vllm.buffer.low_latency_clean_mask_buffer()
        x, (topk_ids, weights) = rows(group.rank, 9), route(group.rank, group.size, 9)
        recv_x, recv_count, handle = vllm.prepare(x, topk_ids)()
        y, output = masked_gemm(recv_x, recv_count, group.rank), torch.empty_like(x)
        vllm.finalize(output, y, topk_ids, weights, handle, False)()
        check_sum(output, dense(x, topk_ids, weights))
        vllm.buffer.destroy()

    on_ranks(2, body)


# SGLang


class SglangLowLatency:
    """The halves, a and b, of dispatch and of combine, with a hook or with events."""

    def __init__(self, group: ep.Group, sent_as: str, with_hook: bool) -> None:
        self.use_fp8, self.round_scale, self.use_ue8m0 = FORMATS[sent_as]
        self.with_hook = with_hook
        nvl = Buffer.get_dispatch_config(group.size).get_nvl_buffer_size_hint(
            HIDDEN * 2, group.size
        )
        self.buffer = Buffer(
            group,
            nvl,
            size_hint(group.size),
            low_latency_mode=True,
            num_qps_per_rank=max(Buffer.num_sms, LOCAL),
            allow_mnnvl=True,
        )
        assert self.buffer.low_latency_mode is True
        self.experts = LOCAL * self.buffer.group_size

    def clean(self) -> None:
        self.buffer.clean_low_latency_buffer(MOST, HIDDEN, self.experts)

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor) -> tuple:
        recv_x, masked_m, handle, event, hook = self.buffer.low_latency_dispatch(
            x,
            topk_ids.to(torch.int64),
            MOST,
            self.experts,
            use_fp8=self.use_fp8,
            async_finish=not self.with_hook,
            return_recv_hook=self.with_hook,
            round_scale=self.round_scale,
            use_ue8m0=self.use_ue8m0,
        )
        self._end(event, hook)
        return recv_x, masked_m, handle

    def combine(
        self, y: torch.Tensor, topk_ids: torch.Tensor, weights: torch.Tensor, handle: Any
    ) -> torch.Tensor:
        combined, event, hook = self.buffer.low_latency_combine(
            x=y,
            topk_idx=topk_ids,
            topk_weights=weights,
            handle=handle,
            async_finish=not self.with_hook,
            return_recv_hook=self.with_hook,
        )
        self._end(event, hook)
        return combined

    def _end(self, event: Any, hook: Any) -> None:
        if self.with_hook:
            hook()
        else:
            event.current_stream_wait()


@any_ranks
@any_format
@pytest.mark.parametrize("with_hook", [False, True])
def test_sglang(ranks: int, sent_as: str, with_hook: bool) -> None:
    def body(group: ep.Group) -> None:
        sglang = SglangLowLatency(group, sent_as, with_hook)
        for step, tokens in enumerate((5 + group.rank, MOST, 0)):
            seed = 3 + step
            sizes = [5 + r if step == 0 else tokens for r in range(ranks)]
            inputs = [
                (rows(r, size, seed), route(r, ranks, size, seed)[0])
                for r, size in enumerate(sizes)
            ]
            x, topk_ids = inputs[group.rank]
            weights = route(group.rank, ranks, tokens, seed)[1]
            recv_x, masked_m, handle = sglang.dispatch(x, topk_ids)
            check_layout(recv_x, ranks, sglang.use_ue8m0)
            check_received(recv_x, masked_m, handle, group.rank, inputs)
            y = masked_gemm(recv_x, masked_m, group.rank)
            combined = sglang.combine(y, topk_ids, weights, handle)
            assert (combined.dtype, combined.shape) == (torch.bfloat16, x.shape)
            check_sum(combined, dense(x, topk_ids, weights), sglang.use_fp8)
        sglang.buffer.destroy()

    on_ranks(ranks, body)


def test_sglang_switches_between_modes() -> None:
    """Prefill in the high-throughput mode and decode in the other, with one buffer."""

    def body(group: ep.Group) -> None:
        sglang = SglangLowLatency(group, "bf16", True)
        buffer = sglang.buffer
        for seed in (1, 2):
            x, (topk_ids, weights) = rows(group.rank, 20, seed), route(group.rank, 3, 20, seed)
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(
                topk_ids, sglang.experts
            )
            recv_x, _, _, _, handle, _ = buffer.dispatch(
                x,
                topk_idx=topk_ids,
                topk_weights=weights,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
            combined, _, _ = buffer.combine(recv_x, handle)
            assert calc_diff(combined, x.float() * in_rank.sum(1, keepdim=True)) < 1e-5

            sglang.clean()
            recv_x, masked_m, handle = sglang.dispatch(x, topk_ids)
            y = masked_gemm(recv_x, masked_m, group.rank)
            combined = sglang.combine(y, topk_ids, weights, handle)
            check_sum(combined, dense(x, topk_ids, weights))
        buffer.destroy()

    on_ranks(3, body)
