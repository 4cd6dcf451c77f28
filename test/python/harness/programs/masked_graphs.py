# SPDX-License-Identifier: MIT
"""Groups that go on without a rank in graphs, which are replayed with no host in a call."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

from harness import steps
from harness.cases import Case, World, world_of
from harness.masked import Player, Ranks, View, fates, first_that_fits
from harness.programs import graphs
from harness.programs.masks import CASES, shrinking

REPLAYED = Case("replayed", tokens=(20, 7, 33, 5))


class Replays:
    """A captured dispatch and combine, replayed with other tokens, and without some ranks."""

    def __init__(self, player: Player, case: Case, seed: int) -> None:
        self.player, self.turn = player, 0
        self.worlds = [world_of(case, seed + turn, player.size) for turn in range(5)]
        self.arguments = steps.dispatch_arguments(player.context, self.worlds[0])
        most = max(world.capacity for world in self.worlds)
        self.arguments["num_worst_tokens"] = most + 3
        self.graph, self.result, self.combined = graphs.capture(
            player.context, player.buffer, self.arguments
        )

    def play(self, lost: Ranks = frozenset()) -> None:
        world = self.replay()
        self.verify(world, lost, frozenset(), lost)

    def play_on(self) -> None:
        """With ranks that may be lost meanwhile."""
        before = self.player.masked()
        world = self.replay()
        candidates = []
        for fate in fates(before, self.player.masked(), ("whole", "lost", "blank", "absent")):
            blank = frozenset(rank for rank, f in fate.items() if f == "blank")
            absent = before | {rank for rank, f in fate.items() if f == "absent"}
            lost = before | {rank for rank, f in fate.items() if f != "whole"}
            candidates.append((world, absent, blank, lost))
        first_that_fits(candidates, self.verify)

    def replay(self) -> World:
        context, result = self.player.context, self.result
        world = self.worlds[self.turn % len(self.worlds)]
        self.turn += 1
        graphs.update(context, self.arguments, world)
        graphs.poison(context, result.x, result.topk_idx, result.topk_weights, self.combined)
        self.graph.replay()
        return world

    def verify(self, world: World, absent: Ranks, blank: Ranks, lost: Ranks) -> None:
        """The dispatch has no rows of some ranks, or blank ones; the combine none of `lost`."""
        view, rank = View(world, absent, blank), self.player.rank
        # What is sent to a rank that is lost does not come back.
        own = view.sent[rank]
        in_rank = own.layout.in_rank.copy()
        in_rank[:, list(lost)] = False
        view.sent[rank] = replace(own, layout=replace(own.layout, in_rank=in_rank))
        graphs.verify(self.player.context, view, self.result, self.combined)


def masked_replays(context, seed: int) -> None:
    """A graph is replayed with all ranks, with one apart, which replays its own, and with all."""
    player, victim = shrinking(context), seed % context.size
    replays = Replays(player, REPLAYED, seed)
    for _ in range(2):
        replays.play()
    player.set_masks(victim, True)
    for _ in range(3):
        replays.play(player.masked())
    player.set_masks(victim, False)
    player.both_modes(seed)  # a call, by which the ranks align their epochs
    for _ in range(2):
        replays.play()
    player.buffer.check()


def replayed_until_death(context, victim: int, timeout: float, seed: int) -> tuple:
    """All have replayed a graph, and then one has died."""
    player = shrinking(context, timeout=timeout)
    replays = Replays(player, REPLAYED, seed)
    replays.play()
    player.expect_masked()
    if context.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return player, replays


def killed_between_replays(context, victim: int, timeout: float, seed: int) -> None:
    """With no host in a call, kernels wait for a rank that is missing until time is up, once."""
    player, replays = replayed_until_death(context, victim, timeout, seed)
    replays.play(frozenset([victim]))
    start = time.monotonic()
    for _ in range(3):
        replays.play(frozenset([victim]))
    assert time.monotonic() - start < timeout, "a rank that is lost is waited for again"
    player.expect_masked(victim)
    player.both_modes(seed)
    player.buffer.check()


def killed_before_calls(context, victim: int, timeout: float, seed: int) -> None:
    """A rank whose kernels still wait for the dead one is not taken for dead by those that call."""
    player, replays = replayed_until_death(context, victim, timeout, seed)
    replays.replay()
    if context.rank == (victim + 1) % context.size:
        context.backend.synchronize()  # its host is in no call meanwhile
    player.both_modes(seed)
    player.expect_masked(victim)


def killed_in_replays(context, victim: int, timeout: float, seed: int) -> None:
    """The test kills the victim in a stream of large replays, at no agreed moment."""
    player = shrinking(context, timeout=timeout)
    replays = Replays(player, CASES["rings"], seed)
    turn = 0
    while victim not in player.masked():
        replays.play_on()
        turn += 1
        if context.rank == victim and turn == 2:
            context.report("at work")
    # As in masks.killed_in_operations().
    context.report(turn)
    last = context.receive()
    for _ in range(turn, last + 2):
        replays.play(frozenset([victim]))
    player.both_modes(seed)
    player.expect_masked(victim)


def late_for_a_replay(context, timeout: float, seed: int) -> None:
    """A rank comes when the others have gone on without it: it learns so, and harms nobody."""
    player, victim = shrinking(context, timeout=timeout), seed % context.size
    replays = Replays(player, REPLAYED, seed)
    replays.play()
    if context.rank == victim:
        threading.Event().wait(1.5 * timeout)
    start = time.monotonic()
    replays.play(frozenset(player.others if context.rank == victim else [victim]))
    if context.rank == victim:
        assert time.monotonic() - start < timeout, "nobody is waited for who has parted"
    player.expect_masked(*(player.others if context.rank == victim else [victim]))
    player.set_masks(victim, False)
    player.both_modes(seed)
    replays.play()
    player.expect_masked()
