# SPDX-License-Identifier: MIT
"""Operations of buffers that check what arrives."""

from __future__ import annotations

import time

import ml_dtypes
import numpy as np

import mscclpp_ep as ep
from harness import steps
from harness.cases import Case, world_of
from harness.programs import graphs

PATIENCE = 20.0


def high_throughput(context, case: Case, seed: int) -> None:
    """A dispatch, cached ones and combines, all compared with the oracle."""
    world = world_of(case, seed, context.size)
    buffer = context.standing(integrity_check=True)
    first = steps.dispatch(context, buffer, world)
    steps.verify_dispatch(context, world, first)
    steps.verify_drops(context, buffer, world)
    for turn in range(2):
        again = steps.dispatch_again(context, buffer, world, first.handle, turn)
        steps.verify_rows(context, world, again, turn)
        steps.verify_combine(
            context, world, steps.combine(context, buffer, world, first.handle, turn), turn
        )
    steps.forget_drops(buffer)


def indices_are_the_callers(context, case: Case, seed: int) -> None:
    """A caller who writes to the source indices of a handle does not make its rows damaged."""
    world = world_of(case, seed, context.size)
    buffer = context.standing(integrity_check=True)
    first = steps.dispatch(context, buffer, world)
    context.backend.write(first.handle[3], 77)
    again = steps.dispatch_again(context, buffer, world, first.handle, 1)
    steps.verify_rows(context, world, again, 1)
    steps.verify_combine(context, world, steps.combine(context, buffer, world, first.handle))


def scribbling(context, rows):
    """A graph that writes to rows, again and again, for some milliseconds."""
    torch = context.backend.torch
    numbers = rows.view(torch.int16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(3000):
            numbers.add_(1)
    return stream, graph


def changed_on_the_way(context, operation: str, seed: int) -> str:
    """Rank 0's rows change between their checksum and their use; somebody notices."""
    torch = context.backend.torch
    world = world_of(Case(tokens=(2000,), hidden=2048), seed, context.size)
    buffer = context.buffer(integrity_check=True, timeout=PATIENCE, num_nvl_bytes=64 << 20)
    arguments = steps.dispatch_arguments(context, world)
    first = steps.unpack(buffer.dispatch(**arguments))
    rows = buffer.empty(first.x.shape, first.x.dtype)
    rows.copy_(first.x)
    changing, call = {
        "dispatch": (arguments["x"], lambda: buffer.dispatch(**arguments)),
        "combine": (rows, lambda: buffer.combine(rows, first.handle)),
        "combine, ordinary input": (first.x.clone(), None),
    }[operation]
    call = call or (lambda: buffer.combine(changing, first.handle))
    results = [call()]  # undisturbed
    stream, graph = scribbling(context, changing)
    buffer.check()
    with context.group() as group:
        group.barrier()
    if context.rank == 0:
        with torch.cuda.stream(stream):
            graph.replay()

    def until_it_is_known() -> None:
        for _ in range(3):
            results[:] = [call()]
            buffer.check()

    start = time.monotonic()
    message = str(steps.raised(ep.PeerFailure, until_it_is_known))
    assert time.monotonic() - start < PATIENCE / 2, "nobody waits for a rank that has stopped"
    torch.cuda.synchronize()
    noticed = "integrity check" in message
    if noticed and operation == "dispatch":
        assert (results[0][1] == -1).all(), "indices of rows that were damaged"
    return message


def replayed(context, case: Case, seed: int) -> None:
    """Dispatch and combine of a graph, each replay in an operation of another number."""
    world = world_of(case, seed, context.size)
    buffer = context.buffer(integrity_check=True)
    arguments = steps.dispatch_arguments(context, world)
    arguments["num_worst_tokens"] = world.capacity + 2
    graph, result, combined = graphs.capture(context, buffer, arguments)
    for _ in range(5):
        graphs.poison(context, result.x, result.topk_idx, result.topk_weights, combined)
        graph.replay()
        graphs.verify(context, world, result, combined)
    buffer.check()


def low_latency(context, options: dict, exact: bool, seed: int) -> None:
    """The same bits come as without the mode."""
    results = []
    for checked in (False, True):
        buffer = context.buffer(integrity_check=checked)
        results.append(_round_trip(context, buffer, options, exact, seed))
    for plain, checked in zip(*results, strict=True):
        steps.same_bits(checked, plain, "what came with the mode")


def _round_trip(context, buffer, options: dict, exact: bool, seed: int) -> list[np.ndarray]:
    array, host = context.backend.array, context.backend.host
    random = np.random.default_rng([seed, context.rank])
    x = random.standard_normal((7, 256)).astype(ml_dtypes.bfloat16)
    idx = random.integers(-1, 3 * context.size, (7, 4))
    weights = random.random((7, 4), np.float32)
    sent = {"topk_weights": array(weights)} if options.get("with_weights") else {}
    flags = {name: value for name, value in options.items() if name != "with_weights"}
    rows, counts, handle, _, _ = buffer.low_latency_dispatch(
        array(x), array(idx), 8, 3 * context.size, **flags, **sent
    )
    parts = rows if isinstance(rows, tuple) else (rows,)
    counts = host(counts)
    got = [counts, *(host(part)[e, :n] for part in parts for e, n in enumerate(counts))]
    outputs = np.zeros((3, 8 * context.size, 256), ml_dtypes.bfloat16)
    for e, n in enumerate(counts):
        outputs[e, :n] = host(parts[0])[e, :n].astype(np.float32)
    extra = {"exact": True} if exact else {}
    combined, _, _ = buffer.low_latency_combine(
        array(outputs), array(idx), array(weights), handle, **extra
    )
    return [*got, host(combined)]


def ranks_agree(context) -> None:
    """One rank that wants the mode is refused, with all others, by what differs."""
    mine = context.rank == context.size - 1
    error = steps.raised(ep.InvalidArgument, context.buffer, integrity_check=mine)
    assert "integrity_check false" in str(error)
    assert "integrity_check true" in str(error)
