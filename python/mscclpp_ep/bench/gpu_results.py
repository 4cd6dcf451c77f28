# SPDX-License-Identifier: MIT
"""Figures from what the ranks measured on GPUs."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

import mscclpp_ep as ep
from mscclpp_ep.bench import host
from mscclpp_ep.bench.gpu_floor import bandwidth
from mscclpp_ep.bench.gpu_inputs import fp8_row_bytes
from mscclpp_ep.bench.ops import CHAINED, COMBINE, DISPATCH, FLOOR, OURS, START, kind, variant
from mscclpp_ep.bench.settings import HT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mscclpp_ep.bench.gpu_clock import GpuKey, Times
    from mscclpp_ep.bench.gpu_measure import CaseFailure
    from mscclpp_ep.bench.gpu_profile import Activities
    from mscclpp_ep.bench.gpu_settings import GpuSettings
    from mscclpp_ep.bench.gpu_worker import GpuMeasured

KERNEL, EVENTS, HOST = WAYS = ("kernel", "events", "host")


@dataclasses.dataclass(frozen=True)
class Figure:
    """Times of one way to take them, over iterations, of the slowest rank of each.

    Attributes:
        calls: how many were timed.
        percent_of_floor: the floor as a share of the median; None if it was not measured.
        logical_gbps: of all rows that a rank receives, in the median time, 10^9 bytes a second.
        link_gbps: of those that come from other ranks.
    """

    calls: int
    p50_us: float
    p95_us: float
    min_us: float
    percent_of_floor: float | None
    logical_gbps: float
    link_gbps: float


@dataclasses.dataclass(frozen=True)
class GpuRow:
    """One line of the table.

    Attributes:
        op: what was measured.
        variant: how it differs from the plain one; None if it is that.
        sms: multiprocessors that it may use; None if it cannot be told.
        logical_bytes: of rows that a rank receives, on average, its own included.
        link_bytes: of rows that a rank receives from others, on average.
        floor_us: how long the rows would take to cross, if nothing else had to be done.
        figures: by the way that times were taken.
        activities: what the GPU did, in microseconds; a median by name, of the slowest rank.
        times_faster: how many times as long each peer takes at its best, by events.
    """

    system: str
    mode: str
    op: str
    variant: str | None
    sms: int | None
    tokens: int
    logical_bytes: float
    link_bytes: float
    floor_us: float | None
    figures: dict[str, Figure]
    activities: dict[str, float]
    times_faster: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The operation and how it differs from the plain one."""
        return self.op if self.variant is None else f"{self.op}, {self.variant}"


