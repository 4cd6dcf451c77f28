# SPDX-License-Identifier: MIT
"""Low-latency operations, compared with the oracle."""

from __future__ import annotations

import gc
import itertools
import re

import numpy as np

import mscclpp_ep as ep
from harness import cases, steps
from harness import low_latency as ll
from harness.low_latency import Case, World, world_of

QUICK = Case("quick", tokens=(5, 0, 9), hidden=33, kind="fp8")


def buffer_for(context, world: World):
    if world.expert_map is None:
        return context.standing()
    return context.buffer(expert_map=world.expert_map)


def check(context, case: Case, seed: int) -> None:
    """Two round trips, the second in memory that the first one's results leave full of garbage."""
    world = world_of(case, seed, context.size)
    buffer = buffer_for(context, world)
    result = ll.dispatch(context, buffer, world)
    ll.verify_dispatch(context, world, result)
    returned = ll.combine(context, buffer, world, result.handle)
    ll.verify_combine(context, world, returned)
    ll.poison_dispatch(context, result)
    ll.poison(context, returned[0])
    del result, returned
    ll.round_trip(context, buffer, case, seed, turn=1)


def one_handle_many_combines(context, case: Case, seed: int) -> None:
    """Both orders of summation, other rows, and early weights, of one dispatch."""
    world = world_of(case, seed, context.size)
    buffer = context.standing()
    result = ll.dispatch(context, buffer, world)
    for turn, exact in enumerate([False, True, True, False]):
        returned = ll.combine(context, buffer, world, result.handle, turn, exact=exact)
        ll.verify_combine(context, world, returned, turn, exact=exact)
    ll.verify_dispatch(context, world, result)


def outputs_given(context, case: Case, seed: int) -> None:
    """`out=` is filled, all of it and nothing else, and returned."""
    world = world_of(case, seed, context.size)
    buffer, rank = context.standing(), context.rank
    handle = ll.dispatch(context, buffer, world).handle
    tokens = world.num_tokens(rank)
    around = np.full((tokens + 2, case.hidden), np.nan, cases.dtype_of(case.combine_dtype))
    before = around.copy()
    out = context.backend.array(around[1 : tokens + 1])
    returned = ll.combine(context, buffer, world, handle, out=out)
    assert returned[0] is out
    ll.verify_combine(context, world, returned)
    steps.same_bits(around[[0, -1]], before[[0, -1]], "what lies around out")


def zero_copy(context, seed: int) -> None:
    """The rows lie in the library's memory; x only tells dtype and shape."""
    case = Case(tokens=(9, 4), hidden=70)
    world = world_of(case, seed, context.size)
    buffer, rank, host = context.standing(), context.rank, context.backend.host
    for turn in range(3):
        handle = ll.dispatch(context, buffer, world, turn).handle
        rows = buffer.get_next_low_latency_combine_buffer(handle)
        again = buffer.get_next_low_latency_combine_buffer(handle)
        assert host(rows).shape == (world.num_experts(rank), world.size * world.most, case.hidden)
        assert host(rows).dtype == cases.dtype_of("bfloat16")
        host(rows)[...] = world.rows(turn)[rank]
        steps.same_bits(host(again), host(rows), "the buffer that was asked for again")
        dummy = context.backend.array(np.zeros_like(world.rows(turn)[rank]))
        pending = ll.combine(
            context, buffer, world, handle, x=dummy, zero_copy=True, return_recv_hook=turn == 1
        )
        if turn == 1:
            del rows, again
            gc.collect()
            pending[2]()
        ll.verify_combine(context, world, pending, turn)
    arguments = ll.combine_arguments(context, world, handle) | {"zero_copy": True}
    error = steps.raised(ep.InvalidArgument, buffer.low_latency_combine, **arguments)
    assert "get_next_low_latency_combine_buffer" in str(error)
    ll.round_trip(context, buffer, QUICK, seed)


