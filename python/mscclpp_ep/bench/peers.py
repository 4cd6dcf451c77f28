# SPDX-License-Identifier: MIT
"""Other ways to do the same work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mscclpp_ep.bench import gloo, mpirun
from mscclpp_ep.bench.gloo import GLOO
from mscclpp_ep.bench.mpi import MPI

if TYPE_CHECKING:
    from collections.abc import Callable

_REASONS: dict[str, Callable[[], str | None]] = {GLOO: gloo.why_not, MPI: mpirun.why_not}
PEERS = tuple(_REASONS)


def not_measurable(wanted: tuple[str, ...]) -> dict[str, str]:
    """Those that are not measured, each with the reason and what would change it."""
    reasons = {
        peer: why_not() if peer in wanted else "not asked for" for peer, why_not in _REASONS.items()
    }
    return {peer: reason for peer, reason in reasons.items() if reason is not None}
