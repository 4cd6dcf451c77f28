# SPDX-License-Identifier: MIT
"""Ranks that die, stop or are interrupted, and the others that must not wait for ever."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time

import mscclpp_ep as ep
from harness import steps
from harness.cases import Case, world_of

LARGE = Case("large", tokens=(700,), hidden=2048, experts=16, topk=8)
SMALL = Case("small", tokens=(20, 9))
MARGIN = 10.0  # seconds that a loaded machine may add

# What a rank raises that waited for one that is lost: as it noticed the loss itself, or as it was
# told by another that did. Programs return the message, and the test looks who was named.
LOST = (ep.PeerFailure, ep.Timeout)


def timed(kind, call, *args) -> tuple[BaseException, float]:
    start = time.monotonic()
    error = steps.raised(kind, call, *args)
    return error, time.monotonic() - start


def expect_the_end(context, buffer, world, timeout: float) -> None:
    """A buffer that lost a rank raises at once, until it is destroyed, which takes no longer."""
    for call in (steps.dispatch, steps.dispatch):
        _, seconds = timed(ep.Error, call, context, buffer, world)
        assert seconds < 5
    steps.raised(ep.Error, buffer.check)
    start = time.monotonic()
    buffer.destroy()
    buffer.destroy()
    assert time.monotonic() - start < timeout + MARGIN


def signal_self_soon(number: signal.Signals) -> None:
    """Sends this process a signal a moment later: most likely inside the next call."""
    threading.Timer(0.1, os.kill, [os.getpid(), number]).start()


def killed_while_waiting(context, victim: int, timeout: float, seed: int) -> str:
    """The victim dies in a dispatch that rank 0 has not entered yet, the others have."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    kept = steps.dispatch(context, buffer, world)
    if context.rank == victim:
        signal_self_soon(signal.SIGKILL)
    elif context.rank == 0:
        context.receive()
    error, seconds = timed(ep.PeerFailure, steps.dispatch, context, buffer, world)
    assert seconds < timeout, "the end of the connection tells of a death, not the timeout"
    steps.verify_dispatch(context, world, kept)
    expect_the_end(context, buffer, world, timeout)
    steps.verify_dispatch(context, world, kept)
    return str(error)


def killed_at_work(context, victim: int, after: int, timeout: float, seed: int) -> str:
    """The victim is killed, by the test, somewhere in a stream of large operations."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(LARGE, seed, context.size)

    def work() -> None:
        for turn in range(100000):
            handle = steps.dispatch(context, buffer, world).handle
            steps.combine(context, buffer, world, handle)
            if turn == after and context.rank == victim:
                context.report("at work")

    # Where Torch waits for a kernel that waits for the victim, nobody looks at other ranks.
    on_gpu = context.backend.name != "cpu"
    error, seconds = timed(LOST if on_gpu else ep.PeerFailure, work)
    assert seconds < timeout + MARGIN * on_gpu
    expect_the_end(context, buffer, world, timeout)
    return str(error)


def stopped(context, victim: int, timeout: float, seed: int) -> str:
    """The victim is stopped beyond the timeout: the others end in time, and so does it later."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    kept = steps.dispatch(context, buffer, world)
    if context.rank == victim:
        context.report("ready")
        context.receive()
    else:
        context.receive()
    error, seconds = timed(LOST, steps.dispatch, context, buffer, world)
    assert seconds < timeout + MARGIN
    steps.verify_dispatch(context, world, kept)
    expect_the_end(context, buffer, world, timeout)
    steps.verify_dispatch(context, world, kept)
    return str(error)


