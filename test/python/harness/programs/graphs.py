# SPDX-License-Identifier: MIT
"""CUDA graphs of a dispatch and a combine, replayed with other tokens and other routing."""

from __future__ import annotations

import contextlib

import numpy as np

from harness import steps
from harness.cases import Case, World, world_of


def poison(context, *tensors) -> None:
    """Fills tensors with bytes that no result has."""
    torch = context.backend.torch
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0xA5)


def update(context, arguments: dict, world: World) -> None:
    """Gives the captured inputs the values of another world."""
    for name, tensor in steps.dispatch_arguments(context, world).items():
        if isinstance(tensor, context.backend.torch.Tensor):
            arguments[name].copy_(tensor)


def echo_of(world: World, rank: int) -> np.ndarray:
    """The combine of the rows as they came: a multiple of each token, exact in float32."""
    sent = world.sent[rank]
    ranks = sent.layout.in_rank.sum(1, keepdims=True)
    total = np.where(ranks > 0, sent.x.astype(np.float32) * ranks, np.float32(0))
    return total.astype(sent.x.dtype)


def verify(context, world: World, result: steps.Dispatched, combined) -> None:
    host, rank = context.backend.host, context.rank
    x, _ = world.received(rank)
    idx, weights = world.received_topk(rank)
    rows = len(idx)
    steps.same_bits(host(result.x)[:rows], x, "recv_x")
    steps.same_bits(host(result.topk_idx)[:rows], idx, "recv_topk_idx")
    steps.same_bits(host(result.topk_weights)[:rows], weights, "recv_topk_weights")
    assert (host(result.topk_idx)[rows:] == -1).all()
    assert (host(result.handle[3])[rows:] == -1).all()
    assert int(host(result.handle.num_recv_tokens_on_device)[0]) == rows
    steps.same_bits(host(combined), echo_of(world, rank), "combined x")


def capture(context, buffer, arguments: dict) -> tuple:
    """A graph of a dispatch and a combine, and what they will return."""
    torch = context.backend.torch
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = steps.unpack(buffer.dispatch(**arguments))
        combined, _, _ = buffer.combine(result.x, result.handle)
    return graph, result, combined


def replays(context, case: Case, seed: int, times: int) -> None:
    """Each replay sees its own inputs, in memory that was poisoned before."""
    worlds = [world_of(case, seed + turn, context.size) for turn in range(8)]
    buffer = context.buffer()
    arguments = steps.dispatch_arguments(context, worlds[0])
    arguments["num_worst_tokens"] = worlds[0].capacity + 3
    graph, result, combined = capture(context, buffer, arguments)
    for turn in range(times):
        world = worlds[turn % len(worlds)]
        update(context, arguments, world)
        poison(context, result.x, result.topk_idx, result.topk_weights, combined)
        graph.replay()
        verify(context, world, result, combined)
    buffer.check()
    # The buffer goes on as before, beside the graph, and the graph after that.
    steps.round_trip(context, buffer, case, seed)
    update(context, arguments, worlds[1])
    graph.replay()
    verify(context, worlds[1], result, combined)


def cached(context, case: Case, seed: int) -> None:
    """A repeated dispatch with a handle that was made before the graph."""
    torch = context.backend.torch
    world = world_of(case, seed, context.size)
    buffer = context.buffer()
    first = steps.dispatch(context, buffer, world)
    x = context.backend.array(world.payloads(0)[context.rank][0])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = steps.unpack(buffer.dispatch(x, handle=first.handle))
    del first
    for turn in range(5):
        x.copy_(context.backend.array(world.payloads(turn)[context.rank][0]))
        poison(context, result.x)
        graph.replay()
        steps.verify_rows(context, world, result, turn)


def outlive(context, case: Case, seed: int) -> None:
    """A graph and its buffer go; the first call of the next buffer is captured as well."""
    world = world_of(case, seed, context.size)
    for _ in range(3):
        arguments = steps.dispatch_arguments(context, world)
        arguments["num_worst_tokens"] = world.capacity
        buffer = context.buffer()
        graph, result, combined = capture(context, buffer, arguments)
        graph.replay()
        verify(context, world, result, combined)
        buffer.destroy()
        del graph, result, combined


def left_behind_a_replay(context, seed: int) -> None:
    """Rank 0 leaves by an exception, while the others, which are late, count on its replay."""
    world = world_of(Case(tokens=(20, 7)), seed, context.size)
    buffer = context.buffer()
    arguments = steps.dispatch_arguments(context, world)
    arguments["num_worst_tokens"] = world.capacity
    graph, result, combined = capture(context, buffer, arguments)
    graph.replay()
    verify(context, world, result, combined)
    poison(context, result.x, result.topk_idx, result.topk_weights, combined)
    if context.rank == 0:
        with contextlib.suppress(LookupError), buffer:
            graph.replay()
            raise LookupError
    else:
        context.backend.delay()
        graph.replay()
        buffer.check()
    verify(context, world, result, combined)


def without_room(context, seed: int) -> None:
    """What would wait for counts is refused while a graph is captured, by all ranks."""
    import mscclpp_ep as ep

    torch = context.backend.torch
    world = world_of(Case(), seed, context.size)
    buffer = context.buffer()
    arguments = steps.dispatch_arguments(context, world)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = torch.zeros(1, device=context.backend.device)
        error = steps.raised(ep.InvalidArgument, buffer.dispatch, **arguments)
    assert "num_worst_tokens" in str(error)
    assert kept.numel() == 1
    steps.round_trip(context, buffer, Case(), seed)
