# SPDX-License-Identifier: MIT
"""One rank of a run: everything is measured in turn, on the same inputs, again and again.

The systems take turns with every set of inputs, so that a machine that slows down for a while slows
all of them.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import peers
from cases import Case, Settings
from clock import Clock, Key, Span, SpinBarrier
from limits import Limits
from mscclpp_ep.cli.launch import Rank
from ours import Ours


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one rank saw.

    Attributes:
        spans: of each call, by tokens, system and operation.
        received: bytes of rows received, by tokens, one for each iteration.
    """

    spans: dict[Key, list[Span]]
    received: dict[int, list[int]]


def run_rank(rank: Rank, settings: Settings) -> Measured:
    """Measures everything on one rank."""
    folder = Path(rank.meeting_point).parent
    clock = Clock(SpinBarrier(folder / "barrier", rank.index, rank.size), settings.flush << 20)
    most = settings.ranks * settings.sizes[-1]
    received: dict[int, list[int]] = {size: [] for size in settings.sizes}
    limits = Limits(clock, settings.threads, most * settings.row_bytes)
    with rank.join() as group:
        gloo = None
        if peers.GLOO in settings.peers:
            gloo = peers.Gloo(clock, settings, rank.index, folder)
        ours = Ours(group, clock, settings)
        rounds = settings.rounds()
        gc.disable()
        for number, iterations in enumerate(rounds):
            for size in settings.sizes:
                rank.report(f"inputs {number + 1} of {len(rounds)}, {size} tokens")
                case = Case(settings, rank.index, size, number)
                received[size] += [case.bytes_received] * iterations
                limits.measure(case, iterations)
                ours.measure(case, iterations, size == settings.tokens)
                if gloo is not None and size == settings.tokens:
                    gloo.measure(case, iterations)
                del case
                gc.collect()
        ours.destroy()
        if gloo is not None:
            gloo.destroy()
    return Measured(dict(clock.spans), received)
