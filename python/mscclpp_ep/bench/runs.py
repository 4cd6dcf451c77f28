# SPDX-License-Identifier: MIT
"""Runs the measurements of a mode: the ranks that this program starts, and those of MPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mscclpp_ep.bench import ll, mpirun
from mscclpp_ep.bench.mpi import MPI
from mscclpp_ep.bench.results import Results
from mscclpp_ep.bench.settings import LL
from mscclpp_ep.bench.worker import run_rank
from mscclpp_ep.cli.launch import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.settings import Settings


def why_not(settings: Settings) -> str | None:
    """Why a mode cannot be measured here; None if it can."""
    return ll.why_not(settings) if settings.mode == LL else None


def steps_of(settings: Settings) -> int:
    """How many steps `measure` reports."""
    rounds = len(settings.rounds())
    return rounds * len(settings.sizes) + (rounds if MPI in settings.peers else 0)


def measure(settings: Settings, on_step: Callable[[str], None]) -> tuple[Results, dict[str, str]]:
    """Measures a mode.

    Returns:
        The figures, and why each peer that failed is not among them.

    Raises:
        RankError: a rank failed, or what was measured was wrong.
        WrongResultError: what MPI computed was wrong.
    """

    def step(rank: int, text: str) -> None:
        if rank == 0:
            on_step(text)

    measured = run_ranks(run_rank, settings, settings.ranks, on_step=step)
    spans = [rank.spans for rank in measured]
    failed: dict[str, str] = {}
    if MPI in settings.peers:
        try:
            of_mpi = mpirun.run(settings, lambda: on_step(f"{settings.mode}: {MPI}"))
            spans = [rank | mpi for rank, mpi in zip(spans, of_mpi, strict=True)]
        except mpirun.MpiError as error:
            failed[MPI] = str(error)
            settings = settings.without_peers({MPI})
    return Results(settings, spans, [rank.traffic for rank in measured]), failed
