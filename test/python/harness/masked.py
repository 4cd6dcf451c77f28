# SPDX-License-Identifier: MIT
"""Operations of both modes in a group that goes on without some ranks, and what they must return.

Ranks need not agree on who is missing: each compares with the oracle of the ranks that it has not
masked. An operation during which this rank masked another may have its contribution or not. What a
rank gives to combine depends on source and token only, not on where their row lies, as that is
decided by the ranks that its owner knew of.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness import low_latency as ll
from harness import low_latency_oracle as ll_oracle
from harness import oracle, steps
from harness.cases import Case, World, draw, dtype_of, world_of

Ranks = frozenset[int]


class View(World):
    """A world as a rank sees it that knows nothing of the ranks `absent`.

    The rows of the ranks `blank`, which were lost half-way, have a place, and no content.
    """

    def __init__(self, base: World, absent: Ranks, blank: Ranks = frozenset()) -> None:
        self.__dict__.update(base.__dict__)
        self.blank = blank
        self.sent = [silent(s) if rank in absent else s for rank, s in enumerate(base.sent)]
        masks = [sent.layout.in_rank for sent in self.sent]
        self.full_routes = [oracle.route(masks, rank) for rank in range(self.size)]
        self.routes = [r.first(self.num_worst or len(r)) for r in self.full_routes]

    def is_blank(self, rank: int) -> np.ndarray:
        return np.isin(self.routes[rank].source, list(self.blank))

    def received(self, rank: int, turn: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        rows = super().received(rank, turn)
        for array in rows:
            if array is not None:
                array[self.is_blank(rank)] = np.zeros((), array.dtype)
        return rows

    def received_topk(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        idx, weights = super().received_topk(rank)
        idx[self.is_blank(rank)] = -1
        weights[self.is_blank(rank)] = 0
        return idx, weights


def silent(sent: oracle.Sent) -> oracle.Sent:
    """What a rank that sends nothing gives to dispatch."""
    parts = (sent.layout.per_rank, sent.layout.per_expert, sent.layout.in_rank)
    return replace(sent, layout=oracle.Layout(*(np.zeros_like(part) for part in parts)))


def low_latency_view(base: ll.World, absent: Ranks) -> ll.World:
    view = copy.copy(base)
    idx = [np.full_like(a, -1) if rank in absent else a for rank, a in enumerate(base.topk_idx)]
    view.slots = ll_oracle.Slots(idx, base.placement)
    return view


@dataclass
class Got:
    """A dispatch that was verified, and who had no part in it."""

    world: World
    result: steps.Dispatched
    absent: Ranks
    blank: Ranks

    @property
    def view(self) -> View:
        return View(self.world, self.absent, self.blank)


@dataclass
class Fetched:
    """As `Got`, of the other mode."""

    world: ll.World
    result: ll.Dispatched
    turn: int
    absent: Ranks = frozenset()

    @property
    def view(self) -> ll.World:
        return low_latency_view(self.world, self.absent)


def fates(before: Ranks, after: Ranks, choices: tuple[str, ...]) -> Iterator[dict[int, str]]:
    """What may have become of the ranks that were masked during an operation."""
    new = sorted(after - before)
    for chosen in itertools.product(choices, repeat=len(new)):
        yield dict(zip(new, chosen, strict=True))


def first_that_fits(candidates: list[tuple], verify: Callable) -> tuple:
    """The candidate that `verify` accepts; raises what it says of the last if there is none."""
    for candidate in candidates[:-1]:
        try:
            verify(*candidate)
        except AssertionError:
            continue
        return candidate
    verify(*candidates[-1])
    return candidates[-1]


class Player:
    """Calls operations on a buffer that masks ranks, and verifies each."""

    def __init__(self, context, buffer) -> None:
        self.context, self.buffer = context, buffer
        self.rank, self.size = context.rank, context.size
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.has_low_latency = context.backend.name == "cpu"  # it is not built for GPUs
        self.unknown = context.backend.array(np.full(self.size, 7, np.int32))

    def masked(self) -> Ranks:
        # Only the query waits for operations: in a wait of the framework's no death is noticed.
        array = self.context.backend.copy(self.unknown)
        self.buffer.low_latency_query_mask_buffer(array)
        status = self.context.backend.host(array)
        assert set(status.tolist()) <= {0, 1}
        assert status[self.rank] == 0
        return frozenset(np.flatnonzero(status).tolist())

    def expect_masked(self, *ranks: int) -> None:
        assert self.masked() == frozenset(ranks)

    def set_masks(self, victim: int, mask: bool) -> None:
        """What a rank does to part with the victim, or to take it in again, on either side."""
        for rank in self.others if self.rank == victim else [victim]:
            self.buffer.low_latency_update_mask_buffer(rank, mask)

    def dispatch(self, world: World, **extra) -> Got:
        before = self.masked()
        result = steps.dispatch(self.context, self.buffer, world, **extra)
        candidates = []
        for fate in fates(before, self.masked(), ("whole", "absent", "blank")):
            absent = before | {rank for rank, f in fate.items() if f == "absent"}
            blank = frozenset(rank for rank, f in fate.items() if f == "blank")
            candidates.append((absent, blank))

        def verify(absent: Ranks, blank: Ranks) -> None:
            verify_dispatch(self.context, Got(world, result, absent, blank))

        return Got(world, result, *first_that_fits(candidates, verify))

    def again(self, got: Got, turn: int) -> None:
        """A cached dispatch: rows keep their places, also those of masked ranks."""
        before = self.masked()
        result = steps.dispatch_again(self.context, self.buffer, got.world, got.result.handle, turn)
        candidates = []
        for fate in fates(before, self.masked(), ("whole", "blank")):
            lost = before | {rank for rank, f in fate.items() if f == "blank"}
            candidates.append((lost,))

        def verify(lost: Ranks) -> None:
            view = View(got.world, got.absent, lost)
            steps.verify_rows(self.context, view, result, turn)

        first_that_fits(candidates, verify)

    def combine(self, got: Got, turn: int) -> Callable[[], None]:
        """Returns what verifies the result once more."""
        before, world = self.masked(), got.world
        route, num_rows = got.view.routes[self.rank], got.view.num_rows(self.rank)
        arguments: dict[str, Any] = {}
        if world.case.with_topk:
            shape = (num_rows, world.case.topk)
            weights = self.laid_out(world, route, shape, np.dtype(np.float32), turn)
            arguments["topk_weights"] = self.context.backend.array(weights)
        shape = (num_rows, world.case.hidden)
        rows = self.laid_out(world, route, shape, dtype_of(world.case.combine_dtype), turn)
        if world.case.source == "arena" or (world.case.source == "mixed" and self.rank % 2):
            tensor = self.buffer.empty(rows.shape, self.context.backend.dtype(rows.dtype))
            self.context.backend.write(tensor, rows)
        else:
            tensor = self.context.backend.array(rows)
        biases = tuple(world.biases(self.rank, turn))
        if biases:
            given = tuple(self.context.backend.array(b) for b in biases)
            arguments["bias"] = given if len(given) == 2 else given[0]
        x, weights, _ = self.buffer.combine(tensor, got.result.handle, **arguments)
        candidates = []
        for fate in fates(before, self.masked(), ("whole", "absent")):
            lost = before | got.absent | {rank for rank, f in fate.items() if f == "absent"}
            candidates.append((lost,))
        host = self.context.backend.host

        def verify(lost: Ranks) -> None:
            steps.same_bits(host(x), combined(world, self.rank, turn, lost, biases), "combined x")
            if weights is not None:
                wanted = combined(world, self.rank, turn, lost, None)
                steps.same_bits(host(weights), wanted, "combined weights")

        fitting = first_that_fits(candidates, verify)
        return lambda: verify(*fitting)

    def laid_out(self, world: World, route, shape, dtype: np.dtype, turn: int) -> np.ndarray:
        """Rows for combine, each where the handle has its place; garbage beyond."""
        rows = draw(np.random.default_rng((world.seed, turn, 5)), shape, dtype, "bits")
        parts = [made_of(world, self.rank, s, dtype, shape[1], turn) for s in range(self.size)]
        rows[: len(route)] = route.gather(parts)
        return rows

    def round_trip(self, world: World, turn: int = 0) -> Got:
        got = self.dispatch(world)
        self.combine(got, turn)
        return got

    def low_latency_dispatch(
        self, world: ll.World, turn: int = 0, later: bool = False
    ) -> tuple[Fetched, Callable[[], None]]:
        """The dispatch, and what receives and verifies it, if that is left for `later`."""
        before = self.masked()
        result = ll.dispatch(self.context, self.buffer, world, turn, return_recv_hook=later)
        fetched = Fetched(world, result, turn)

        def finish() -> None:
            if later:
                result.hook()
            candidates = []
            for fate in fates(before, self.masked(), ("whole", "absent")):
                candidates.append((before | {r for r, f in fate.items() if f == "absent"},))

            def verify(absent: Ranks) -> None:
                ll.verify_dispatch(self.context, low_latency_view(world, absent), result, turn)

            (fetched.absent,) = first_that_fits(candidates, verify)

        if not later:
            finish()
        return fetched, finish

    def low_latency_combine(
        self, fetched: Fetched, turn: int = 0, later: bool = False, exact: bool = False, **extra
    ) -> Callable[[], None]:
        before, world = self.masked(), fetched.world
        array = self.context.backend.array
        out, _, hook = self.buffer.low_latency_combine(
            array(self.low_latency_rows(fetched, turn)),
            array(world.topk_idx[self.rank]),
            array(world.topk_weights[self.rank]),
            fetched.result.handle,
            return_recv_hook=later,
            exact=exact,
            **extra,
        )

        def finish() -> None:
            if later:
                hook()
            candidates = []
            for fate in fates(before, self.masked(), ("whole", "absent")):
                lost = {rank for rank, f in fate.items() if f == "absent"}
                candidates.append((before | fetched.absent | lost,))

            def verify(lost: Ranks) -> None:
                wanted = low_latency_combined(world, self.rank, turn, lost, exact)
                steps.same_bits(self.context.backend.host(out), wanted, "combined x")

            first_that_fits(candidates, verify)

        if not later:
            finish()
        return finish

    def low_latency_rows(self, fetched: Fetched, turn: int) -> np.ndarray:
        world, slots = fetched.world, fetched.view.slots
        shape = (world.num_experts(self.rank), self.size * world.most, world.case.hidden)
        dtype = dtype_of(world.case.combine_dtype)
        rows = draw(np.random.default_rng((world.seed, turn, 6)), shape, dtype, "bits")
        for local, expert in enumerate(world.placement.experts_of(self.rank)):
            made = [low_latency_made_of(world, int(expert), s, turn) for s in range(self.size)]
            gathered = slots.gather(expert, made)
            rows[local, : len(gathered)] = gathered
        return rows

    def low_latency_round_trip(self, world: ll.World, turn: int = 0, **extra) -> Fetched:
        fetched, _ = self.low_latency_dispatch(world, turn)
        self.low_latency_combine(fetched, turn, **extra)
        return fetched

    def both_modes(self, seed: int) -> None:
        """A round trip of each mode that the backend has."""
        if self.has_low_latency:
            self.low_latency_round_trip(ll.world_of(LOW_LATENCY, seed, self.size))
        self.round_trip(world_of(PLAIN, seed, self.size))


PLAIN = Case("plain", tokens=(14, 23, 9), hidden=72, experts=9, topk=3)
LOW_LATENCY = ll.Case("plain", tokens=(11, 6, 17), hidden=136, experts=9, topk=3, kind="fp8")


def verify_dispatch(context, got: Got) -> None:
    world, result = got.view, got.result
    steps.verify_rows(context, world, result)
    steps.verify_topk(context, world, result)
    if not got.blank:
        steps.verify_counts(context, world, result)
        steps.verify_handle(context, world, result)
        return
    # Counts were told before the rank was lost, or as it was.
    route, host = world.routes[context.rank], context.backend.host
    assert int(np.asarray(result.handle.num_recv_tokens).item()) == len(route)
    told = [world.counts(context.rank)]
    told.append(View(got.world, got.absent | got.blank).counts(context.rank))
    per_expert = np.asarray(result.handle.num_recv_tokens_per_expert).tolist()
    assert per_expert in [counts.tolist() for counts in told]
    wanted = np.where(world.is_blank(context.rank), -1, route.token).astype(np.int32)
    steps.same_bits(host(result.handle[3])[: len(route)], wanted, "handle[3], recv_src_idx")


def made_of(world: World, owner: int, source: int, dtype: np.dtype, width: int, turn: int):
    """What the experts of `owner` make of each token of `source`."""
    rng = np.random.default_rng((world.seed, owner, source, turn, width))
    return draw(rng, (world.num_tokens(source), width), dtype, world.case.values)


def combined(world: World, rank: int, turn: int, lost: Ranks, biases: tuple | None) -> np.ndarray:
    """Sums of `rank` without the ranks `lost`; those of the weights if `biases` is None."""
    case, in_rank = world.case, world.sent[rank].layout.in_rank
    is_rows = biases is not None
    dtype, width = (dtype_of(case.combine_dtype), case.hidden) if is_rows else (None, case.topk)
    owners = [owner for owner in range(world.size) if owner not in lost]
    dtype = np.dtype(np.float32) if dtype is None else dtype
    tokens = [np.flatnonzero(in_rank[:, owner]) for owner in owners]
    routes = [oracle.Route(np.full(len(t), rank), t) for t in tokens]
    made = [made_of(world, owner, rank, dtype, width, turn) for owner in owners]
    rows = [part[t] for part, t in zip(made, tokens, strict=True)]
    return oracle.combine(rows, routes, rank, world.num_tokens(rank), biases or ())


def low_latency_made_of(world: ll.World, expert: int, source: int, turn: int) -> np.ndarray:
    rng = np.random.default_rng((world.seed, expert, source, turn, 8))
    shape = (world.num_tokens(source), world.case.hidden)
    return draw(rng, shape, dtype_of(world.case.combine_dtype), "normal")


def low_latency_combined(
    world: ll.World, rank: int, turn: int, lost: Ranks, exact: bool
) -> np.ndarray:
    placement, idx = world.placement, world.topk_idx[rank]
    kept = np.where((idx >= 0) & ~np.isin(placement.owner[idx], list(lost)), idx, -1)
    tokens = world.num_tokens(rank)
    # Rows of this rank's tokens only, each at the index of its token.
    slots = copy.copy(world.slots)
    slots.of = {e: {rank: np.arange(tokens)} for e in range(world.case.experts)}
    shape, dtype = (-1, tokens, world.case.hidden), dtype_of(world.case.combine_dtype)
    rows = []
    for owner in range(world.size):
        experts = placement.experts_of(owner)
        made = [low_latency_made_of(world, int(e), rank, turn) for e in experts]
        empty = np.zeros((0, *shape[1:]), dtype)
        rows.append(np.stack(made) if made else empty)
    return ll_oracle.combined(slots, rank, kept, world.topk_weights[rank], rows, exact)