def stats(context, seed: int) -> None:
    """Counts and waiting times are added to what the tensors hold."""
    case = Case(tokens=(9, 0, 14), experts=10, kind="fp8", routing="holes")
    world = world_of(case, seed, context.size)
    buffer, array = context.standing(), context.backend.array
    counts = array(np.full(world.num_experts(context.rank), 1000, np.int32))
    waits = [array(np.full(context.size, 10**15, np.int64)) for _ in range(2)]
    for turn in range(3):
        before = [context.backend.host(w).copy() for w in waits]
        result = ll.dispatch(
            context,
            buffer,
            world,
            turn,
            cumulative_local_expert_recv_stats=counts,
            dispatch_wait_recv_cost_stats=waits[0],
        )
        ll.verify_dispatch(context, world, result, turn)
        returned = ll.combine(
            context, buffer, world, result.handle, turn, combine_wait_recv_cost_stats=waits[1]
        )
        ll.verify_combine(context, world, returned, turn)
        expected = 1000 + (turn + 1) * world.slots.counts(context.rank).astype(np.int32)
        steps.same_bits(context.backend.host(counts), expected.astype(np.int32), "recv stats")
        for old, new in zip(before, map(context.backend.host, waits), strict=True):
            assert (new >= old).all()
            assert (new - old < 60 * 10**9).all()


def hooks(context, order: str, same_order: bool, seed: int) -> None:
    """Two operations are out, of all kinds; hooks come in either order, and not alike on ranks."""
    case = Case(tokens=(6, 11, 3), hidden=130, kind="rounded")
    first, second = (world_of(case, seed + i, context.size) for i in range(2))
    buffer = context.standing()
    backwards = (order == "backwards") != (not same_order and context.rank % 2 == 1)

    def call_all(*pending) -> None:
        for hook in reversed(pending) if backwards else pending:
            assert hook() is None

    for turn in range(3):
        results = [
            ll.dispatch(context, buffer, world, turn, return_recv_hook=True)
            for world in (first, second)
        ]
        assert all(result.event.event is None for result in results)
        call_all(*(result.hook for result in results))
        for world, result in zip((first, second), results, strict=True):
            ll.verify_dispatch(context, world, result, turn)
        sent = [
            ll.combine(context, buffer, world, result.handle, turn, return_recv_hook=True)
            for world, result in zip((first, second), results, strict=True)
        ]
        call_all(*(returned[2] for returned in sent))
        for world, returned in zip((first, second), sent, strict=True):
            ll.verify_combine(context, world, returned, turn)


def combine_and_dispatch_overlap(context, seed: int) -> None:
    """The dispatch of one batch is out while the other is combined, as two micro-batches do."""
    case = Case(tokens=(8, 5), hidden=96, kind="ue8m0")
    worlds = [world_of(case, seed + i, context.size) for i in range(2)]
    buffer = context.standing()
    current = ll.dispatch(context, buffer, worlds[0])
    for turn in range(6):
        this, other = worlds[turn % 2], worlds[(turn + 1) % 2]
        coming = ll.dispatch(context, buffer, other, turn + 1, return_recv_hook=True)
        returned = ll.combine(context, buffer, this, current.handle, turn, return_recv_hook=True)
        pending = [coming.hook, returned[2]]
        for hook in pending if turn % 2 else reversed(pending):
            hook()
        ll.verify_dispatch(context, other, coming, turn + 1)
        ll.verify_combine(context, this, returned, turn)
        current = coming


def hook_misuse(context, seed: int) -> None:
    """A third operation, a second call of a hook, and a combine before the hook are refused."""
    world = world_of(QUICK, seed, context.size)
    buffer = context.standing()
    one, two = (ll.dispatch(context, buffer, world, t, return_recv_hook=True) for t in (0, 1))
    for attempt in (ll.dispatch, ll.dispatch):
        error = steps.raised(ep.InvalidArgument, attempt, context, buffer, world)
        assert "hook" in str(error), error
    bad = {"topk_idx": None}
    steps.raised(ep.InvalidArgument, ll.dispatch, context, buffer, world, **bad)
    one.hook()
    three = ll.dispatch(context, buffer, world, 2, return_recv_hook=True)
    three.hook()
    two.hook()
    for hook in (one.hook, two.hook, three.hook, one.hook):
        error = steps.raised(ep.InvalidArgument, hook)
        assert "received" in str(error), error
    for turn, result in enumerate((one, two, three)):
        ll.verify_dispatch(context, world, result, turn)
    early = ll.dispatch(context, buffer, world, return_recv_hook=True)
    error = steps.raised(ep.InvalidArgument, ll.combine, context, buffer, world, early.handle)
    assert "hook" in str(error), error
    early.hook()
    ll.verify_dispatch(context, world, early)
    returned = ll.combine(context, buffer, world, early.handle)
    ll.verify_combine(context, world, returned)
    ll.round_trip(context, buffer, QUICK, seed)


