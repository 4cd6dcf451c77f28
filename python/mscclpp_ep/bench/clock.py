# SPDX-License-Identifier: MIT
"""Times calls that all ranks make at once."""

from __future__ import annotations

import mmap
import os
import time
from collections import defaultdict
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mscclpp_ep.bench.settings import Settings

Result = TypeVar("Result")
Key = tuple[int, str, str]  # tokens, system, operation
Span = tuple[float, float]  # begin, end

_LINE = 8  # words of a cache line, so that ranks do not write into each other's


class SpinBarrier:
    """Lets ranks go on together, within a microsecond or so if each has a core.

    A barrier that sleeps would add the time of waking up to what is measured.
    """

    def __init__(self, path: Path, rank: int, size: int) -> None:
        length = size * _LINE * 8
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, length)
            memory = mmap.mmap(descriptor, length)
        finally:
            os.close(descriptor)
        self._arrived = np.frombuffer(memory, np.int64).reshape(size, _LINE)[:, 0]
        self._rank = rank
        self._turn = 0

    @property
    def turn(self) -> int:
        """How often this rank has waited."""
        return self._turn

    def wait(self, patience: float | None = None) -> None:
        """Returns when every rank has called it. A rank that died is noticed by the parent.

        Raises:
            TimeoutError: a rank did not come within `patience` seconds; `realign` comes next.
        """
        self._turn += 1
        self._arrived[self._rank] = self._turn
        deadline = None if patience is None else time.monotonic() + patience
        while int(self._arrived.min()) < self._turn:
            os.sched_yield()
            if deadline is not None and time.monotonic() > deadline:
                late = np.flatnonzero(self._arrived < self._turn).tolist()
                msg = f"rank {', '.join(map(str, late))} did not come to a barrier"
                raise TimeoutError(msg)

    def realign(self, turn: int) -> None:
        """Goes on from a turn that all ranks agreed on, beyond those of each."""
        self._turn = turn
        self._arrived[self._rank] = turn


class Clock:
    """Keeps when calls began and ended on this rank, in seconds of the clock that ranks share.

    Attributes:
        barrier: of all ranks.
        spans: of each timed call; of each chain, a span as long as one of its pairs.
    """

    def __init__(self, barrier: SpinBarrier, settings: Settings) -> None:
        self.barrier = barrier
        self.spans: dict[Key, list[Span]] = defaultdict(list)
        self._settings = settings
        # Touched, so that it is memory.
        self._other = np.ones(settings.flush << 20, np.uint8).view(np.int64)

    def measure(
        self, key: Key, call: Callable[[], Result], iterations: int, warmup: int | None = None
    ) -> Result:
        """Times calls, each after a barrier, and returns the result of the last.

        The result of each call is dropped before the next, outside the time, and other memory is
        read, so that no call finds what the one before left in the caches of its core. Every rank
        must make the same calls.
        """
        for _ in range(self._settings.warmup if warmup is None else warmup):
            call()
        kept: list[Result] = []
        for _ in range(iterations):
            kept.clear()
            self._other.sum()
            self.barrier.wait()
            start = time.perf_counter()
            result = call()
            self.spans[key].append((start, time.perf_counter()))
            kept.append(result)
            del result
        return kept.pop()

    def measure_chain(self, key: Key, pair: Callable[[], Result]) -> Result:
        """Times a chain of calls that follow each other at once; returns the result of the last.

        Nothing waits between them but what they wait for themselves.
        """
        skipped, timed = self._settings.chain_warmup, self._settings.chain
        self._other.sum()
        self.barrier.wait()
        for _ in range(skipped):
            pair()
        start = time.perf_counter()
        for _ in range(timed - 1 - skipped):
            pair()
        result = pair()
        period = (time.perf_counter() - start) / (timed - skipped)
        self.spans[key].append((start, start + period))
        return result
