"""Torch CPU tensors in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mscclpp_ep as ep
from harness.threads import on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS, EXPERTS, TOPK, HIDDEN = 3, 12, 4, 264


def on_buffers(body: Callable[[ep.Buffer], Any]) -> list[Any]:
    """Runs `body` on ranks that are threads, each with a buffer."""

    def run(group: ep.Group) -> Any:
        with ep.Buffer(group, timeout=30) as buffer:
            return body(buffer)

    return on_ranks(RANKS, run)


def route(buffer: ep.Buffer, tokens: int) -> dict[str, torch.Tensor]:
    scores = torch.rand(tokens, EXPERTS)
    weights, topk_idx = torch.topk(scores, TOPK, dim=1)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    assert per_node is None
    assert event.event is None
    assert in_rank.dtype == torch.bool
    owners = topk_idx // (EXPERTS // RANKS)
    expected = torch.zeros(tokens, RANKS, dtype=torch.bool).scatter_(1, owners, True)
    assert torch.equal(in_rank, expected)
    assert torch.equal(per_rank, expected.sum(0).int())
    assert torch.equal(per_expert, torch.bincount(topk_idx.flatten(), minlength=EXPERTS).int())
    return {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": topk_idx,
        "topk_weights": weights,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("by_functions_of_c", [False, True])
def test_round_trip(
    dtype: torch.dtype,
    requires_grad: bool,
    by_functions_of_c: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not by_functions_of_c:  # as before Torch 2.10
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
        assert not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")

    def body(buffer: ep.Buffer) -> None:
        routing = route(buffer, 40 + buffer.rank)
        x = torch.randn(40 + buffer.rank, HIDDEN).to(dtype).requires_grad_(requires_grad)
        recv_x, recv_idx, recv_w, counts, handle, _ = buffer.dispatch(x, **routing)
        assert recv_x.dtype == dtype
        assert recv_idx.dtype == torch.int64
        assert [int((recv_idx == e).sum()) for e in range(EXPERTS // RANKS)] == counts
        assert torch.equal(recv_w != 0, recv_idx >= 0)
        assert all(isinstance(item, torch.Tensor) for item in handle)
        assert handle[0][-1, buffer.rank] == len(recv_x)

        y = buffer.empty(recv_x.shape, dtype)
        assert y.dtype == dtype
        y.copy_(recv_x)
        out, weights, _ = buffer.combine(y, handle, topk_weights=recv_w)
        copies = routing["is_token_in_rank"].sum(1, keepdim=True)
        expected = torch.zeros(len(x), HIDDEN)
        for copy in range(int(copies.max())):
            expected += torch.where(copies > copy, x.detach().float(), torch.zeros(()))
        assert torch.equal(out, expected.to(dtype))
        assert torch.equal(weights, routing["topk_weights"])

    on_buffers(body)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32, torch.float8_e8m0fnu])
def test_fp8_rows_with_column_major_scales(scale_dtype: torch.dtype) -> None:
    def body(buffer: ep.Buffer) -> None:
        tokens = 17
        routing = route(buffer, tokens)
        rows = torch.randn(tokens, HIDDEN).to(torch.float8_e4m3fn)
        size = scale_dtype.itemsize
        raw = torch.randint(0, 120, (3, tokens * size), dtype=torch.uint8).view(scale_dtype)
        scales = raw.reshape(3, tokens).T
        assert not scales.is_contiguous()
        (recv, recv_scales), _, _, _, handle, _ = buffer.dispatch((rows, scales), **routing)
        assert recv.dtype == torch.float8_e4m3fn
        assert recv_scales.dtype == scale_dtype
        assert recv_scales.is_contiguous()
        begin = int(handle[0][buffer.rank - 1, buffer.rank]) if buffer.rank > 0 else 0
        own = routing["is_token_in_rank"][:, buffer.rank].nonzero()[:, 0]
        mine = slice(begin, begin + len(own))
        as_bytes = torch.uint8
        assert torch.equal(recv[mine].view(as_bytes), rows.view(as_bytes)[own])
        expected = scales.contiguous().view(as_bytes)[own]
        assert torch.equal(recv_scales[mine].view(as_bytes), expected)
        assert torch.equal(handle[3][mine].long(), own)

    on_buffers(body)


def test_results_outlive_the_buffer() -> None:
    def body(buffer: ep.Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        routing = route(buffer, 16)
        x = torch.full((16, HIDDEN), float(buffer.rank + 1))
        recv_x, *_ = buffer.dispatch(x, **routing)
        return recv_x, recv_x.clone()

    for kept, copy in on_buffers(body):
        assert torch.equal(kept, copy)


def test_a_tensor_elsewhere_is_refused_on_every_rank() -> None:
    def body(buffer: ep.Buffer) -> None:
        routing = route(buffer, 8)
        device = "meta" if buffer.rank == 1 else "cpu"
        x = torch.zeros(8, HIDDEN, device=device)
        expected = ep.InvalidArgument if buffer.rank == 1 else ep.PeerFailure
        with pytest.raises(expected, match="x cannot be used"):
            buffer.dispatch(x, **routing)
        recv_x, *_ = buffer.dispatch(torch.ones(8, HIDDEN), **routing)
        assert torch.equal(recv_x, torch.ones_like(recv_x))

    on_buffers(body)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(8, HIDDEN).to_sparse(),
        torch.zeros(8, HIDDEN, dtype=torch.complex64),
        torch.zeros(1, 1, 1, 8, HIDDEN),
        torch.tensor(1.0),
    ],
    ids=["sparse", "complex", "five dimensions", "no dimension"],
)
def test_a_tensor_of_another_kind_is_refused(wrong: torch.Tensor) -> None:
    (group,) = ep.Group.local(1)
    with ep.Buffer(group, device="cpu") as buffer:
        routing = route_of_one(buffer)
        with pytest.raises(ep.InvalidArgument, match="x cannot be used") as raised:
            buffer.dispatch(wrong, **routing)
        assert "\n" not in str(raised.value)


def route_of_one(buffer: ep.Buffer) -> dict[str, torch.Tensor]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        torch.zeros(8, 1, dtype=torch.int64), 1
    )
    return {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
