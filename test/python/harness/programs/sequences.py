# SPDX-License-Identifier: MIT
"""Long sequences of mixed operations."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from harness import low_latency as ll
from harness import steps
from harness.cases import ROUTINGS, Case, Scales, World, world_of

MAX_ALIVE = 6


def random_case(rng: np.random.Generator) -> Case:
    """A small case; the same on every rank that has the same generator."""
    dtypes = ("bfloat16", "float16", "float32", "uint8", "float8_e4m3fn")
    experts = int(rng.integers(1, 20))
    scales = Scales(str(rng.choice(["float32", "uint8"])), int(rng.integers(1, 5)))
    return Case(
        tokens=tuple(int(t) for t in rng.integers(0, 24, 3)),
        hidden=int(rng.choice([1, 7, 64, 129, 256])),
        experts=experts,
        topk=int(rng.integers(1, 9)),
        index=str(rng.choice(["int32", "int64"])),
        dtype=str(rng.choice(dtypes)),
        values=str(rng.choice(["normal", "bits"])),
        routing=str(rng.choice(ROUTINGS)),
        scales=scales if rng.random() < 0.3 else None,
        alignment=int(rng.choice([1, 16])),
        worst=str(rng.choice(["", "", "room", "short"])),
        combine_dtype=str(rng.choice(dtypes[:3])),
        bias=int(rng.integers(0, 3)),
        source=str(rng.choice(["ordinary", "arena", "mixed"])),
    )


class Soak:
    """Random operations, agreed on by all ranks, with results that live for a random time.

    `rng` is the same on all ranks and chooses the operations; `own` differs.
    """

    def __init__(self, context, buffer, seed: int) -> None:
        self.context, self.buffer, self.seed = context, buffer, seed
        self.rng = np.random.default_rng((seed, 0))
        self.own = np.random.default_rng((seed, 1, context.rank))
        self.alive: list[tuple[World, steps.Dispatched]] = []
        self.kept: list[tuple[World, tuple, int]] = []

    def run(self, operations: int) -> None:
        choices, odds = self.choices()
        for turn in range(operations):
            self.delay()
            operation: Callable = self.rng.choice(choices, p=odds)
            operation(turn)
            if self.rng.random() < 0.2:
                self.drop()
        while self.alive:
            self.drop()

    def choices(self) -> tuple[list[Callable], list[float]]:
        """Operations, and how often each is chosen."""
        return [self.dispatch, self.cached, self.combine], [0.45, 0.15, 0.4]

    def delay(self) -> None:
        """Varies the order in which ranks arrive; nothing waits for it."""
        if self.own.random() < 0.1:
            time.sleep(self.own.exponential(0.002))

    def pick(self) -> tuple[World, steps.Dispatched]:
        if not self.alive:
            self.dispatch(0)
        return self.alive[int(self.rng.integers(len(self.alive)))]

    def dispatch(self, _turn: int) -> None:
        world = world_of(random_case(self.rng), int(self.rng.integers(2**31)), self.context.size)
        if len(self.alive) >= MAX_ALIVE:
            self.drop()
        result = steps.dispatch(self.context, self.buffer, world)
        steps.verify_dispatch(self.context, world, result)
        self.alive.append((world, result))
        steps.verify_drops(self.context, self.buffer, world)

    def cached(self, turn: int) -> None:
        world, first = self.pick()
        again = steps.dispatch_again(self.context, self.buffer, world, first.handle, turn)
        steps.verify_rows(self.context, world, again, turn)
        steps.forget_drops(self.buffer)

    def combine(self, turn: int) -> None:
        world, result = self.pick()
        returned = steps.combine(self.context, self.buffer, world, result.handle, turn)
        steps.verify_combine(self.context, world, returned, turn)
        if self.own.random() < 0.2:
            self.kept.append((world, returned, turn))
        if len(self.kept) > MAX_ALIVE:
            steps.verify_combine(self.context, *self.kept.pop(0))

    def drop(self) -> None:
        """Forgets a result, whose rows must still be what they were."""
        if self.alive:
            world, result = self.alive.pop(int(self.rng.integers(len(self.alive))))
            steps.verify_dispatch(self.context, world, result)


def random_low_latency_case(rng: np.random.Generator) -> ll.Case:
    """As `random_case`, of the other mode."""
    kind = str(rng.choice(ll.KINDS))
    dtypes = ("bfloat16", "float16", "float32", "uint8")
    return ll.Case(
        tokens=tuple(int(t) for t in rng.integers(0, 24, 3)),
        room=int(rng.integers(0, 20)),
        hidden=int(rng.choice([1, 7, 64, 129, 256, 600])),
        experts=int(rng.integers(1, 20)),
        topk=int(rng.integers(1, 9)),
        index=str(rng.choice(["int32", "int64"])),
        dtype=str(rng.choice(dtypes)) if kind == "none" else "bfloat16",
        values=str(rng.choice(["normal", "bits"])),
        routing=str(rng.choice(ROUTINGS)),
        kind=kind,
        combine_dtype=str(rng.choice(dtypes[:3])),
        early_weights=bool(rng.random() < 0.5),
        exact=bool(rng.random() < 0.5),
    )


RECEIVED = (lambda: None, lambda: None)


class MixedSoak(Soak):
    """Operations of both modes, low-latency ones out for a random time.

    Of two that are out either may be received first, and not the same on every rank; a third is
    sent when the older one has been.
    """

    def __init__(self, context, buffer, seed: int) -> None:
        super().__init__(context, buffer, seed)
        self.handles: list[tuple[ll.World, ll.Dispatched, int]] = []
        # Of the last two that were sent the hooks, and what verifies what they received.
        self.out: list[tuple[Callable, Callable]] = []

    def choices(self) -> tuple[list[Callable], list[float]]:
        low_latency = [self.send_dispatch, self.send_combine, self.receive, self.forget]
        ordinary, odds = super().choices()
        return ordinary + low_latency, [p / 2 for p in odds] + [0.17, 0.17, 0.13, 0.03]

    def make_room(self) -> None:
        """Receives, so that a further operation can be sent."""
        if len(self.out) == 2:
            if self.own.random() < 0.5:
                self.take(1)
            self.take(0)

    def take(self, at: int) -> None:
        hook, verify = self.out[at]
        self.out[at] = RECEIVED
        hook()
        verify()

    def receive(self, _turn: int) -> None:
        """Receives what is out, in an order of this rank's own."""
        for at in self.own.permutation(len(self.out)):
            self.delay()
            self.take(int(at))
        self.out.clear()

    def sent(self, hook: Callable | None, verify: Callable) -> None:
        if hook is None:
            verify()
        self.out.append((hook, verify) if hook else RECEIVED)

    def before_sending(self) -> bool:
        """Makes room; whether the next operation is left out until later."""
        self.make_room()
        if len(self.out) == 2:
            self.out.pop(0)
        return bool(self.rng.random() < 0.6)

    def send_dispatch(self, turn: int) -> None:
        later = self.before_sending()
        case, seed = random_low_latency_case(self.rng), int(self.rng.integers(2**31))
        world = ll.world_of(case, seed, self.context.size)
        result = ll.dispatch(self.context, self.buffer, world, turn, return_recv_hook=later)

        def verify() -> None:
            ll.verify_dispatch(self.context, world, result, turn)

        self.sent(result.hook, verify)
        self.handles.append((world, result, turn))
        if len(self.handles) > MAX_ALIVE:
            self.forget(turn)

    def forget(self, _turn: int) -> None:
        """Drops a dispatch, whose rows must still be what they were."""
        if self.handles:
            self.receive(0)
            world, result, turn = self.handles.pop(int(self.rng.integers(len(self.handles))))
            ll.verify_dispatch(self.context, world, result, turn)

    def send_combine(self, turn: int) -> None:
        if not self.handles:
            self.send_dispatch(turn)
        world, result, _ = self.handles[int(self.rng.integers(len(self.handles)))]
        self.receive(0)
        later = bool(self.rng.random() < 0.6)
        exact = bool(self.rng.random() < 0.5)
        extra = {"exact": exact, "return_recv_hook": later}
        returned = ll.combine(self.context, self.buffer, world, result.handle, turn, **extra)
        self.sent(
            returned[2],
            lambda: ll.verify_combine(self.context, world, returned, turn, exact=exact),
        )

    def run(self, operations: int) -> None:
        super().run(operations)
        self.receive(0)
        while self.handles:
            self.forget(0)


def mixed_soak(context, operations: int, seed: int) -> None:
    buffer = context.buffer(first_epoch=2**32 - 50)
    MixedSoak(context, buffer, seed).run(operations)


def soak(context, operations: int, seed: int) -> None:
    buffer = context.buffer()
    Soak(context, buffer, seed).run(operations)


def across_epochs(context, first: int, seed: int) -> None:
    """16 operations or more on either side of the first epoch's end."""
    buffer = context.buffer(first_epoch=first)
    for turn in range(3):
        steps.round_trip(context, buffer, Case(tokens=(9, 0, 4)), seed + turn)
    Soak(context, buffer, seed).run(30)