def absent(context, timeout: float, seed: int) -> str:
    """Rank 0 never comes: the message says who waited for whom, in what, and how long."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    steps.round_trip(context, buffer, SMALL, seed)
    if context.rank == 0:
        context.receive()
        error = steps.raised(ep.Error, steps.dispatch, context, buffer, world)
    else:
        error, seconds = timed(LOST, steps.dispatch, context, buffer, world)
        assert timeout * 0.9 < seconds < timeout + MARGIN
        assert "dispatch" in str(error), error
        assert steps.names_rank(str(error), 0), error
        assert steps.names_rank(str(error), context.rank), error
        context.report("timed out")
    expect_the_end(context, buffer, world, timeout)
    return type(error).__name__


def destroyed_alone(context, timeout: float, seed: int) -> None:
    """Rank 0 destroys its buffer while the others dispatch: they are told."""
    buffer = context.buffer(timeout=timeout)
    steps.round_trip(context, buffer, SMALL, seed)
    if context.rank == 0:
        start = time.monotonic()
        with contextlib.suppress(*LOST):
            buffer.destroy()
        assert time.monotonic() - start < timeout + MARGIN
        steps.raised(ep.InvalidArgument, buffer.stats)
    else:
        world = world_of(SMALL, seed, context.size)
        error, seconds = timed(ep.Error, steps.dispatch, context, buffer, world)
        assert seconds < timeout + MARGIN
        assert steps.names_rank(str(error), 0), error
        expect_the_end(context, buffer, world, timeout)


def left_behind_a_combine(context, drops: bool, seed: int) -> None:
    """Rank 0 leaves by an exception, or drops its buffer, while the others, which may be late,
    count on its kernel."""
    buffer = context.buffer()
    world = world_of(LARGE, seed, context.size)
    rows, arguments = steps.combine_arguments(context, buffer, world)
    handle = steps.dispatch(context, buffer, world).handle
    if context.rank != 0:
        context.backend.delay()
        steps.verify_combine(context, world, buffer.combine(rows, handle, **arguments))
        buffer.check()
    elif drops:
        buffer.combine(rows, handle, **arguments)
        context.opened.clear()
        del buffer, handle
    else:
        with contextlib.suppress(LookupError), buffer:
            buffer.combine(rows, handle, **arguments)
            raise LookupError
        steps.raised(ep.InvalidArgument, buffer.stats)


def dropped_behind_long_work(context, seed: int) -> None:
    """Other threads of Python go on while a buffer that was dropped waits for its kernels."""
    buffer = context.buffer()
    world = world_of(SMALL, seed, context.size)
    rows, arguments = steps.combine_arguments(context, buffer, world)
    handle = steps.dispatch(context, buffer, world).handle
    context.backend.delay()
    buffer.combine(rows, handle, **arguments)
    gone, turns = threading.Event(), []

    def count() -> None:
        while not gone.wait(0.005):
            turns.append(time.monotonic())

    thread = threading.Thread(target=count)
    thread.start()
    context.opened.clear()
    start = time.monotonic()
    del buffer, handle
    end = time.monotonic()
    gone.set()
    thread.join()
    assert end - start > 0.1, "it did not wait"
    assert sum(start < turn < end for turn in turns) > 5


def interrupted(context, victim: int, timeout: float, seed: int) -> str:
    """Ctrl-C ends a wait; the peers are told that the rank gave up."""
    buffer = context.buffer(timeout=timeout)
    world = world_of(SMALL, seed, context.size)
    steps.round_trip(context, buffer, SMALL, seed)

    def dispatch_and_be_interrupted() -> None:
        signal_self_soon(signal.SIGINT)
        steps.dispatch(context, buffer, world)

    if context.rank == victim:
        error, seconds = timed(KeyboardInterrupt, dispatch_and_be_interrupted)
    else:
        context.receive()
        error, seconds = timed(LOST, steps.dispatch, context, buffer, world)
    assert seconds < timeout
    buffer.destroy()
    return str(error)


def forked(context, seed: int) -> None:
    """A forked child may not use the buffer, and does the parent no harm by ending."""
    buffer = context.buffer()
    world = world_of(SMALL, seed, context.size)
    kept = steps.dispatch(context, buffer, world)
    child = os.fork()
    if child == 0:
        os._exit(in_child(context, buffer, world))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child was not refused"
    steps.verify_dispatch(context, world, kept)
    steps.round_trip(context, buffer, SMALL, seed)


def in_child(context, buffer, world) -> int:
    try:
        steps.raised(ep.Error, steps.dispatch, context, buffer, world)
        del buffer
        gc.collect()
    except BaseException:
        return 1
    return 0


def starts_small(context, seed: int) -> None:
    """A buffer that asks for much starts small: the size is a hint on the CPU."""
    buffer = context.buffer(num_nvl_bytes=int(2e9), num_rdma_bytes=int(1e9))
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (int(2e9), int(1e9))
    assert buffer.stats().arena_bytes <= 128 << 20
    steps.round_trip(context, buffer, SMALL, seed)
