# SPDX-License-Identifier: MIT
"""A mixture-of-experts layer in Torch, without a GPU, compared with the same layer in one process.

torchrun --nproc-per-node 4 torch_moe.py
"""

import torch
import torch.distributed as dist

import mscclpp_ep as ep

TOKENS, HIDDEN, FFN, EXPERTS, TOPK = 96, 256, 512, 8, 2


def make_expert(index):
    """The experts of all ranks are known by their seeds, so that anybody can check."""
    random = torch.Generator().manual_seed(index)
    up = torch.randn(HIDDEN, FFN, generator=random) / HIDDEN**0.5
    down = torch.randn(FFN, HIDDEN, generator=random) / FFN**0.5
    return lambda x: torch.nn.functional.silu(x.float() @ up) @ down


def apply_experts(x, topk_idx, topk_weights, experts):
    """Sum, for each row, the weighted outputs of those of the experts that it chose."""
    result = torch.zeros(x.shape)
    for index, expert in enumerate(experts):
        rows, choices = torch.nonzero(topk_idx == index, as_tuple=True)
        result[rows] += topk_weights[rows, choices, None] * expert(x[rows])
    return result


def main():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    block = -(-EXPERTS // ranks)
    experts = [make_expert(index) for index in range(EXPERTS)]

    torch.manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    scores = torch.randn(TOKENS, EXPERTS).softmax(dim=1)
    topk_weights, topk_idx = scores.topk(TOPK, dim=1)

    with ep.Buffer(dist.group.WORLD, device="cpu") as buffer:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )
        mine = experts[rank * block : (rank + 1) * block]
        expert_output = apply_experts(recv_x, recv_idx, recv_weights, mine)
        output, _, _ = buffer.combine(expert_output.bfloat16(), handle)

        expected = apply_experts(x, topk_idx, topk_weights, experts)
        torch.testing.assert_close(output.float(), expected, rtol=2**-6, atol=2**-6)
    print(f"rank {rank}: {len(recv_x)} rows, {counts} for its experts; the result is right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
