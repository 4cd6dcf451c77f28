# SPDX-License-Identifier: MIT
"""The sequences of calls that vLLM, SGLang and Megatron make in DeepEP's high-throughput mode.

Each model below has the arguments that the program passes, and is judged by the dense computation
of a layer whose expert e multiplies a token by `factor(e)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mscclpp_ep as ep
from harness.threads import on_ranks
from mscclpp_ep.deep_ep import Buffer, Config
from mscclpp_ep.deep_ep.utils import EventHandle, EventOverlap
from mscclpp_ep.deep_ep.utils.math import align, calc_diff, per_token_cast_back
from mscclpp_ep.deep_ep.utils.math import per_token_cast_to_fp8 as cast

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = (2, 3, 4)
LOCAL, TOPK, HIDDEN = 4, 3, 256


def factor(expert: torch.Tensor) -> torch.Tensor:
    """What an expert does; 0 for none."""
    return torch.where(expert >= 0, 0.5 + expert % 5, 0.0)


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
    return x.float() * (weights * factor(topk_idx)).sum(1, keepdim=True)


def apply_experts(
    x: torch.Tensor, local_idx: torch.Tensor, weights: torch.Tensor, rank: int
) -> torch.Tensor:
    """The layer's part of one rank, on the rows it received."""
    global_idx = torch.where(local_idx >= 0, local_idx + rank * LOCAL, -1)
    return dense(x, global_idx, weights).bfloat16()


def on_groups(ranks: int, body: Callable[[ep.Group], Any]) -> None:
    before = Buffer.num_sms
    try:
        on_ranks(ranks, body)
    finally:
        Buffer.set_num_sms(before)


# vLLM


class VllmHighThroughput:
    """Prepares and finalizes a micro-batch."""

    def __init__(self, group: ep.Group) -> None:
        self.buffer = Buffer(
            group=group,
            num_nvl_bytes=1024 * 1024 * 1024,
            num_rdma_bytes=0,
            low_latency_mode=False,
            num_qps_per_rank=1,
            explicitly_destroy=True,
        )
        Buffer.set_num_sms(min(20, Buffer.num_sms))
        self.rank, self.size = group.rank, group.size

    def config(self, get: Callable[[int], Config]) -> Config | None:
        return get(self.size) if self.size in (2, 4, 8) else None

    def prepare(self, x, topk_idx, weights, asynchronous: bool):
        event = self.buffer.capture()
        per_rank, per_node, per_expert, in_rank, event = self.buffer.get_dispatch_layout(
            topk_idx=topk_idx,
            num_experts=LOCAL * self.size,
            previous_event=event,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        recv_x, recv_idx, recv_weights, counts, handle, event = self.buffer.dispatch(
            x=x,
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=weights,
            expert_alignment=1,
            config=self.config(Buffer.get_dispatch_config),
            previous_event=event,
            async_finish=asynchronous,
            allocate_on_comm_stream=False,
        )
        assert (event.event is not None) == asynchronous

        def receive():
            if event.event is not None:
                event.current_stream_wait()
            assert counts == [int((recv_idx == e).sum()) for e in range(LOCAL)]
            rows = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
            return apply_experts(rows, recv_idx, recv_weights, self.rank), handle

        return receive

    def finalize(self, y, handle, output, asynchronous: bool):
        combined, _, event = self.buffer.combine(
            x=y,
            handle=handle,
            topk_weights=None,
            config=self.config(Buffer.get_combine_config),
            previous_event=self.buffer.capture(),
            async_finish=asynchronous,
            allocate_on_comm_stream=False,
        )

        def receive() -> None:
            if event.event is not None:
                event.current_stream_wait()
            output.copy_(combined, non_blocking=True)

        return receive


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("fp8", [False, True])
def test_vllm(ranks: int, fp8: bool) -> None:
    def body(group: ep.Group) -> None:
        vllm = VllmHighThroughput(group)
        topk_idx, weights = route(group.rank, ranks, 30 + group.rank)
        x = rows(group.rank, len(topk_idx))
        quantised = cast(x)
        expected = dense(per_token_cast_back(*quantised) if fp8 else x, topk_idx, weights)
        for asynchronous in (False, True):
            receive = vllm.prepare(quantised if fp8 else x, topk_idx, weights, asynchronous)
            y, handle = receive()
            output = torch.full_like(x, torch.nan)
            vllm.finalize(y, handle, output, asynchronous)()
            assert calc_diff(output, expected) < 1e-5
        vllm.buffer.destroy()

    on_groups(ranks, body)


def test_vllm_overlaps_two_micro_batches() -> None:
    def body(group: ep.Group) -> None:
        vllm = VllmHighThroughput(group)
        for tokens in (16, 0, 9):
            inputs = [
                (rows(group.rank, tokens, seed), *route(group.rank, group.size, tokens, seed))
                for seed in (1, 2)
            ]
            receives = [vllm.prepare(*given, True) for given in inputs]
            held = [receive() for receive in receives]
            outputs = [torch.empty(tokens, HIDDEN).bfloat16() for _ in inputs]
            finals = [
                vllm.finalize(y, handle, output, True)
                for (y, handle), output in zip(held, outputs, strict=True)
            ]
            for final, given, output in zip(finals, inputs, outputs, strict=True):
                final()
                assert calc_diff(output, dense(*given)) < 1e-5
        vllm.buffer.destroy()

    on_groups(3, body)


# SGLang


class SglangNormal:
    """The two halves, a and b, of dispatch and of combine."""

    def __init__(self, group: ep.Group, dispatch: Config, combine: Config) -> None:
        hidden_bytes = HIDDEN * 2
        configs = (dispatch, combine)
        nvl = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size) for config in configs)
        self.buffer = Buffer(
            group,
            nvl,
            rdma,
            low_latency_mode=False,
            num_qps_per_rank=Buffer.num_sms,
            allow_mnnvl=True,
        )
        assert self.buffer.group_size == group.size
        assert self.buffer.low_latency_mode is False
        self.configs = configs
        self.handle: Any = None

    def dispatch(self, x, topk_idx, weights, asynchronous: bool, alignment: int):
        previous = Buffer.capture() if asynchronous else None
        per_rank, per_node, per_expert, in_rank, previous = self.buffer.get_dispatch_layout(
            topk_idx,
            LOCAL * self.buffer.group_size,
            previous_event=previous,
            async_finish=asynchronous,
            allocate_on_comm_stream=previous is not None,
        )
        recv_x, recv_idx, recv_weights, counts, self.handle, event = self.buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=previous,
            async_finish=asynchronous,
            allocate_on_comm_stream=asynchronous and previous is not None,
            expert_alignment=alignment,
            config=self.configs[0],
        )
        if asynchronous:
            event.current_stream_wait()
        return recv_x, recv_idx, recv_weights, counts

    def combine(self, y, asynchronous: bool):
        previous = Buffer.capture() if asynchronous else None
        combined, _, event = self.buffer.combine(
            y,
            self.handle,
            async_finish=asynchronous,
            previous_event=previous,
            allocate_on_comm_stream=previous is not None,
            config=self.configs[1],
        )
        if asynchronous:
            event.current_stream_wait()
        self.handle = None
        return combined


