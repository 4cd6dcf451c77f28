# SPDX-License-Identifier: MIT
"""Times calls that all ranks make at once."""

from __future__ import annotations

import mmap
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

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

    def wait(self) -> None:
        """Returns when every rank has called it. A rank that died is noticed by the parent."""
        self._turn += 1
        self._arrived[self._rank] = self._turn
        while int(self._arrived.min()) < self._turn:
            os.sched_yield()


class Clock:
    """Keeps when calls began and ended on this rank, in seconds of the clock that ranks share."""

    def __init__(self, barrier: SpinBarrier, flush_bytes: int) -> None:
        self._barrier = barrier
        self._other = np.ones(flush_bytes, np.uint8).view(np.int64)  # touched, so that it is memory
        self.spans: dict[Key, list[Span]] = defaultdict(list)

    def measure(
        self, key: Key, call: Callable[[], Result], iterations: int, warmup: int = 0
    ) -> Result:
        """Times calls, each after a barrier, and returns the result of the last.

        The result of each call is dropped before the next, outside the time, and other memory is
        read, so that no call finds what the one before left in the caches of its core. Every rank
        must make the same calls.
        """
        for _ in range(warmup):
            call()
        kept: list[Result] = []
        for _ in range(iterations):
            kept.clear()
            self._other.sum()
            self._barrier.wait()
            start = time.perf_counter()
            result = call()
            self.spans[key].append((start, time.perf_counter()))
            kept.append(result)
            del result
        return kept.pop()
