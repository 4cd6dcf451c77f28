# SPDX-License-Identifier: MIT
"""The calls of a conformance test, and the comparison of what they return with the oracle."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import mscclpp_ep as ep
from harness import oracle
from harness.cases import Case, World, world_of


def same_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Asserts that dtype, shape and every bit are equal."""
    found, wanted = (actual.dtype, actual.shape), (expected.dtype, expected.shape)
    assert found == wanted, f"{what}: got {found}, expected {wanted}"
    got, want = (np.ascontiguousarray(a).view(np.uint8) for a in (actual, expected))
    if not np.array_equal(got, want):
        at = tuple(int(i[0]) for i in np.nonzero(got != want))
        at = (*at[:-1], at[-1] // actual.dtype.itemsize)
        wrong = np.count_nonzero(got != want)
        raise AssertionError(
            f"{what}: {wrong} bytes differ, first at {list(at)}: "
            f"got {actual[at]!r} ({bits(actual[at])}), expected {expected[at]!r} "
            f"({bits(expected[at])})"
        )


def bits(value: np.generic) -> str:
    return "0x" + value.tobytes()[::-1].hex()


def raised(kind: type | tuple[type, ...], call: Callable, *args, **kwargs) -> BaseException:
    """The exception that the call must raise; it must be of a `kind`."""
    try:
        call(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"{kind} expected, but the call returned")


def names_rank(message: str, rank: int) -> bool:
    return re.search(rf"\brank {rank}\b", message) is not None


def largest_size(message: str) -> float:
    """The largest number of bytes that a message names, in whatever unit."""
    units = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    found = re.findall(r"(\d+(?:\.\d+)?) ?([KMGT]iB)?", message)
    return max((float(number) * units[unit] for number, unit in found), default=0)


@dataclass
class Dispatched:
    """What a dispatch returned."""

    x: Any
    scales: Any
    topk_idx: Any
    topk_weights: Any
    counts: list[int] | None
    handle: Any
    event: Any


def dispatch_arguments(context, world: World, rank: int | None = None) -> dict:
    """Arguments of the dispatch of `world` on this rank, or as `rank` would call it."""
    array = context.backend.array
    sent = world.sent[context.rank if rank is None else rank]
    arguments = {
        "x": array(sent.x) if sent.scales is None else (array(sent.x), array(sent.scales)),
        "num_tokens_per_rank": array(sent.layout.per_rank),
        "is_token_in_rank": array(sent.layout.in_rank),
        "num_tokens_per_expert": array(sent.layout.per_expert),
    }
    if world.case.with_topk:
        arguments |= {"topk_idx": array(sent.topk_idx), "topk_weights": array(sent.topk_weights)}
    if world.case.alignment != 1:
        arguments["expert_alignment"] = world.case.alignment
    if world.num_worst:
        arguments["num_worst_tokens"] = world.num_worst
    return arguments


def unpack(returned: tuple) -> Dispatched:
    x, *rest = returned
    return Dispatched(*(x if isinstance(x, tuple) else (x, None)), *rest)


def dispatch(context, buffer, world: World, **extra) -> Dispatched:
    return unpack(buffer.dispatch(**dispatch_arguments(context, world), **extra))


def dispatch_again(context, buffer, world: World, handle, turn: int, **extra) -> Dispatched:
    """The cached dispatch of the rows of `turn`."""
    x, scales = (context.backend.array(a) for a in world.payloads(turn)[context.rank])
    return unpack(buffer.dispatch(x if scales is None else (x, scales), handle=handle, **extra))


def verify_rows(context, world: World, result: Dispatched, turn: int = 0) -> None:
    """Rows and scales. Those beyond the received ones may hold anything."""
    rank, host = context.rank, context.backend.host
    x, scales = world.received(rank, turn)
    rows = len(world.routes[rank])
    got = host(result.x)
    assert got.shape == (world.num_rows(rank), world.case.hidden), got.shape
    same_bits(got[:rows], x, "recv_x")
    assert (result.scales is None) == (scales is None)
    if scales is not None:
        got = host(result.scales)
        assert got.shape == (world.num_rows(rank), world.case.scales.columns), got.shape
        assert got.flags.c_contiguous
        same_bits(got[:rows], scales, "recv_x_scales")


def verify_topk(context, world: World, result: Dispatched) -> None:
    rank, host = context.rank, context.backend.host
    if not world.case.with_topk:
        assert result.topk_idx is None
        assert result.topk_weights is None
        return
    idx, weights = world.received_topk(rank)
    rows, shape = len(idx), (world.num_rows(rank), world.case.topk)
    got_idx, got_weights = host(result.topk_idx), host(result.topk_weights)
    assert (got_idx.shape, got_weights.shape) == (shape, shape)
    same_bits(got_idx[:rows], idx, "recv_topk_idx")
    same_bits(got_weights[:rows], weights, "recv_topk_weights")
    assert (got_idx[rows:] == -1).all(), "recv_topk_idx of rows that were not received"


def verify_counts(context, world: World, result: Dispatched) -> None:
    rank, counts = context.rank, world.counts(context.rank)
    aligned = [] if world.num_worst else oracle.round_up(counts, world.case.alignment)
    assert result.counts == aligned, f"counts {result.counts}, expected {aligned}"
    assert isinstance(result.counts, list)
    true_count = int(np.asarray(result.handle.num_recv_tokens).item())
    assert true_count == len(world.full_routes[rank])
    per_expert = np.asarray(result.handle.num_recv_tokens_per_expert)
    assert per_expert.dtype in (np.int32, np.int64)
    assert per_expert.tolist() == counts.tolist()


def verify_handle(context, world: World, result: Dispatched) -> None:
    rank, host, handle = context.rank, context.backend.host, result.handle
    masks = [sent.layout.in_rank for sent in world.sent]
    assert isinstance(handle, tuple)
    assert len(handle) == 6
    same_bits(host(handle[4]), masks[rank], "handle[4], is_token_in_rank")
    route = world.routes[rank]
    source_index = host(handle[3])
    assert source_index.shape == (world.num_rows(rank),)
    same_bits(source_index[: len(route)], route.token.astype(np.int32), "handle[3], recv_src_idx")
    assert (source_index[len(route) :] == -1).all(), "recv_src_idx of rows that were not received"
    if all(len(a) == len(b) for a, b in zip(world.routes, world.full_routes, strict=True)):
        matrix = oracle.rank_prefix_matrix(masks, rank)
        same_bits(host(handle[0]), matrix, "handle[0], rank_prefix_matrix")
        same_bits(host(handle[5]), oracle.send_head(masks[rank]), "handle[5], send_head")


def verify_dispatch(context, world: World, result: Dispatched) -> None:
    verify_rows(context, world, result)
    verify_topk(context, world, result)
    verify_counts(context, world, result)
    verify_handle(context, world, result)


def combine_rows(context, buffer, world: World, turn: int = 0):
    """The rows that this rank gives to combine, in the memory that the case asks for."""
    rows = world.outputs(turn)[context.rank]
    in_arena = {"arena": True, "mixed": context.rank % 2 == 0}.get(world.case.source, False)
    if not in_arena:
        return context.backend.array(rows)
    tensor = buffer.empty(rows.shape, context.backend.dtype(rows.dtype))
    context.backend.write(tensor, rows)
    return tensor


def combine_arguments(context, buffer, world: World, turn: int = 0, rows=None) -> tuple:
    """The rows, and the arguments by name."""
    array, case = context.backend.array, world.case
    arguments = {}
    if case.weights and case.with_topk:
        arguments["topk_weights"] = array(world.output_weights(turn)[context.rank])
    biases = tuple(array(b) for b in world.biases(context.rank, turn))
    if biases:
        arguments["bias"] = biases if len(biases) == 2 else biases[0]
    return combine_rows(context, buffer, world, turn) if rows is None else rows, arguments


def combine(context, buffer, world: World, handle, turn: int = 0, rows=None, **extra) -> tuple:
    rows, arguments = combine_arguments(context, buffer, world, turn, rows)
    return buffer.combine(rows, handle, **arguments, **extra)


def verify_combine(context, world: World, returned: tuple, turn: int = 0) -> None:
    host, rank = context.backend.host, context.rank
    x, weights, event = returned
    same_bits(host(x), world.combined(rank, turn), "combined x")
    if world.case.weights and world.case.with_topk:
        same_bits(host(weights), world.combined_weights(rank, turn), "combined weights")
    else:
        assert weights is None
    wait(event)


def wait(event) -> None:
    """Returned events are complete on the CPU; elsewhere they are waited for."""
    if event.event is not None:
        event.current_stream_wait()


def soil(context, buffer, seed: int, mapped: int = 0) -> None:
    """Leaves garbage in the memory that the next results are made of. Collective.

    NaNs in the rows, valid indices, and sizes unlike those of the case. `mapped` is the number of
    experts of a buffer with the expert map of this seed.
    """
    rng = np.random.default_rng((seed, 99))
    case = Case(
        "garbage",
        tokens=tuple(int(t) for t in rng.integers(40, 90, 3)),
        hidden=int(rng.integers(100, 400)),
        topk=int(rng.integers(1, 12)),
        experts=mapped or int(rng.integers(context.size, 40)),
        shuffled_experts=mapped > 0,
        routing="duplicates",
        dtype="float32",
        values="bits",
        combine_dtype="float32",
        source="received",
    )
    world = world_of(case, seed, context.size)
    result = dispatch(context, buffer, world)
    combine(context, buffer, world, result.handle, rows=result.x)


def verify_drops(context, buffer, world: World) -> None:
    """After a dispatch check() tells, once, whether rows found no place, and how many."""
    full, kept = len(world.full_routes[context.rank]), len(world.routes[context.rank])
    if full > kept:
        message = str(raised(ep.Error, buffer.check))
        assert str(full) in message, message
        assert str(kept) in message, message
    buffer.check()


def forget_drops(buffer) -> None:
    """Takes what check() may have to tell of earlier operations."""
    with contextlib.suppress(ep.Error):
        buffer.check()


def round_trip(context, buffer, case: Case, seed: int) -> None:
    """Dispatch and combine of a case, both compared with the oracle."""
    world = world_of(case, seed, context.size)
    result = dispatch(context, buffer, world)
    verify_dispatch(context, world, result)
    rows = result.x if case.source == "received" else None
    verify_combine(context, world, combine(context, buffer, world, result.handle, rows=rows))