FROM_JSON = {
    "num_sms": 24,
    "num_max_nvl_chunked_send_tokens": 8,
    "num_max_nvl_chunked_recv_tokens": 256,
    "num_max_rdma_chunked_send_tokens": 16,
    "num_max_rdma_chunked_recv_tokens": 128,
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("deep_gemm", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_sglang(ranks: int, deep_gemm: bool, asynchronous: bool) -> None:
    def body(group: ep.Group) -> None:
        tuned = Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)
        sglang = SglangNormal(group, *((Config(**FROM_JSON),) * 2 if deep_gemm else tuned))
        alignment = 128 if deep_gemm else 1
        for tokens in (20 + group.rank, 0, 7):
            topk_idx, weights = route(group.rank, ranks, tokens)
            x = rows(group.rank, tokens)
            given = cast(x) if deep_gemm else x
            recv_x, recv_idx, recv_weights, counts = sglang.dispatch(
                given, topk_idx, weights, asynchronous, alignment
            )
            exact = [int((recv_idx == e).sum()) for e in range(LOCAL)]
            assert counts == [align(count, alignment) for count in exact]
            received = per_token_cast_back(*recv_x) if deep_gemm else recv_x
            y = apply_experts(received, recv_idx, recv_weights, group.rank)
            combined = sglang.combine(y, asynchronous)
            expected = dense(per_token_cast_back(*given) if deep_gemm else x, topk_idx, weights)
            assert combined.shape == x.shape
            assert calc_diff(combined, expected) < 1e-5
        sglang.buffer.destroy()

    on_groups(ranks, body)


# Megatron


class FusedDispatch(torch.autograd.Function):
    """Dispatch, whose gradient is a combine."""

    @staticmethod
    def forward(ctx, x, topk_idx, probs, num_experts, buffer, asynchronous, on_comm_stream):
        previous = EventOverlap(EventHandle()) if asynchronous else None
        order = {"async_finish": asynchronous, "allocate_on_comm_stream": on_comm_stream}
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx, num_experts, previous_event=previous, **order
        )
        recv_x, recv_idx, recv_probs, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            **order,
        )
        if asynchronous:
            after.current_stream_wait()
        ctx.buffer, ctx.handle, ctx.order = buffer, handle, order
        ctx.mark_non_differentiable(recv_idx)
        return recv_x, recv_idx, recv_probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad, _grad_idx, grad_probs, _grad_counts, _grad_handle):
        previous = EventOverlap(EventHandle()) if ctx.order["async_finish"] else None
        grad_x, grad_weights, after = ctx.buffer.combine(
            grad.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=previous,
            **ctx.order,
        )
        if ctx.order["async_finish"]:
            after.current_stream_wait()
        return grad_x, None, grad_weights, None, None, None, None