def newer_hook_first(context, seed: int) -> None:
    """While the older of two is out no third can be sent, even if the newer was received."""
    world = world_of(QUICK, seed, context.size)
    buffer = context.standing()
    one, two = (ll.dispatch(context, buffer, world, t, return_recv_hook=True) for t in (0, 1))
    two.hook()
    error = steps.raised(ep.InvalidArgument, ll.dispatch, context, buffer, world)
    assert "hook" in str(error), error
    assert not re.search("two .* not received", str(error)), error
    one.hook()
    for turn, result in enumerate((one, two)):
        ll.verify_dispatch(context, world, result, turn)
    ll.round_trip(context, buffer, QUICK, seed)


def hooks_never_called(context, pending: int, seed: int) -> None:
    """Operations that are out when a buffer is destroyed hold nobody up."""
    world = world_of(QUICK, seed, context.size)
    buffer = context.buffer()
    kept = ll.dispatch(context, buffer, world)
    waiting = [
        ll.dispatch(context, buffer, world, turn, return_recv_hook=True) for turn in range(pending)
    ]
    buffer.destroy()
    for result in waiting:
        assert "destroy" in str(steps.raised(ep.InvalidArgument, result.hook))
    ll.verify_dispatch(context, world, kept)
    steps.raised(ep.InvalidArgument, ll.dispatch, context, buffer, world)
    steps.raised(ep.InvalidArgument, ll.combine, context, buffer, world, kept.handle)
    del waiting, kept
    gc.collect()


def hook_outlives_everything_else(context, seed: int) -> None:
    """A hook keeps its tensors alive; the caller may drop all but the results."""
    world = world_of(QUICK, seed, context.size)
    buffer = context.standing()
    for turn in range(3):
        array, rank = context.backend.array, context.rank
        weights = np.array(world.topk_weights[rank])
        extra = {
            "topk_weights": array(weights),
            "topk_idx": array(world.topk_idx[rank].copy()),
        }
        result = ll.dispatch(context, buffer, world, turn, return_recv_hook=True, **extra)
        del extra
        gc.collect()
        result.hook()
        ll.verify_dispatch(context, world, result, turn)
        extra = {"topk_weights": array(weights), "x": array(world.rows(turn)[rank].copy())}
        returned = ll.combine(
            context, buffer, world, result.handle, turn, return_recv_hook=True, **extra
        )
        del extra
        gc.collect()
        returned[2]()
        ll.verify_combine(context, world, returned, turn)


def inputs_may_change_once_sent(context, seed: int) -> None:
    """After the sending call the rows are the caller's again: they were taken."""
    world = world_of(Case(tokens=(9, 3), hidden=40), seed, context.size)
    buffer, array, rank = context.standing(), context.backend.array, context.rank
    x, idx = world.x(rank), world.topk_idx[rank].copy()
    result = ll.dispatch(
        context, buffer, world, x=array(x), topk_idx=array(idx), return_recv_hook=True
    )
    ll.poison(context, x)
    idx[...] = 0
    result.hook()
    ll.verify_dispatch(context, world, result)
    rows = world.rows(0)[rank].copy()
    returned = ll.combine(
        context, buffer, world, result.handle, x=array(rows), return_recv_hook=True
    )
    ll.poison(context, rows)
    returned[2]()
    ll.verify_combine(context, world, returned)