def slowest(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Of each iteration, the longest time that a rank took."""
    return [max(times) for times in zip(*of_ranks, strict=True)]


def merged(of_ranks: Sequence[Sequence[Activities]]) -> dict[str, float]:
    """By name, the median over iterations of the longest time that a rank took."""
    names = dict.fromkeys(n for rank in of_ranks for each in rank for n in each)
    return {
        name: statistics.median(slowest([[c.get(name, 0.0) for c in rank] for rank in of_ranks]))
        for name in names
    }


def row_bytes_of(op: str, hidden: int) -> int:
    """Bytes that a token brings to a rank, there and, in a chain, back."""
    if "FP8" in op:
        return fp8_row_bytes(hidden)
    return 2 * hidden * (2 if kind(op) == CHAINED else 1)


class GpuResults:
    """The figures of a run.

    Attributes:
        settings: what was measured.
        bandwidths: of plain copies to the next rank, bytes a second, by multiprocessors.
        rows: of the table.
        failures: what has no figures, and why.
    """

    def __init__(self, settings: GpuSettings, measured: list[GpuMeasured]) -> None:
        """Computes them, of what each rank measured."""
        self.settings = settings
        self.devices = [rank.device for rank in measured]
        self.failures = measured[0].failures
        self.profiler_error = next(
            (rank.profiler_error for rank in measured if rank.profiler_error), None
        )
        self._traffic = [each for rank in measured for each in rank.traffic]
        failed = {failure.sms for failure in self.failures if failure.system == FLOOR}
        self.bandwidths = {
            sms: bandwidth([rank.pushes[sms] for rank in measured])
            for sms in measured[0].pushes
            if sms not in failed
        }
        keys = [key for key in measured[0].times if all(key in rank.times for rank in measured)]
        rows = [self._row(key, [rank.times[key] for rank in measured]) for key in keys]
        self.rows = [self._compared(row, rows) for row in rows]

    @property
    def passed(self) -> bool:
        """Whether everything of the library was measured and right."""
        return not any(failure.system in {OURS, FLOOR} for failure in self.failures)

    @property
    def floor_kind(self) -> str:
        """What the rows cross."""
        return "link" if self.settings.linked else "memory"

    @property
    def best(self) -> tuple[int, float] | None:
        """The fastest plain copy: its multiprocessors, and bytes a second."""
        return max(self.bandwidths.items(), key=lambda item: item[1], default=None)

    def floor_us(self, op: str) -> float | None:
        """How long the rows of an operation take to cross at the best bandwidth."""
        if self.best is None:
            return None
        rows = self._mean("rows_crossing")
        return 1e6 * rows * row_bytes_of(op, self.settings.base.hidden) / self.best[1]

    def _mean(self, name: str) -> float:
        weights = [traffic.iterations for traffic in self._traffic]
        return float(np.average([getattr(t, name) for t in self._traffic], weights=weights))

    def _row(self, key: GpuKey, of_ranks: list[Times]) -> GpuRow:
        system, op, sms = key
        row_bytes = row_bytes_of(op, self.settings.base.hidden)
        logical = self._mean("rows") * row_bytes
        link = self._mean("rows_from_others") * row_bytes
        activities = [times.activities for times in of_ranks]
        if len({len(calls) for calls in activities}) > 1:
            activities = [[] for _ in of_ranks]  # the profiler failed on some ranks only
        seconds = {
            KERNEL: slowest([[sum(call.values()) for call in rank] for rank in activities]),
            EVENTS: slowest([times.events for times in of_ranks]),
            HOST: slowest([times.host for times in of_ranks]),
        }
        floor = self.floor_us(op)
        figures = {
            way: _figure(each, floor, logical, link) for way, each in seconds.items() if each
        }
        return GpuRow(
            system=system,
            mode=HT,
            op=kind(op),
            variant=variant(op),
            sms=sms or None,
            tokens=self.settings.base.tokens,
            logical_bytes=logical,
            link_bytes=link,
            floor_us=floor,
            figures=figures,
            activities={name: 1e6 * each for name, each in merged(activities).items()},
        )

    def _compared(self, row: GpuRow, rows: list[GpuRow]) -> GpuRow:
        ours = row.figures.get(EVENTS)
        if row.system != OURS or ours is None:
            return row
        best: dict[str, float] = {}
        for peer in rows:
            # With rows of the same size; a peer without the variant shows its plain operation.
            same = peer.op == row.op and peer.link_bytes == row.link_bytes
            if peer.system == OURS or not same or EVENTS not in peer.figures:
                continue
            times = peer.figures[EVENTS].p50_us / ours.p50_us
            best[peer.system] = min(times, best.get(peer.system, times))
        return dataclasses.replace(row, times_faster=best)

    def floor_to_json(self) -> dict[str, Any]:
        """The bandwidths, and what follows from the best."""
        best = self.best
        return {
            "kind": self.floor_kind,
            "push_gbps": {str(sms): each / 1e9 for sms, each in self.bandwidths.items()},
            "best_sms": None if best is None else best[0],
            "rows_crossing": self._mean("rows_crossing"),
            DISPATCH: {"floor_us": self.floor_us(DISPATCH)},
            COMBINE: {"floor_us": self.floor_us(COMBINE)},
        }


def _figure(seconds: list[float], floor: float | None, logical: float, link: float) -> Figure:
    p50, p95 = (1e6 * float(each) for each in np.percentile(seconds, (50, 95)))
    # The profiler may see a call that moved nothing.
    rate = 0.0 if p50 == 0 else 1 / p50 / 1e3
    return Figure(
        calls=len(seconds),
        p50_us=p50,
        p95_us=p95,
        min_us=1e6 * min(seconds),
        percent_of_floor=None if floor is None or p50 == 0 else 100 * floor / p50,
        logical_gbps=logical * rate,
        link_gbps=link * rate,
    )


def not_measured(results: GpuResults, left_out: dict[str, str]) -> dict[str, str]:
    """What has no figures though nothing of the library is wrong, and why."""
    reasons = dict(left_out)
    for failure in results.failures:
        if failure.op == START:
            reasons[failure.system] = failure.message
    if results.profiler_error is not None:
        reasons["times of kernels"] = results.profiler_error
    return reasons


def gpu_to_json(results: GpuResults, left_out: dict[str, str], load: float) -> dict[str, Any]:
    """Everything, for a file: with the keys of a run on the CPU, as far as they mean something."""
    plain = [row for row in results.rows if row.op != CHAINED and row.variant is None]
    return {
        "version": ep.__version__,
        "machine": host.describe() | {"load_before": load, "devices": results.devices},
        "config": {HT: results.settings.to_json()},
        "limits": {HT: results.floor_to_json()},
        "results": [_entry(row) for row in plain],
        "chained": [_entry(row) for row in results.rows if row.op == CHAINED],
        "variants": [_entry(r) for r in results.rows if r.op != CHAINED and r.variant is not None],
        "failed": [_failure(failure) for failure in results.failures],
        "not_measured": not_measured(results, left_out),
    }


def _entry(row: GpuRow) -> dict[str, Any]:
    fields: dict[str, Any] = dataclasses.asdict(row)
    fields |= fields.pop("figures")
    return fields


def _failure(failure: CaseFailure) -> dict[str, Any]:
    return dataclasses.asdict(failure)
