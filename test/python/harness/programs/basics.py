# SPDX-License-Identifier: MIT
"""One operation, or one round trip, compared with the oracle."""

from __future__ import annotations

import numpy as np

import mscclpp_ep as ep
from harness import oracle, steps
from harness.cases import Case, World, world_of


def buffer_for(context, world: World):
    """The standing buffer for a world, with garbage in its arena."""
    mapped = world.expert_map is not None
    buffer = context.buffer(expert_map=world.expert_map) if mapped else context.standing()
    steps.soil(context, buffer, world.seed, world.case.experts if mapped else 0)
    return buffer


def check_layout(context, case: Case, seed: int) -> None:
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    idx = world.sent[context.rank].topk_idx
    got = buffer.get_dispatch_layout(context.backend.array(idx), case.experts)
    compare_layout(context, got, oracle.layout(idx, context.size, world.placement))
    again = context.backend.array(idx)
    buffer.get_dispatch_layout(again, num_experts=case.experts, previous_event=got[-1])


def check_layout_dry(context, case: Case, seed: int) -> None:
    """As `check_layout`, without an operation before."""
    world = world_of(case, seed, context.size)
    idx = world.sent[context.rank].topk_idx
    got = context.standing().get_dispatch_layout(context.backend.array(idx), case.experts)
    compare_layout(context, got, oracle.layout(idx, context.size, world.placement))


def compare_layout(context, got: tuple, expected: oracle.Layout) -> None:
    per_rank, per_node, per_expert, in_rank, event = got
    steps.wait(event)
    host = context.backend.host
    assert per_node is None
    steps.same_bits(host(per_rank), expected.per_rank, "num_tokens_per_rank")
    steps.same_bits(host(per_expert), expected.per_expert, "num_tokens_per_expert")
    steps.same_bits(host(in_rank), expected.in_rank, "is_token_in_rank")


def layout_is_local(context, case: Case, seed: int) -> None:
    """Ranks ask for layouts unequally often, and go on together."""
    world = world_of(case, seed, context.size)
    buffer = context.standing()
    for _ in range(3 * context.rank):
        idx = context.backend.array(world.sent[context.rank].topk_idx)
        buffer.get_dispatch_layout(idx, case.experts)
    steps.round_trip(context, buffer, case, seed)


def check_dispatch(context, case: Case, seed: int) -> None:
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    steps.verify_dispatch(context, world, steps.dispatch(context, buffer, world))


def check_combine(context, case: Case, seed: int) -> None:
    world = world_of(case, seed, context.size)
    steps.round_trip(context, buffer_for(context, world), case, seed)


def as_users_do(context, case: Case, seed: int) -> None:
    """Layout, dispatch and combine, each fed with what the one before returned."""
    world = world_of(case, seed, context.size)
    buffer, array = buffer_for(context, world), context.backend.array
    sent = world.sent[context.rank]
    idx, weights = array(sent.topk_idx), array(sent.topk_weights)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        idx, case.experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    )
    steps.wait(event)
    result = steps.unpack(
        buffer.dispatch(
            array(sent.x),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=weights,
            config=ep.Config(20, 6, 256),
        )
    )
    steps.verify_dispatch(context, world, result)
    x, weights, event = buffer.combine(result.x, result.handle, topk_weights=result.topk_weights)
    steps.wait(event)
    steps.same_bits(context.backend.host(x), world.combined(context.rank), "combined x")
    owned = np.where(sent.topk_idx >= 0, sent.topk_weights, np.float32(0))
    steps.same_bits(context.backend.host(weights), owned, "weights come back as they were sent")


def sum_of_copies(context, seed: int) -> None:
    """Without the oracle: small integers come back times the number of ranks they were sent to."""
    case = Case(tokens=(31, 0, 17), hidden=33, experts=9, topk=3)
    world, buffer = world_of(case, seed, context.size), context.standing()
    sent = world.sent[context.rank]
    x = np.rint(sent.x.astype(np.float32) * 4).astype(sent.x.dtype)
    arguments = steps.dispatch_arguments(context, world) | {"x": context.backend.array(x)}
    result = steps.unpack(buffer.dispatch(**arguments))
    combined, _, _ = buffer.combine(result.x, result.handle)
    ranks = sent.layout.in_rank.sum(1, keepdims=True)
    got = context.backend.host(combined).astype(np.float32)
    assert np.array_equal(got, x.astype(np.float32) * ranks)


def blocks_follow_the_prefix_matrix(context, seed: int) -> None:
    """`handle[0]`: rows of a rank-constant input lie between the prefix sums of their source."""
    world = world_of(Case(tokens=(20, 0, 33, 5)), seed, context.size)
    buffer, rank = context.standing(), context.rank
    x = np.full_like(world.sent[rank].x, rank)
    arguments = steps.dispatch_arguments(context, world) | {"x": context.backend.array(x)}
    result = steps.unpack(buffer.dispatch(**arguments))
    start, rows = 0, context.backend.host(result.x).astype(np.float32)
    for source, end in enumerate(context.backend.host(result.handle[0])[:, rank]):
        assert (rows[start:end] == source).all()
        start = end
    assert start == len(rows)