def inputs_stay(context, kind: str, seed: int) -> None:
    """Inputs that cannot be written are taken, and no input is changed."""
    world = world_of(Case(kind=kind, hidden=130), seed, context.size)
    buffer = context.standing()

    def frozen(arguments: dict) -> dict:
        copies = {n: np.array(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
        for value in copies.values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
        return copies

    given = ll.dispatch_arguments(context, world)
    mine = frozen(given)
    result = ll.unpack(buffer.low_latency_dispatch(**mine))
    ll.verify_dispatch(context, world, result)
    later = ll.combine_arguments(context, world, result.handle)
    mine |= frozen(later)
    returned = buffer.low_latency_combine(**{name: mine[name] for name in later})
    ll.verify_combine(context, world, returned)
    for name, value in (given | later).items():
        if isinstance(value, np.ndarray):
            steps.same_bits(mine[name], value, name)


def results_outlive_calls(context, seed: int) -> None:
    """Results of many operations stay what they were, through both lanes and growing sizes."""
    kept = []
    buffer = context.buffer()
    for turn in range(8):
        case = Case(
            tokens=(3 + 5 * turn, 9),
            hidden=16 << turn % 4,
            kind=ll.KINDS[turn % 4],
            exact=turn % 3 == 0,
        )
        world = world_of(case, seed + turn, context.size)
        result = ll.dispatch(context, buffer, world)
        kept.append((world, result, ll.combine(context, buffer, world, result.handle)))
    for world, result, returned in kept:
        ll.verify_dispatch(context, world, result)
        ll.verify_combine(context, world, returned)
    for world, result, _ in kept[::-3]:
        again = ll.combine(context, buffer, world, result.handle, 1)
        ll.verify_combine(context, world, again, 1)
    buffer.destroy()
    for world, result, returned in kept:
        ll.verify_dispatch(context, world, result)
        ll.verify_combine(context, world, returned)


def both_modes(context, seed: int) -> None:
    """Low-latency and high-throughput operations in turn, hooks out across the latter."""
    buffer = context.standing()
    case = cases.Case(tokens=(20, 7, 31), topk=3, bias=1)
    world = world_of(QUICK, seed, context.size)
    for turn in range(4):
        other = cases.world_of(case, seed + turn, context.size)
        pending = ll.dispatch(context, buffer, world, turn, return_recv_hook=True)
        result = steps.dispatch(context, buffer, other)
        pending.hook()
        returned = ll.combine(context, buffer, world, pending.handle, turn, return_recv_hook=True)
        steps.verify_dispatch(context, other, result)
        combined = steps.combine(context, buffer, other, result.handle)
        returned[2]()
        ll.verify_dispatch(context, world, pending, turn)
        ll.verify_combine(context, world, returned, turn)
        steps.verify_combine(context, other, combined)
        buffer.clean_low_latency_buffer(world.most, QUICK.hidden, QUICK.experts)


def across_epochs(context, first: int, seed: int) -> None:
    """Operations of both lanes on either side of the first epoch's end."""
    buffer = context.buffer(first_epoch=first)
    for turn in range(8):
        kind, exact = ll.KINDS[turn % 4], turn % 3 == 1
        case = QUICK.but(kind=kind, exact=exact, early_weights=turn % 2 == 1)
        ll.round_trip(context, buffer, case, seed + turn)
        if turn % 2:
            steps.round_trip(context, buffer, cases.Case(tokens=(4, 0, 7)), seed + turn)
    world = world_of(QUICK, seed, context.size)
    for _ in range(4):
        out = [ll.dispatch(context, buffer, world, t, return_recv_hook=True) for t in (0, 1)]
        for t, result in enumerate(out):
            result.hook()
            ll.verify_dispatch(context, world, result, t)
        assert out[1].handle.epoch == out[0].handle.epoch + 1


def async_events(context, seed: int) -> None:
    """`async_finish` changes nothing but that there is an event."""
    world = world_of(QUICK, seed, context.size)
    buffer = context.standing()
    result = ll.dispatch(context, buffer, world, async_finish=True)
    assert result.event.event is not None
    assert result.hook is None
    ll.verify_dispatch(context, world, result)
    returned = ll.combine(context, buffer, world, result.handle, async_finish=True)
    assert returned[1].event is not None
    assert returned[2] is None
    ll.verify_combine(context, world, returned)


def sum_of_copies(context, seed: int) -> None:
    """Without the oracle: weights of 1 and rows that come back as they came add up to copies."""
    case = Case(tokens=(31, 0, 17), hidden=33, experts=9, topk=3, routing="holes")
    world, buffer = world_of(case, seed, context.size), context.standing()
    rank = context.rank
    x = np.rint(world.x(rank).astype(np.float32) * 4).astype(world.x(rank).dtype)
    ones = np.ones_like(world.topk_weights[rank])
    copies = (world.topk_idx[rank] >= 0).sum(1, keepdims=True)
    result = ll.dispatch(context, buffer, world, x=context.backend.array(x))
    for exact in (False, True):
        extra = {"x": result.x, "topk_weights": context.backend.array(ones), "exact": exact}
        out, _, _ = ll.combine(context, buffer, world, result.handle, **extra)
        got = context.backend.host(out).astype(np.float32)
        assert np.array_equal(got, x.astype(np.float32) * copies)


def grows(context, seed: int) -> None:
    """What is sent grows and shrinks, with operations out, in both lanes."""
    buffer = context.buffer()
    sizes = itertools.cycle([(3, 8), (90, 700), (9, 64), (40, 3000), (150, 1024)])
    for turn in range(5):
        out = []
        for step in range(2):
            tokens, hidden = next(sizes)
            case = Case(tokens=(tokens, 5), hidden=hidden, experts=3, topk=2, kind=ll.KINDS[step])
            world = world_of(case, seed + turn, context.size)
            result = ll.dispatch(context, buffer, world, return_recv_hook=True)
            out.append((world, result))
        for world, result in out:
            result.hook()
            ll.verify_dispatch(context, world, result)


def exact_and_default_differ(context, seed: int) -> None:
    """Values for which the two orders of summation cannot give the same bits."""
    case = Case(tokens=(64,), hidden=64, experts=8, topk=8, combine_dtype="bfloat16")
    world = world_of(case, seed, context.size)
    assert context.size == 1 or not np.array_equal(
        world.combined(0, exact=True).view(np.uint16),
        world.combined(0, exact=False).view(np.uint16),
    )
    one_handle_many_combines(context, case, seed)


def logfmt(context, hidden: int, exact: bool, seed: int) -> None:
    """Rows of ten bits an element: sums as close as half a step of the widest range allows."""
    case = Case(tokens=(9, 14), hidden=hidden, experts=8, topk=3, exact=exact)
    world = world_of(case, seed, context.size)
    buffer, array, host = context.standing(), context.backend.array, context.backend.host
    handle = ll.dispatch(context, buffer, world).handle
    rng = np.random.default_rng([seed, context.rank])
    shape = world.rows(0)[context.rank].shape
    # Below 1 in sums as well, and over some octaves, so that rows are encoded.
    rows = np.exp2(rng.uniform(-12, -4, shape)) * rng.choice([-1, 1], shape)
    rows = rows.astype(cases.dtype_of("bfloat16"))

    def combined(x: np.ndarray, weights: np.ndarray, **extra) -> np.ndarray:
        changes = {"x": array(x), "topk_weights": array(weights)} | extra
        return host(ll.combine(context, buffer, world, handle, **changes)[0]).astype(np.float64)

    weights = world.topk_weights[context.rank]
    plain = combined(rows, weights)
    coded = combined(rows, weights, use_logfmt=True)
    # What every term can be off by: half a step of 32 octaves in 510, and two roundings.
    bound = combined(abs(rows), abs(weights)) * (2 ** (32 / 510 / 2) - 1 + 2**-7) + 1e-30
    assert (abs(coded - plain) <= bound).all(), (abs(coded - plain) / bound).max()
    assert hidden < 16 or not np.array_equal(coded, plain), "nothing was encoded"
    repeated = combined(rows, weights, use_logfmt=True)
    steps.same_bits(repeated, coded, "the same sums again")
