# SPDX-License-Identifier: MIT
"""One rank of a run: everything is measured in turn, on the same inputs, again and again.

The systems take turns with every set of inputs, so that a machine that slows down for a while slows
all of them.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mscclpp_ep.bench.cases import Case
from mscclpp_ep.bench.clock import Clock, Key, Span, SpinBarrier
from mscclpp_ep.bench.gloo import GLOO, Gloo
from mscclpp_ep.bench.ht import HighThroughput
from mscclpp_ep.bench.limits import Limits
from mscclpp_ep.bench.ll import LowLatency
from mscclpp_ep.bench.ll_limits import LowLatencyLimits
from mscclpp_ep.bench.settings import HT

if TYPE_CHECKING:
    import mscclpp_ep as ep
    from mscclpp_ep.bench.settings import Settings
    from mscclpp_ep.cli.launch import Rank


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Rows that a rank receives in one dispatch.

    Attributes:
        rows: one a token and rank, this one included.
        rows_from_others: those of them that come from another rank.
        choices: one a token and expert, which the LL mode makes of them.
    """

    rows: int
    rows_from_others: int
    choices: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one rank saw.

    Attributes:
        spans: of each call, by tokens, system and operation.
        traffic: by tokens, one for each iteration.
    """

    spans: dict[Key, list[Span]]
    traffic: dict[int, list[Traffic]]


class System(Protocol):
    """Something that is measured, on one rank."""

    def measure(self, case: Case, iterations: int, thorough: bool) -> None:
        """Times the operations and checks their results.

        `thorough`: not only what is compared between sizes.
        """

    def destroy(self) -> None:
        """Ends it; collective."""


def run_rank(rank: Rank, settings: Settings) -> Measured:
    """Measures everything of one mode on one rank."""
    folder = Path(rank.meeting_point).parent
    clock = Clock(SpinBarrier(folder / "barrier", rank.index, rank.size), settings)
    traffic: dict[int, list[Traffic]] = {size: [] for size in settings.sizes}
    with rank.join() as group:
        systems = _systems(group, clock, settings, folder)
        gc.disable()
        for number, iterations in enumerate(settings.rounds()):
            for size in settings.sizes:
                rank.report(f"{settings.mode}: inputs {number + 1}, {size} tokens")
                case = Case(settings, rank.index, size, number)
                traffic[size] += [_traffic(case)] * iterations
                for system in systems:
                    system.measure(case, iterations, size == settings.tokens)
                del case
                gc.collect()
        for system in systems:
            system.destroy()
    return Measured(dict(clock.spans), traffic)


def _systems(group: ep.Group, clock: Clock, settings: Settings, folder: Path) -> list[System]:
    systems: list[System]
    if settings.mode == HT:
        most = settings.ranks * settings.sizes[-1] * settings.row_bytes
        systems = [Limits(clock, settings.threads, most), HighThroughput(group, clock, settings)]
    else:
        systems = [
            LowLatencyLimits(group, clock, settings),
            LowLatency(group, clock, settings),
        ]
    if GLOO in settings.peers:
        systems.append(Gloo(clock, settings, group.rank, folder))
    return systems


def _traffic(case: Case) -> Traffic:
    return Traffic(
        rows=case.received_by(case.rank),
        rows_from_others=case.received_from_others(case.rank),
        choices=case.choices_received_by(case.rank),
    )
