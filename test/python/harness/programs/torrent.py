# SPDX-License-Identifier: MIT
"""Thousands of operations on a GPU whose results are compared there: the host waits for none."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import mscclpp_ep as ep
from harness import steps
from harness.cases import Case, World, world_of

CASES = [
    Case(tokens=(40, 0, 25, 64), hidden=256),
    Case(tokens=(128,), hidden=1024, experts=16, topk=8),
    Case(tokens=(9, 300), hidden=72, experts=5, topk=2, index="int32"),
]
LONGEST_DELAY = 200_000  # cycles


@dataclass
class Known:
    """Inputs of a world, and what came of them the first time, which the oracle has seen."""

    world: World
    arguments: dict
    first: steps.Dispatched
    echo: Any

    @property
    def rows(self) -> int:
        return len(self.first.x)


def same(torch, a, b):
    """0 on the GPU if the bytes are equal."""
    return (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum()


def learn(context, buffer, case: Case, seed: int) -> Known:
    world = world_of(case, seed, context.size)
    arguments = steps.dispatch_arguments(context, world)
    first = steps.unpack(buffer.dispatch(**arguments))
    steps.verify_dispatch(context, world, first)
    echo, _, _ = buffer.combine(first.x, first.handle)
    sent = world.sent[context.rank]
    ranks = sent.layout.in_rank.sum(1, keepdims=True)
    total = np.where(ranks > 0, sent.x.astype(np.float32) * ranks, np.float32(0))
    steps.same_bits(context.backend.host(echo), total.astype(sent.x.dtype), "combined x")
    return Known(world, arguments, first, echo)


class Torrent:
    """`rng` is the same on all ranks and chooses what they do; `own` differs."""

    def __init__(self, context, seed: int) -> None:
        self.context, self.torch = context, context.backend.torch
        self.rng = np.random.default_rng((seed, 0))
        self.own = np.random.default_rng((seed, 1, context.rank))
        self.buffer = context.buffer(num_nvl_bytes=32 << 20)
        self.known = [learn(context, self.buffer, case, seed + n) for n, case in enumerate(CASES)]
        self.wrong = self.torch.zeros((), dtype=self.torch.int64, device=context.backend.device)

    def delay(self) -> None:
        """Now and then keeps this rank's stream, or its comm stream, busy for a while."""
        if self.own.random() < 0.3:
            self.torch.cuda._sleep(int(self.own.integers(LONGEST_DELAY)))

    def turn(self) -> None:
        known = self.known[int(self.rng.integers(len(self.known)))]
        kind = str(self.rng.choice(["counts", "room", "cached"]))
        ordinary, awaits = self.rng.random() < 0.5, self.rng.random() < 0.5
        self.delay()
        flags = {"async_finish": bool(awaits)}
        if kind == "cached":
            x = known.arguments["x"]
            result = steps.unpack(self.buffer.dispatch(x, handle=known.first.handle, **flags))
            handle = known.first.handle
        else:
            room = {"num_worst_tokens": known.rows + 5} if kind == "room" else {}
            result = steps.unpack(self.buffer.dispatch(**known.arguments, **room, **flags))
            handle = result.handle
        steps.wait(result.event)
        self.delay()
        self.wrong += same(self.torch, result.x[: known.rows], known.first.x)
        if result.topk_idx is not None:
            idx = result.topk_idx[: known.rows]
            self.wrong += same(self.torch, idx, known.first.topk_idx)
        x = result.x.clone() if ordinary else result.x
        combined, _, event = self.buffer.combine(x, handle, **flags)
        steps.wait(event)
        self.wrong += same(self.torch, combined, known.echo)

    def finish(self) -> None:
        self.buffer.check()
        assert int(self.wrong) == 0


def torrent(context, turns: int, seed: int) -> None:
    one = Torrent(context, seed)
    for _ in range(turns):
        one.turn()
    one.finish()


def two_buffers(context, turns: int, seed: int) -> None:
    """Each buffer on a stream of its own, which the other does not wait for."""
    torch = context.backend.torch
    pair = []
    for number in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            pair.append((torch.cuda.current_stream(), Torrent(context, seed + 100 * number)))
    for _ in range(turns):
        for stream, one in pair:
            with torch.cuda.stream(stream):
                one.turn()
    for stream, one in pair:
        with torch.cuda.stream(stream):
            one.finish()