class FusedCombine(torch.autograd.Function):
    """Combine, whose gradient is the dispatch again."""

    @staticmethod
    def forward(ctx, y, buffer, handle, asynchronous, on_comm_stream):
        previous = EventOverlap(EventHandle()) if asynchronous else None
        order = {"async_finish": asynchronous, "allocate_on_comm_stream": on_comm_stream}
        combined, _, after = buffer.combine(y, handle=handle, previous_event=previous, **order)
        if asynchronous:
            after.current_stream_wait()
        ctx.buffer, ctx.handle, ctx.order = buffer, handle, order
        return combined

    @staticmethod
    def backward(ctx, grad):
        previous = EventOverlap(EventHandle()) if ctx.order["async_finish"] else None
        grad_y, _, _, _, _, after = ctx.buffer.dispatch(
            grad.contiguous(), handle=ctx.handle, previous_event=previous, **ctx.order
        )
        if ctx.order["async_finish"]:
            after.current_stream_wait()
        return grad_y, None, None, None, None


def megatron_buffer(group: ep.Group, hidden_bytes: int, known: Buffer | None) -> Buffer:
    """The buffer that is there, or a larger one."""
    nvl = rdma = 0
    for config in (Buffer.get_dispatch_config(group.size), Buffer.get_combine_config(group.size)):
        nvl = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size), nvl)
        rdma = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size), rdma)
    fits = (
        known is not None
        and known.group == group
        and known.num_nvl_bytes >= nvl
        and known.num_rdma_bytes >= rdma
    )
    return known if fits else Buffer(group, nvl, rdma)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_megatron(ranks: int, dtype: torch.dtype, asynchronous: bool) -> None:
    def body(group: ep.Group) -> None:
        Buffer.set_num_sms(24)
        tokens = 25 + group.rank
        topk_idx, probs = route(group.rank, ranks, tokens)
        x = rows(group.rank, tokens).to(dtype).requires_grad_()
        probs.requires_grad_()
        hidden_bytes = x.size(1) * max(x.element_size(), 2)
        buffer = megatron_buffer(group, hidden_bytes, None)
        assert megatron_buffer(group, hidden_bytes, buffer) is buffer

        recv_x, recv_idx, recv_probs, counts, handle = FusedDispatch.apply(
            x, topk_idx, probs, LOCAL * ranks, buffer, asynchronous, asynchronous
        )
        assert counts.tolist() == [int((recv_idx == e).sum()) for e in range(LOCAL)]
        global_idx = torch.where(recv_idx >= 0, recv_idx + group.rank * LOCAL, -1)
        y = (recv_x * (recv_probs * factor(global_idx)).sum(1, keepdim=True)).to(dtype)
        out = FusedCombine.apply(y, buffer, handle, asynchronous, asynchronous)
        slope = torch.randn(tokens, HIDDEN).to(dtype)
        out.backward(slope)

        exact_x = x.detach().float().requires_grad_()
        exact_probs = probs.detach().clone().requires_grad_()
        expected = dense(exact_x, topk_idx, exact_probs)
        expected.backward(slope.float())
        worst = 1e-5 if dtype == torch.bfloat16 else 1e-12
        assert calc_diff(out, expected) < worst
        assert calc_diff(x.grad, exact_x.grad) < worst
        assert calc_diff(probs.grad, exact_probs.grad) < worst
        assert (x.grad.dtype, probs.grad.dtype) == (dtype, torch.float32)
        buffer.destroy()

    on_groups(ranks, body)
