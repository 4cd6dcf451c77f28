# SPDX-License-Identifier: MIT
"""Runs cases on all ranks; what fails on one of them is noted on all, and not tried again."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import sys
import traceback
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import mscclpp_ep as ep
    from mscclpp_ep.bench.gpu_clock import GpuClock
    from mscclpp_ep.bench.gpu_inputs import Inputs

# Of one case. The library's own waits end long before; a peer may compile kernels first.
_PATIENCE_S = 300.0


@dataclasses.dataclass(frozen=True)
class CaseFailure:
    """Why something was not measured, or has no figures.

    Attributes:
        sms: with how many multiprocessors it failed; 0: it does not take a number.
        rank: the first rank that failed.
        message: of its error.
        details: its traceback.
    """

    system: str
    op: str
    sms: int
    rank: int
    message: str
    details: str


class Attempts:
    """What was tried on this rank.

    Attributes:
        failures: the first of each operation of a system.
        recover: what all ranks do after a failure: some may have made more calls than others.
    """

    def __init__(self, group: ep.Group, clock: GpuClock) -> None:
        self.failures: list[CaseFailure] = []
        self.recover: Callable[[], None] = lambda: None
        self._group = group
        self._clock = clock

    def run(self, system: str, op: str, sms: int, body: Callable[[], None]) -> bool:
        """Measures and checks an operation; collective. Whether it went well on every rank.

        An operation of a system that failed before is left out.
        """
        if any((failed.system, failed.op) == (system, op) for failed in self.failures):
            return True
        message, details = "", ""
        try:
            with watched():
                body()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            details = traceback.format_exc()
        failure = self._agree(system, op, sms, message, details)
        if failure is None:
            return True
        self.failures.append(failure)
        self.recover()
        self._clock.discard((system, op, sms))
        return False

    def _agree(
        self, system: str, op: str, sms: int, message: str, details: str
    ) -> CaseFailure | None:
        """The failure of the rank that failed first, or None if none did."""
        barrier = self._clock.barrier
        mine = json.dumps([message, details, barrier.turn]).encode()
        everyone = [json.loads(each) for each in self._group.all_gather(mine)]
        failed = [rank for rank, (why, _, _) in enumerate(everyone) if why]
        if not failed:
            return None
        # Some ranks may have come to more barriers than others.
        barrier.realign(1 + max(turn for _, _, turn in everyone))
        # The others may only have waited for the one that matters.
        rank = min(failed, key=lambda each: everyone[each][0].startswith(_CONSEQUENCES))
        why, trace, _ = everyone[rank]
        return CaseFailure(system, op, sms, rank, why, trace)


_CONSEQUENCES = ("PeerFailure", "Timeout")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends this process, with the stack of each thread, if what is inside never ends."""
    faulthandler.dump_traceback_later(_PATIENCE_S, exit=True, file=sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class GpuSystem(Protocol):
    """Something that is measured, on one rank.

    Attributes:
        name: in tables.
        takes_sms: whether it can be told how many multiprocessors to use.
    """

    name: str
    takes_sms: bool

    def measure(
        self, attempts: Attempts, clock: GpuClock, inputs: Inputs, sms: int, iterations: int
    ) -> None:
        """Times the operations and checks their results; collective."""

    def destroy(self) -> None:
        """Ends it; collective."""
