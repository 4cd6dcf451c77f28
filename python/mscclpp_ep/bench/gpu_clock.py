# SPDX-License-Identifier: MIT
"""Times calls that all ranks make at once, on GPUs: by the host, by events and by the profiler."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mscclpp_ep.bench.gpu_checks import spoil
from mscclpp_ep.bench.gpu_profile import Activities, activities_between_marks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mscclpp_ep.bench.clock import SpinBarrier

Result = TypeVar("Result")
GpuKey = tuple[str, str, int]  # system, operation, multiprocessors (0: it does not take a number)

# Long enough to enqueue a call behind, 0.4 ms or so; and as short as can be.
_SPIN_CYCLES = 800_000
_MARK_CYCLES = 1
_PROFILED_WARMUP = 1


@dataclasses.dataclass
class Times:
    """Of the calls of one kind on one rank, in the order of iterations.

    Attributes:
        host: seconds from the barrier until the call's work is done, as the host sees it.
        events: seconds between CUDA events before and after the call on its stream.
        activities: what the GPU did for the call, by name, in seconds.
    """

    host: list[float] = dataclasses.field(default_factory=list)
    events: list[float] = dataclasses.field(default_factory=list)
    activities: list[Activities] = dataclasses.field(default_factory=list)


class GpuClock:
    """Keeps the times of calls on this rank.

    Every call comes after a barrier of all ranks, with a cold second-level cache. Where the host is
    not what is timed, it comes behind a kernel that spins, so that the GPU does not wait for the
    host to launch it, and behind a gate, so that ranks that launch it at slightly different times
    still start together.

    Attributes:
        barrier: of all ranks.
        gate: likewise, of their GPUs.
        times: by key.
    """

    def __init__(
        self,
        torch: Any,
        device: str,
        barrier: SpinBarrier,
        gate: Callable[[], None],
        *,
        warmup: int,
        flush_bytes: int,
        patience: float,
    ) -> None:
        self.barrier = barrier
        self.gate = gate
        self.times: dict[GpuKey, Times] = defaultdict(Times)
        self.profiler_error: str | None = None
        self._torch = torch
        self._warmup = warmup
        self._patience = patience
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        words = max(flush_bytes, 2 * cache) // 4 + 1
        self._other = torch.empty(words, dtype=torch.int32, device=device)
        self._flushes = 0
        # While the profiler runs: the key of each call, and how many pairs it is of, in the order
        # of their marks.
        self._marked: list[tuple[GpuKey, int]] | None = None

    def measure(
        self,
        key: GpuKey,
        call: Callable[[], Result],
        iterations: int,
        *,
        pairs: int = 1,
        skipped: int = 0,
        before: Callable[[], object] = lambda: None,
    ) -> Result:
        """Times calls and returns the result of the last. Every rank must make the same calls.

        The result of each call is spoiled and dropped before the next, outside the time.

        Args:
            key: Of what is timed.
            call: What is timed.
            iterations: How often.
            pairs: Calls in a row that one time is of; their share of it is kept.
            skipped: Calls in a row before them that are not timed.
            before: What comes before each time, and is not in it.
        """
        ways: list[Callable[[GpuKey, Callable[[], Result], int, int], Result]]
        if self._marked is not None:
            warmup, ways = _PROFILED_WARMUP, [self._by_profiler]
        else:
            warmup, ways = self._warmup, [self._by_host, self._by_events]
        for _ in range(warmup):
            before()
            spoil(self._torch, call())
        kept: list[Result] = []
        for way in ways:
            for _ in range(iterations):
                while kept:
                    spoil(self._torch, kept.pop())
                before()
                self._flush()
                self.barrier.wait(self._patience)
                kept.append(way(key, call, pairs, skipped))
        self._torch.cuda.synchronize()
        return kept.pop()

    def discard(self, key: GpuKey) -> None:
        """Forgets the times of calls that turned out to be wrong."""
        self.times.pop(key, None)

    @contextlib.contextmanager
    def profiler(self) -> Iterator[None]:
        """Lets the profiler time what is measured inside, instead of the host and events."""
        from torch import profiler

        self._marked = []
        self._torch.cuda.synchronize()
        try:
            with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
                yield
                self._torch.cuda.synchronize()
            self._read(profile, self._marked)
        finally:
            self._marked = None

    def _read(self, profile: Any, marked: list[tuple[GpuKey, int]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            trace = json.loads(file.read_text(encoding="utf-8"))
        calls = activities_between_marks(trace["traceEvents"])
        if len(calls) != len(marked):
            self.profiler_error = (
                f"the profiler saw {len(calls)} of {len(marked)} calls; it may be denied to this "
                "user, or used by another program"
            )
            return
        for (key, pairs), activities in zip(marked, calls, strict=True):
            # What was discarded, because a call failed, begins no new entry.
            if key in self.times:
                shares = {name: seconds / pairs for name, seconds in activities.items()}
                self.times[key].activities.append(shares)

    def _flush(self) -> None:
        """Pushes everything else out of the second-level cache."""
        self._flushes += 1
        self._other.fill_(self._flushes)
        self._torch.cuda.synchronize()

    def _by_host(self, key: GpuKey, call: Callable[[], Result], pairs: int, skipped: int) -> Result:
        # All of a chain: the GPU may still be at its beginning when the host is at its end.
        start = time.perf_counter()
        result = _repeat(call, skipped + pairs)
        self._torch.cuda.current_stream().synchronize()
        self.times[key].host.append((time.perf_counter() - start) / (skipped + pairs))
        return result

    def _by_events(
        self, key: GpuKey, call: Callable[[], Result], pairs: int, skipped: int
    ) -> Result:
        events = self._torch.cuda.Event
        begin, end = events(enable_timing=True), events(enable_timing=True)
        self._torch.cuda._sleep(_SPIN_CYCLES)
        self.gate()
        for _ in range(skipped):
            call()
        begin.record()
        result = _repeat(call, pairs)
        end.record()
        self._torch.cuda.synchronize()
        self.times[key].events.append(begin.elapsed_time(end) * 1e-3 / pairs)
        return result

    def _by_profiler(
        self, key: GpuKey, call: Callable[[], Result], pairs: int, skipped: int
    ) -> Result:
        """Marks where the call begins and ends on the GPU, for `activities_between_marks`.

        What spins before the gate is a mark as well: each call has three.
        """
        assert self._marked is not None
        for _ in range(skipped):
            call()
        self._torch.cuda.synchronize()
        self._marked.append((key, pairs))
        self._torch.cuda._sleep(_SPIN_CYCLES)
        self.gate()
        self._torch.cuda._sleep(_MARK_CYCLES)
        try:
            return _repeat(call, pairs)
        finally:
            # Of every stream: the library has its own.
            self._torch.cuda.synchronize()
            self._torch.cuda._sleep(_MARK_CYCLES)
            self._torch.cuda.synchronize()


def _repeat(call: Callable[[], Result], times: int) -> Result:
    for _ in range(times - 1):
        call()
    return call()
