# SPDX-License-Identifier: MIT
"""Groups that go on without a rank: masked by hand, dead, stopped, or too late."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np

import mscclpp_ep as ep
from harness import low_latency as ll
from harness import steps
from harness.cases import Case, Scales, world_of
from harness.masked import LOW_LATENCY, PLAIN, Player
from harness.programs.failures import MARGIN
from harness.programs.sequences import random_case, random_low_latency_case

# Rows that land in rings, and wait for room there; rows of the arena; a round for the counts.
CASES = {
    "plain": PLAIN,
    "scales": PLAIN.but(dtype="uint8", scales=Scales("float32", 3), bias=2, values="bits"),
    "worst": PLAIN.but(worst="room", bias=1),
    "arena": PLAIN.but(source="arena", combine_dtype="float32"),
    "mixed": PLAIN.but(source="mixed", routing="holes"),
    "rings": Case(tokens=(500, 620, 450), hidden=4096, experts=8, topk=4, source="ordinary"),
    "counts": PLAIN.but(experts=2500, topk=5, alignment=16),
    "no choices": PLAIN.but(with_topk=False),
}
LOW_LATENCY_CASES = {
    "fp8": LOW_LATENCY,
    "plain": LOW_LATENCY.but(kind="none", combine_dtype="float32"),
    "early": LOW_LATENCY.but(kind="ue8m0", early_weights=True, hidden=600),
    "repeated": LOW_LATENCY.but(kind="rounded", routing="duplicates"),
}


def masked_by_hand(context, name: str, seed: int, integrity: bool = False) -> None:
    """A rank and the others mask each other, go on apart, and take each other in again."""
    player, case = shrinking(context, integrity_check=integrity), CASES[name]
    victim = seed % context.size
    worlds = [world_of(case, seed + n, context.size) for n in range(4)]
    old = player.round_trip(worlds[0])  # its combine ends when all have read: none is still in it
    player.set_masks(victim, True)
    player.expect_masked(*(player.others if context.rank == victim else [victim]))
    apart = [player.round_trip(world) for world in worlds[1:3]]
    for turn in (1, 2):
        player.again(old, turn)
        player.combine(old, turn)
        player.again(apart[0], turn)
    player.set_masks(victim, False)
    player.expect_masked()
    player.round_trip(worlds[3])
    for got in (old, *apart):
        player.again(got, 3)
        player.combine(got, 3)
    player.both_modes(seed)


def masked_by_hand_in_low_latency(context, name: str, seed: int) -> None:
    """As `masked_by_hand`, of the other mode, with operations out."""
    player, case = shrinking(context), LOW_LATENCY_CASES[name]
    victim = seed % context.size
    worlds = [ll.world_of(case, seed + n, context.size) for n in range(4)]
    old = player.low_latency_round_trip(worlds[0])
    player.both_modes(seed)
    player.set_masks(victim, True)
    apart = [player.low_latency_round_trip(worlds[1], exact=exact) for exact in (True, False)]
    out = [player.low_latency_dispatch(worlds[2], turn, later=True) for turn in (0, 1)]
    for fetched, finish in out:
        finish()
        apart.append(fetched)
    for fetched in (old, *apart):
        player.low_latency_combine(fetched, 1, exact=seed % 2 == 0)
    player.set_masks(victim, False)
    player.expect_masked()
    player.low_latency_round_trip(worlds[3], 1)
    for turn, fetched in enumerate((old, *apart, *apart)):
        later = turn % 3 == 1
        finish = player.low_latency_combine(fetched, turn, later, exact=turn % 2 == 0)
        if later:
            finish()
    player.both_modes(seed)


def masked_for_long(context, seed: int) -> None:
    """Memory does not grow with the operations that a masked rank misses, nor do messages."""
    player, victim = shrinking(context), seed % context.size
    world = world_of(PLAIN, seed, context.size)
    old = player.round_trip(world)
    player.set_masks(victim, True)

    def held() -> tuple[int, int, int]:
        for turn in range(40):
            player.again(old, turn)
            player.combine(old, turn)
        # On a GPU what was dropped is free when the streams have passed where it was looked for.
        player.buffer.stats()
        player.context.backend.synchronize()
        stats = player.buffer.stats()
        return stats.arena_bytes, stats.held_bytes, stats.landing_bytes

    assert held() == held()
    player.set_masks(victim, False)
    player.both_modes(seed)


def grown_apart(context, seed: int) -> None:
    """Memory that is shared while a rank is masked is known to it once it is taken in again."""
    player, victim = shrinking(context), seed % context.size
    world = world_of(CASES["rings"], seed, context.size)
    large = ll.world_of(LOW_LATENCY.but(hidden=5000, tokens=(60,)), seed, context.size)
    player.both_modes(seed)
    player.set_masks(victim, True)
    for _ in range(2 * player.has_low_latency):
        player.low_latency_round_trip(large)
    player.round_trip(world)
    player.set_masks(victim, False)
    for _ in range(2 * player.has_low_latency):
        player.low_latency_round_trip(large, 1)
    player.round_trip(world, 1)


def masked_with_operations_out(context, seed: int) -> None:
    """No rank is taken in with operations out; all of them end without it."""
    player, victim = shrinking(context), seed % context.size
    world = ll.world_of(LOW_LATENCY, seed, context.size)
    player.both_modes(seed)
    player.set_masks(victim, True)
    _, finish = player.low_latency_dispatch(world, later=True)
    other = victim if context.rank != victim else player.others[0]
    update = player.buffer.low_latency_update_mask_buffer
    steps.raised(ep.InvalidArgument, update, other, False)
    finish()
    player.set_masks(victim, False)
    player.both_modes(seed)


def shrinking(context, **options) -> Player:
    return Player(context, context.buffer(**{"enable_shrink": True, **options}))


def soon(number: signal.Signals, delay: float) -> None:
    threading.Timer(delay, os.kill, [os.getpid(), number]).start()


def work(player: Player, operations: int, seed: int, victim: int | None = None) -> None:
    """Operations of both modes, low-latency ones with hooks.

    The victim dies between two, or, by a timer, in one of those that follow.
    """
    rng, own = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    size, die_at, between = player.size, operations // 3, bool(rng.random() < 0.4)
    got = player.round_trip(world_of(PLAIN, seed, size))
    for turn in range(operations):
        if turn == die_at and player.rank == victim:
            if between:
                os.kill(os.getpid(), signal.SIGKILL)
            soon(signal.SIGKILL, own.exponential(0.01))
        if turn == die_at + 20 and player.rank == victim:
            threading.Event().wait()  # for the timer
        kind = int(rng.integers(4))
        case = LARGE if kind == 3 else list(CASES.values())[turn % 3]
        if kind == 0:
            player.again(got, turn)
            player.combine(got, turn)
        elif kind == 1 and player.has_low_latency:
            world = ll.world_of(LOW_LATENCY, seed + turn, size)
            out = [player.low_latency_dispatch(world, t, later=True) for t in (0, 1)]
            for _, finish in out:
                finish()
            exact = bool(rng.random() < 0.5)
            receive = [player.low_latency_combine(f, turn, True, exact) for f, _ in out]
            for finish in receive:
                finish()
        else:
            got = player.round_trip(world_of(case, seed + turn, size), turn)


LARGE = Case("large", tokens=(80, 130), hidden=2048, experts=16, topk=8)


def killed(context, victim: int, timeout: float, seed: int) -> None:
    """A rank dies somewhere; the others go on, with right results, and know it."""
    player = shrinking(context, timeout=timeout)
    start = time.monotonic()
    work(player, 60, seed, victim)
    player.expect_masked(victim)
    assert time.monotonic() - start < timeout, "a death is noticed without the timeout"
    update = player.buffer.low_latency_update_mask_buffer
    message = str(steps.raised(ep.PeerFailure, update, victim, False))
    assert steps.names_rank(message, victim), message
    player.buffer.low_latency_clean_mask_buffer()
    player.expect_masked(victim)
    player.both_modes(seed)
    player.buffer.check()
    start = time.monotonic()
    player.buffer.destroy()
    assert time.monotonic() - start < MARGIN


def killed_with_hooks_out(context, victim: int, timeout: float, seed: int) -> None:
    """A rank dies when it has sent two operations that the others have not received."""
    player = shrinking(context, timeout=timeout)
    world = ll.world_of(LOW_LATENCY, seed, context.size)
    kept = player.low_latency_round_trip(world)
    out = [player.low_latency_dispatch(world, turn, later=True) for turn in (0, 1)]
    context.report("sent")
    context.receive()
    if context.rank == victim:
        threading.Event().wait()
    for _, finish in out:
        finish()
    receive = [player.low_latency_combine(kept, turn, later=True) for turn in (0, 1)]
    for finish in receive:
        finish()
    player.both_modes(seed)
    player.expect_masked(victim)


def killed_in_operations(context, victim: int, timeout: float, seed: int) -> None:
    """The test kills the victim in a stream of large operations, at no agreed moment."""
    player = shrinking(context, timeout=timeout)
    world = world_of(CASES["rings"], seed, context.size)
    turn = 0
    while victim not in player.masked():
        player.combine(player.dispatch(world), turn)
        turn += 1
        if context.rank == victim and turn == 2:
            context.report("at work")
    # Others may have lost the rank an operation earlier or later, but all count alike.
    context.report(turn)
    last = context.receive()
    for _ in range(turn, last):
        player.combine(player.dispatch(world), 0)
    player.both_modes(seed)
    player.expect_masked(victim)


def stopped(context, victim: int, timeout: float, seed: int) -> None:
    """A rank is stopped beyond the timeout; continued, it is alone, and harms nobody."""
    player = shrinking(context, timeout=timeout)
    worlds = [world_of(PLAIN.but(source="arena"), seed + n, context.size) for n in range(3)]
    low = [ll.world_of(LOW_LATENCY, seed + n, context.size) for n in range(6)]
    kept = player.round_trip(worlds[0])
    fetched = player.low_latency_round_trip(low[0]) if player.has_low_latency else None
    context.report("ready")
    context.receive()
    if context.rank == victim:
        soon(signal.SIGSTOP, 0)
        threading.Event().wait(timeout)  # the signal comes before this ends
    got = [kept]
    for turn, world in enumerate(worlds * 2):
        got.append(player.round_trip(world, turn))
        if player.has_low_latency:
            player.low_latency_round_trip(low[turn])
    player.expect_masked(*(player.others if context.rank == victim else [victim]))
    context.report("apart")
    context.receive()  # all are through, the one that was stopped as well
    for each in got:
        for array in (each.result.x, each.result.topk_idx, each.result.topk_weights):
            assert array is not None
        steps.verify_rows(context, each.view, each.result)
        steps.verify_topk(context, each.view, each.result)
    if fetched is not None:
        ll.verify_dispatch(context, fetched.view, fetched.result)
    player.buffer.destroy()


def stopped_in_operations(context, victim: int, timeout: float, seed: int) -> None:
    """The test stops the victim in a stream of large operations of two ranks."""
    player = shrinking(context, timeout=timeout)
    world = world_of(CASES["rings"], seed, context.size)
    turn = 0
    while not player.masked():
        try:
            player.combine(player.dispatch(world), turn)
        except ep.PeerFailure as error:
            assert steps.names_rank(str(error), 1 - context.rank), error
            player.expect_masked(1 - context.rank)
        turn += 1
        if context.rank == victim and turn == 2:
            context.report("at work")
    player.both_modes(seed)
    player.expect_masked(1 - context.rank)
    context.report("apart")
    context.receive()
    player.buffer.destroy()


def one_side_masks(context, seed: int) -> None:
    """A rank that is masked is told so, where it waits, and goes on without the one that did."""
    player = shrinking(context)
    player.both_modes(seed)
    if context.rank == 0:
        player.buffer.low_latency_update_mask_buffer(1, True)
    for turn in range(3):
        player.both_modes(seed + turn)
    player.expect_masked(*{0: [1], 1: [0]}.get(context.rank, []))


def refusals(context, seed: int) -> None:
    """With a rank masked, refusals of arguments reach the others, and nothing else suffers."""
    player, victim = shrinking(context), seed % context.size
    refuser = (victim + 1) % context.size
    player.both_modes(seed)
    player.set_masks(victim, True)
    world = world_of(PLAIN, seed, context.size)
    low = ll.world_of(LOW_LATENCY, seed, context.size)
    got = player.round_trip(world)
    fetched = player.low_latency_round_trip(low) if player.has_low_latency else None
    short = {"num_tokens_per_rank": np.zeros(context.size + 1, np.int32)}
    wrong = {
        "dispatch": lambda bad: steps.dispatch(context, player.buffer, world, **bad),
        "combine": lambda bad: player.buffer.combine(got.result.x, got.result.handle, **bad),
        "low-latency dispatch": lambda bad: ll.dispatch(context, player.buffer, low, **bad),
        "low-latency combine": lambda bad: ll.combine(
            context, player.buffer, low, fetched.result.handle, **bad
        ),
    }
    mistakes = {
        "dispatch": short,
        "combine": {"bias": np.zeros((1, 1, 1), np.float32)},
        "low-latency dispatch": {"topk_idx": np.zeros((1, 1), np.float32)},
        "low-latency combine": {"topk_weights": np.zeros((1, 1), np.float64)},
    }
    for name, call in wrong.items():
        if name.startswith("low-latency") and fetched is None:
            continue
        if context.rank == victim:
            if name == "dispatch":
                player.dispatch(world)
            elif name == "combine":
                player.combine(got, 1)
            elif name == "low-latency dispatch":
                player.low_latency_dispatch(low)
            else:
                player.low_latency_combine(fetched, 1)
        elif context.rank == refuser:
            if name == "dispatch":
                arguments = steps.dispatch_arguments(context, world) | short
                steps.raised(ep.InvalidArgument, player.buffer.dispatch, **arguments)
            else:
                steps.raised(ep.InvalidArgument, call, mistakes[name])
        else:
            message = str(steps.raised(ep.PeerFailure, call, {}))
            assert steps.names_rank(message, refuser), message
        player.expect_masked(*(player.others if context.rank == victim else [victim]))
        player.both_modes(seed)
    player.set_masks(victim, False)
    player.both_modes(seed)


def mistakes(context, seed: int) -> None:
    """What the three methods refuse, without harm."""
    size = context.size
    player = shrinking(context)
    plain = context.buffer()
    peer = (context.rank + 1) % size
    for mask in (True, False):
        steps.raised(ep.InvalidArgument, plain.low_latency_update_mask_buffer, peer, mask)
        for wrong in (context.rank, -1, size, 2**31, 1.5, None):
            update = player.buffer.low_latency_update_mask_buffer
            steps.raised((ep.InvalidArgument, TypeError), update, wrong, mask)
    if size > 1:
        steps.raised(ep.InvalidArgument, plain.low_latency_clean_mask_buffer)
    frozen = np.zeros(size, np.int32)
    frozen.flags.writeable = False
    query = player.buffer.low_latency_query_mask_buffer
    for status in (
        np.zeros(size, np.int64),
        np.zeros(size, np.uint32),
        np.zeros(size + 1, np.int32),
        np.zeros((size, 1), np.int32),
        np.zeros(2 * size, np.int32)[::2] if size > 1 else np.zeros(0, np.int32),
        frozen,
        None,
    ):
        steps.raised((ep.InvalidArgument, TypeError), query, status)
    player.expect_masked()
    status = np.full(size, 3, np.int32)
    plain.low_latency_query_mask_buffer(status)
    assert not status.any()
    player.both_modes(seed)


def disagree(context) -> None:
    """Ranks that do not agree on whether they mask make no buffer."""
    steps.raised(ep.Error, context.buffer, enable_shrink=context.rank != 0)


def soak(context, operations: int, deaths: dict[int, int], seed: int) -> int:
    """Both modes, mixed; ranks masked and taken in again, and dying, on the way.

    `deaths` tells the turn after which a rank dies. Returns how many operations were verified.
    """
    player = Player(context, context.buffer(enable_shrink=True, first_epoch=2**32 - 50))
    return Soak(player, deaths, seed).run(operations)


class Soak:
    """Random operations, agreed on by all ranks; `own` differs between them."""

    def __init__(self, player: Player, deaths: dict[int, int], seed: int) -> None:
        self.player, self.deaths = player, deaths
        self.rng = np.random.default_rng((seed, 0))
        self.own = np.random.default_rng((seed, 1, player.rank))
        self.got: list = []
        self.fetched: list = []
        self.out: list = []
        self.apart: int | None = None
        self.done = 0

    def run(self, operations: int) -> int:
        choices = [self.dispatch, self.again, self.combine]
        if self.player.has_low_latency:
            choices += [self.send_dispatch, self.send_combine]
        odds = np.array([0.2, 0.15, 0.2, 0.25, 0.2][: len(choices)])
        odds /= odds.sum()
        for turn in range(operations):
            if self.own.random() < 0.05:
                time.sleep(self.own.exponential(0.001))
            if self.deaths.get(self.player.rank) == turn:
                self.die()
            if self.rng.random() < 0.02:
                self.part_or_meet(turn)
            choices[int(self.rng.choice(len(choices), p=odds))](turn)
            self.done += 1
        self.receive(0)
        return self.done

    def die(self) -> None:
        """At once, or a moment later, most likely in an operation."""
        if self.own.random() < 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        soon(signal.SIGKILL, self.own.exponential(0.003))

    def part_or_meet(self, turn: int) -> None:
        self.receive(0)
        candidates = [r for r in range(self.player.size) if r not in self.deaths]
        chosen = int(self.rng.choice(candidates))
        if self.apart is not None:
            self.take_in(self.apart)
            self.apart = None
            return
        # A combine ends when all have read, so that none is still in an operation.
        self.combine(turn)
        self.apart = chosen
        self.player.set_masks(chosen, True)

    def take_in(self, victim: int) -> None:
        """Those who died meanwhile stay masked."""
        for rank in self.player.others if self.player.rank == victim else [victim]:
            try:
                self.player.buffer.low_latency_update_mask_buffer(rank, False)
            except ep.PeerFailure:
                assert rank in self.deaths

    def keep(self, kept: list, one) -> None:
        kept.append(one)
        if len(kept) > 4:
            kept.pop(int(self.rng.integers(len(kept))))

    def case(self):
        short = random_case(self.rng)
        return short.but(worst="room" if short.worst else "")

    def dispatch(self, _turn: int) -> None:
        world = world_of(self.case(), int(self.rng.integers(2**31)), self.player.size)
        self.keep(self.got, self.player.dispatch(world))

    def pick(self, kept: list, make) -> object:
        if not kept:
            make(0)
        return kept[int(self.rng.integers(len(kept)))]

    def again(self, turn: int) -> None:
        self.player.again(self.pick(self.got, self.dispatch), turn)

    def combine(self, turn: int) -> None:
        self.player.combine(self.pick(self.got, self.dispatch), turn)

    def receive(self, keep: int) -> None:
        while len(self.out) > keep:
            self.out.pop(0)()

    def send_dispatch(self, turn: int) -> None:
        case, seed = random_low_latency_case(self.rng), int(self.rng.integers(2**31))
        later = bool(self.rng.random() < 0.5)
        self.receive(1)
        world = ll.world_of(case, seed, self.player.size)
        fetched, finish = self.player.low_latency_dispatch(world, turn, later)
        self.out.append(finish if later else lambda: None)
        self.keep(self.fetched, fetched)

    def send_combine(self, turn: int) -> None:
        fetched = self.pick(self.fetched, self.send_dispatch)
        self.receive(0)
        later, exact = bool(self.rng.random() < 0.5), bool(self.rng.random() < 0.5)
        finish = self.player.low_latency_combine(fetched, turn, later, exact)
        self.out.append(finish if later else lambda: None)