def asynchronous(context, case: Case, seed: int) -> None:
    """The arguments for streams change nothing but when the result is complete."""
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    flags = {"async_finish": True, "allocate_on_comm_stream": True}
    arguments = steps.dispatch_arguments(context, world)
    # The event stands behind what writes the inputs: a call comes after nothing else.
    result = steps.unpack(buffer.dispatch(**arguments, previous_event=buffer.capture(), **flags))
    steps.wait(result.event)
    steps.verify_dispatch(context, world, result)
    rows, arguments = steps.combine_arguments(context, buffer, world)
    extra = {"previous_event": buffer.capture(), "async_finish": True}
    returned = buffer.combine(rows, result.handle, **arguments, **extra)
    steps.wait(returned[2])
    steps.verify_combine(context, world, returned)
    with ep.EventOverlap(ep.EventHandle()) as overlap:
        assert overlap.event is not None
    ep.EventHandle().current_stream_wait()


def inputs_stay(context, case: Case, seed: int) -> None:
    """Inputs that cannot be written are taken, and no input is changed."""
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    host, read_only = context.backend.host, context.backend.read_only
    arguments = steps.dispatch_arguments(context, world)
    copies = {n: read_only(value) for n, value in arguments.items() if hasattr(value, "dtype")}
    before = {name: np.array(host(value)) for name, value in copies.items()}
    result = steps.unpack(buffer.dispatch(**arguments | copies))
    steps.verify_dispatch(context, world, result)
    for name, value in copies.items():
        steps.same_bits(host(value), before[name], name)
    rows = read_only(context.backend.array(world.outputs()[context.rank]))
    returned = steps.combine(context, buffer, world, result.handle, rows=rows)
    steps.verify_combine(context, world, returned)
    steps.same_bits(host(rows), world.outputs()[context.rank], "input of combine")


def same_framework_in_and_out(context, case: Case, seed: int) -> None:
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    result = steps.dispatch(context, buffer, world)
    tensors = [result.x, result.topk_idx, result.topk_weights]
    tensors += steps.combine(context, buffer, world, result.handle)[:2]
    kind = type(context.backend.array(np.zeros(1)))
    assert [type(t) for t in tensors] == [kind] * 5
    result.x[...] = 0  # results belong to the caller, who may write to them


def combine_twice(context, case: Case, seed: int) -> None:
    """A handle serves any number of combines, and is not used up by them."""
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    result = steps.dispatch(context, buffer, world)
    for turn in range(4):
        returned = steps.combine(context, buffer, world, result.handle, turn)
        steps.verify_combine(context, world, returned, turn)
    steps.verify_dispatch(context, world, result)


def cached(context, case: Case, seed: int) -> None:
    """Other rows by the same routing, between combines, as in a backward pass."""
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    first = steps.dispatch(context, buffer, world)
    steps.verify_drops(context, buffer, world)
    for turn in (1, 0, 2):
        again = steps.dispatch_again(context, buffer, world, first.handle, turn)
        steps.verify_rows(context, world, again, turn)
        rest = (again.topk_idx, again.topk_weights, again.counts, again.handle)
        assert rest == (None, None, None, None)
        steps.wait(again.event)
        returned = steps.combine(context, buffer, world, first.handle, turn)
        steps.verify_combine(context, world, returned, turn)
    steps.verify_dispatch(context, world, first)
    steps.forget_drops(buffer)


def cached_other_dtype(context, seed: int) -> None:
    """A forward pass in FP8 with scales, whose backward pass sends gradients in bfloat16."""
    forward = Case(dtype="float8_e4m3fn", hidden=128, tokens=(12, 30))
    world = world_of(forward, seed, context.size)
    gradients = world_of(forward.but(dtype="bfloat16"), seed, context.size)
    buffer = buffer_for(context, world)
    result = steps.dispatch(context, buffer, world)
    again = steps.dispatch_again(context, buffer, gradients, result.handle, 3)
    steps.verify_rows(context, gradients, again, 3)


def drops_are_reported(context, case: Case, seed: int) -> None:
    """Ranks with too few rows learn of it from check(), once; the others hear nothing."""
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    result = steps.dispatch(context, buffer, world)
    steps.verify_dispatch(context, world, result)
    returned = steps.combine(context, buffer, world, result.handle)
    steps.verify_combine(context, world, returned)
    steps.verify_drops(context, buffer, world)


def same_as_without(context, case: Case, seed: int) -> None:
    """With room for every row, `num_worst_tokens` changes nothing but the shape."""
    world = world_of(case.but(worst="room"), seed, context.size)
    plain = world_of(case.but(worst=""), seed, context.size)
    buffer = buffer_for(context, world)
    padded = steps.dispatch(context, buffer, world)
    exact = steps.dispatch(context, buffer, plain)
    rows, host = len(plain.routes[context.rank]), context.backend.host
    for name in ("x", "topk_idx", "topk_weights"):
        got, want = host(getattr(padded, name)), host(getattr(exact, name))
        steps.same_bits(got[:rows], want, name)
    assert padded.counts == []
    assert exact.counts == oracle.round_up(plain.counts(context.rank), case.alignment)