def beside_nccl(context, path: str, turns: int, seed: int) -> None:
    """Sums of NCCL on another stream, whose kernels wait for those of other ranks as well."""
    from torch import distributed

    torch, rank = context.backend.torch, context.rank
    distributed.init_process_group(
        "nccl",
        init_method=f"file://{path}",
        rank=rank,
        world_size=context.size,
        device_id=context.backend.device,
    )
    numbers = torch.full((4 << 20,), rank + 1, device=context.backend.device)
    expected = context.size * (context.size + 1) // 2
    wrong = torch.zeros((), dtype=torch.int64, device=context.backend.device)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    one = Torrent(context, seed)

    def total() -> None:
        with torch.cuda.stream(other):
            sums = numbers.clone()
            distributed.all_reduce(sums)
            wrong.add_((sums != expected).sum())

    # To meet, NCCL waits on the host.
    total()
    # With one queue for all streams, work must come in the same order on all ranks.
    in_order = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    for turn in range(turns):
        first, then = (total, one.turn) if in_order or (rank + turn) % 2 else (one.turn, total)
        first()
        then()
    one.finish()
    other.synchronize()
    assert int(wrong) == 0
    distributed.destroy_process_group()


def overlaps(context, seed: int) -> None:
    """With `async_finish` the caller's stream goes on; a call waits for `previous_event` only."""
    torch = context.backend.torch
    # An arena that need not grow: memory that is taken for the first time may wait for the GPU.
    buffer = context.buffer(num_nvl_bytes=64 << 20)
    known = learn(context, buffer, CASES[1], seed)
    torch.cuda.current_stream().synchronize()
    begun = buffer.capture()
    # Far longer than a dispatch; what is on the stream must not hold it. No kernel is used here for
    # the first time: to load it would wait for the GPU.
    torch.cuda._sleep(2_000_000_000)
    slow = torch.cuda.Event()
    slow.record()
    assert not slow.query(), "the caller's stream is done before the dispatch is called"
    result = buffer.dispatch(
        known.arguments["x"], handle=known.first.handle, previous_event=begun, async_finish=True
    )
    result[-1].event.synchronize()
    assert not slow.query(), "the dispatch waited for the caller's stream"
    torch.cuda.current_stream().synchronize()
    same_rows = same(torch, result[0], known.first.x)
    assert int(same_rows) == 0


def behind_long_work(context, seed: int) -> None:
    """A dispatch whose host waits for counts that come after other work of the stream."""
    torch = context.backend.torch
    buffer = context.buffer()
    for turn in range(2):
        world = world_of(CASES[0], seed + turn, context.size)
        arguments = steps.dispatch_arguments(context, world)
        torch.cuda._sleep(300_000_000)
        steps.verify_dispatch(context, world, steps.unpack(buffer.dispatch(**arguments)))


def timed_pushes(context, seed: int) -> None:
    """Plain copies to the next rank, and operations as before after them."""
    buffer = context.buffer()
    for sms, repeats in ((4, 3), (64, 1)):
        seconds = buffer._core.time_push(3 << 20, sms, repeats)
        assert len(seconds) == repeats
        assert all(0 < each < 1 for each in seconds)
    steps.round_trip(context, buffer, CASES[0], seed)


def killed_in_kernel(context, victim: int, dispatches: bool, timeout: float, seed: int) -> str:
    """The victim dies between its call and its kernel, for which those of the others wait.

    By a dispatch, which ranks enter first, they learn of it long before the timeout.
    """
    torch = context.backend.torch
    buffer = context.buffer(timeout=timeout)
    known = learn(context, buffer, CASES[0], seed)
    torch.cuda.current_stream().synchronize()
    if context.rank == victim:
        torch.cuda._sleep(20_000_000_000)
    x = known.arguments["x"]
    result = buffer.dispatch(x, handle=known.first.handle)
    if context.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if dispatches:
        start = time.monotonic()
        error = steps.raised(ep.PeerFailure, buffer.dispatch, **known.arguments)
        assert time.monotonic() - start < timeout / 2
    else:
        error = steps.raised((ep.Timeout, ep.PeerFailure), buffer.check)
    steps.raised(ep.Error, buffer.dispatch, x, handle=known.first.handle)
    # The GPU works on, and what was there before is as it was.
    steps.verify_dispatch(context, known.world, known.first)
    assert int(torch.ones(1000, device=context.backend.device).sum()) == 1000
    buffer.destroy()
    del result
    return str(error)
