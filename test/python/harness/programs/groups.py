# SPDX-License-Identifier: MIT
"""Several buffers, several groups, and the ways in which ranks find each other."""

from __future__ import annotations

import os

import numpy as np

import mscclpp_ep as ep
from harness import steps
from harness.cases import Case, world_of

CASE = Case(tokens=(13, 0, 30, 7), hidden=40, experts=10, topk=3, bias=1)


def exchange(context, group) -> None:
    """A group gathers bytes of any length, in the order of its ranks."""
    mine = bytes([group.rank]) * (group.rank * 1000)
    assert group.all_gather(mine) == [bytes([r]) * (r * 1000) for r in range(group.size)]
    group.barrier()
    assert group.all_gather(b"") == [b""] * context.size


def gathers(context) -> None:
    group = context.group()
    assert (group.rank, group.size) == (context.rank, context.size)
    for _ in range(5):
        exchange(context, group)


class Homemade:
    """A group that a user wrote."""

    def __init__(self, inner) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size

    def all_gather(self, data: bytes) -> list[bytes]:
        return self.inner.all_gather(data)

    def barrier(self) -> None:
        self.inner.barrier()


def homemade_group(context, seed: int) -> None:
    buffer = context.buffer(Homemade(context.group()))
    steps.round_trip(context, buffer, CASE, seed)


def attributes(context) -> None:
    group = context.group()
    buffer = context.buffer(group, num_nvl_bytes=1 << 22, explicitly_destroy=True)
    assert (buffer.rank, buffer.group_size) == (context.rank, context.size)
    assert buffer.group is group
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 22, 0)
    assert (buffer.low_latency_mode, buffer.explicitly_destroy) == (False, True)


def used_as_context_manager(context, seed: int) -> None:
    """Leaving the block destroys the buffer, also by an exception that all ranks raise."""
    with context.buffer() as buffer:
        steps.round_trip(context, buffer, CASE, seed)
    steps.raised(ep.Error, buffer.stats)
    try:
        with context.buffer() as buffer:
            steps.round_trip(context, buffer, CASE, seed)
            raise LookupError
    except LookupError:
        steps.raised(ep.Error, buffer.stats)


def left_to_the_collector(context, seed: int) -> None:
    """Buffers that nobody destroyed go quietly, with results alive or not."""
    results = []
    for turn in range(3):
        buffer = context.buffer()
        world = world_of(CASE, seed + turn, context.size)
        results.append((world, steps.dispatch(context, buffer, world)))
        context.opened.clear()
        del buffer
    for world, result in results:
        steps.verify_dispatch(context, world, result)
    steps.round_trip(context, context.standing(), CASE, seed)


def many_buffers(context, seed: int) -> None:
    """Buffers of one process do not know of each other."""
    group = context.group()
    options = [{}, {"num_threads": 1}, {"max_arena_bytes": 1 << 20}, {"first_epoch": 2**32 - 3}]
    buffers = [context.buffer(group, **option) for option in options]
    rng = np.random.default_rng(seed)
    results = []
    for turn in range(24):
        buffer = buffers[int(rng.integers(len(buffers)))]
        world = world_of(CASE, seed + turn, context.size)
        results.append((buffer, world, steps.dispatch(context, buffer, world)))
    for number in rng.permutation(len(results)):
        buffer, world, result = results[number]
        returned = steps.combine(context, buffer, world, result.handle)
        steps.verify_combine(context, world, returned)
        steps.verify_dispatch(context, world, result)


def groups_of_a_host(context, seed: int) -> None:
    """Odd and even ranks, each at its own pace, beside a group of all in reversed order."""
    mine = [r for r in range(context.size) if r % 2 == context.rank % 2]
    part, everyone = context.member_of(mine), context.member_of(range(context.size)[::-1])
    part_buffer = context.buffer(context.group(mine))
    all_buffer = context.buffer(context.group(everyone.members))
    for turn in range(6):
        for extra in range(1 + 3 * (context.rank % 2)):
            steps.round_trip(part, part_buffer, CASE, seed + 10 * turn + extra)
        steps.round_trip(everyone, all_buffer, CASE, seed + turn)


def threads_a_rank(context, num_threads: int, seed: int) -> None:
    buffer = context.buffer(num_threads=num_threads)
    large = CASE.but(tokens=(300, 411), hidden=300)
    for turn, case in enumerate([CASE, large, large.but(source="arena"), CASE]):
        steps.round_trip(context, buffer, case, seed + turn)


def made_again(context, seed: int) -> None:
    """A group serves several buffers, one after another; so does a path."""
    group = context.group()
    for turn in range(4):
        with context.buffer(group) as buffer:
            steps.round_trip(context, buffer, CASE, seed + turn)


def by_path(context, path: str, late: int, seed: int) -> None:
    """Meets at `path`; rank `late` only when it is told to."""
    if context.rank == late:
        context.report("waiting")
        context.receive()
    else:
        context.report("meeting")
    group = ep.Group.from_file(path, context.rank, context.size)
    steps.round_trip(context, context.buffer(group), CASE, seed)


def by_environment(context, port: int, seed: int) -> None:
    """Rank 0 listens; the others come when they are told to, after the strangers."""
    place = {"RANK": context.rank, "WORLD_SIZE": context.size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port - 1, "MSCCLPP_EP_PORT": port}
    os.environ.update({name: str(value) for name, value in {**place, **where}.items()})
    if context.rank != 0:
        context.receive()
    group = ep.Group.from_env()
    exchange(context, group)
    steps.round_trip(context, context.buffer(group), CASE, seed)


def options_differ(context, seed: int) -> None:
    """Ranks that place experts differently are told so when they connect."""
    maps = [[r % context.size for r in range(8)], [0] * 8]
    chosen = np.array(maps[context.rank == 1], np.int32)
    message = str(steps.raised(ep.Error, context.buffer, expert_map=chosen))
    assert "expert_map" in message, message
    steps.round_trip(context, context.standing(), CASE, seed)
