# SPDX-License-Identifier: MIT
"""Ranks that are lost between and inside low-latency operations."""

from __future__ import annotations

import signal
import time

import mscclpp_ep as ep
from harness import low_latency as ll
from harness import steps
from harness.low_latency import Case, world_of
from harness.programs.failures import LOST, MARGIN, signal_self_soon, timed

SMALL = Case("small", tokens=(20, 9), kind="fp8", hidden=200)
LARGE = Case("large", tokens=(64,), hidden=4096, experts=16, topk=8)


def expect_the_end(context, buffer, world, timeout: float) -> None:
    """A buffer that lost a rank raises at once, until it is destroyed, which takes no longer."""
    for _ in range(2):
        _, seconds = timed(ep.Error, ll.dispatch, context, buffer, world)
        assert seconds < 5
    steps.raised(ep.Error, buffer.check)
    start = time.monotonic()
    buffer.destroy()
    assert time.monotonic() - start < timeout + MARGIN


def killed_before_the_hook(context, victim: int, timeout: float, seed: int) -> str:
    """The victim dies where the others wait for it, with operations out on both lanes."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    kept = ll.dispatch(context, buffer, world)
    if context.rank == victim:
        signal_self_soon(signal.SIGKILL)
        context.receive()
    pending = [ll.dispatch(context, buffer, world, turn, return_recv_hook=True) for turn in (0, 1)]
    error, seconds = timed(ep.PeerFailure, pending[0].hook)
    assert seconds < timeout, "the end of the connection tells of a death, not the timeout"
    steps.raised(ep.Error, pending[1].hook)
    ll.verify_dispatch(context, world, kept)
    expect_the_end(context, buffer, world, timeout)
    ll.verify_dispatch(context, world, kept)
    return str(error)


def killed_at_work(context, victim: int, after: int, timeout: float, seed: int) -> str:
    """The victim is killed, by the test, somewhere in a stream of operations."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(LARGE, seed, context.size)

    def work() -> None:
        for turn in range(100000):
            pending = ll.dispatch(context, buffer, world, return_recv_hook=turn % 2 == 1)
            if pending.hook is not None:
                pending.hook()
            ll.combine(context, buffer, world, pending.handle, exact=turn % 3 == 0)
            if turn == after and context.rank == victim:
                context.report("at work")

    error, seconds = timed(ep.PeerFailure, work)
    assert seconds < timeout
    expect_the_end(context, buffer, world, timeout)
    return str(error)


def stopped(context, victim: int, timeout: float, seed: int) -> str:
    """The victim is stopped beyond the timeout: the others end in time, and so does it later."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    kept = ll.dispatch(context, buffer, world)
    if context.rank == victim:
        context.report("ready")
    context.receive()
    call = ll.combine if context.rank % 2 == seed % 2 else combine_by_hook
    error, seconds = timed(LOST, call, context, buffer, world, kept.handle)
    assert seconds < timeout + MARGIN
    ll.verify_dispatch(context, world, kept)
    expect_the_end(context, buffer, world, timeout)
    return str(error)


def combine_by_hook(context, buffer, world, handle) -> None:
    ll.combine(context, buffer, world, handle, return_recv_hook=True)[2]()


def absent(context, timeout: float, seed: int) -> str:
    """Rank 0 sends and never receives: two operations later the others say whom they wait for."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    ll.round_trip(context, buffer, SMALL, seed)
    if context.rank == 0:
        pending = [ll.dispatch(context, buffer, world, t, return_recv_hook=True) for t in (0, 1)]
        context.receive()
        error = steps.raised(ep.Error, pending[0].hook)
    else:
        for turn in (0, 1):
            ll.verify_dispatch(context, world, ll.dispatch(context, buffer, world, turn), turn)
        error, seconds = timed(LOST, ll.dispatch, context, buffer, world)
        assert timeout * 0.9 < seconds < timeout + MARGIN
        assert "low-latency dispatch" in str(error), error
        assert steps.names_rank(str(error), 0), error
        context.report("timed out")
    expect_the_end(context, buffer, world, timeout)
    return type(error).__name__


def destroyed_alone(context, timeout: float, seed: int) -> None:
    """Rank 0 destroys its buffer with an operation out; the others are told in their hooks."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    ll.round_trip(context, buffer, SMALL, seed)
    if context.rank == 0:
        start = time.monotonic()
        try:
            buffer.destroy()
        except LOST:
            pass
        assert time.monotonic() - start < timeout + MARGIN
        return
    pending = ll.dispatch(context, buffer, world, return_recv_hook=True)
    error, seconds = timed(ep.Error, pending.hook)
    assert seconds < timeout + MARGIN
    assert steps.names_rank(str(error), 0), error
    expect_the_end(context, buffer, world, timeout)
