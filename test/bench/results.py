# SPDX-License-Identifier: MIT
"""Figures from what the ranks measured, and the bounds that they are held to."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

import host
import limits
import mscclpp_ep as ep
import ours
import peers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cases import Settings
    from clock import Key, Span
    from worker import Measured

_NO_BYTES = frozenset({ours.LAYOUT})


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        tokens: of each rank.
        median_ms: over iterations, of the time in which all ranks did it; `p99_ms` and `min_ms`
            likewise.
        calls: how many were timed.
        bytes: of rows that a rank receives, on average.
        gb_per_s: `bytes` in the median time.
        percent_of_limit: that rate as a share of the fastest copy of so many bytes.
        times_gloo: how many times faster than gloo the operation is.
    """

    system: str
    op: str
    tokens: int
    calls: int
    median_ms: float
    p99_ms: float
    min_ms: float
    bytes: int | None
    gb_per_s: float | None
    percent_of_limit: float | None
    times_gloo: float | None = None


@dataclasses.dataclass(frozen=True)
class Bound:
    """Something that must hold; `value` is None if it could not be measured."""

    name: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether it was measured and holds."""
        if self.value is None:
            return False
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)


class Results:
    """The table of a run."""

    def __init__(
        self,
        settings: Settings,
        measured: list[Measured],
        not_measured: dict[str, str],
        load: float,
    ) -> None:
        self.settings = settings
        self.load = load
        self.not_measured = not_measured
        self.received = {
            size: statistics.mean(n for rank in measured for n in rank.received[size])
            for size in settings.sizes
        }
        durations = {
            key: [_duration(spans) for spans in zip(*(m.spans[key] for m in measured), strict=True)]
            for key in measured[0].spans
        }
        # The limit of each number of tokens: the fastest way to copy.
        self.limit_ms = {
            size: min(
                1e3 * statistics.median(seconds)
                for (tokens, system, _), seconds in durations.items()
                if system == limits.SYSTEM and tokens == size
            )
            for size in settings.sizes
        }
        rows = [self._row(key, seconds) for key, seconds in durations.items()]
        gloo = {_kind(row.op): row.median_ms for row in rows if row.system == peers.GLOO}
        self.rows = [self._compared(row, gloo) for row in rows]
        self.bounds = self._make_bounds()

    def _row(self, key: Key, seconds: list[float]) -> Row:
        tokens, system, op = key
        milliseconds = 1e3 * np.array(seconds)
        median = float(np.median(milliseconds))
        moves = op not in _NO_BYTES
        return Row(
            system=system,
            op=op,
            tokens=tokens,
            calls=len(seconds),
            median_ms=median,
            p99_ms=float(np.percentile(milliseconds, 99)),
            min_ms=float(milliseconds.min()),
            bytes=round(self.received[tokens]) if moves else None,
            gb_per_s=self.received[tokens] / median / 1e6 if moves else None,
            percent_of_limit=100 * self.limit_ms[tokens] / median if moves else None,
        )

    def _compared(self, row: Row, gloo: dict[str, float]) -> Row:
        peer = gloo.get(_kind(row.op))
        if row.system != ours.SYSTEM or row.tokens != self.settings.tokens or peer is None:
            return row
        return dataclasses.replace(row, times_gloo=peer / row.median_ms)

    def ours(self, op: str, tokens: int | None = None) -> Row:
        """The line of an operation of the library."""
        size = self.settings.tokens if tokens is None else tokens
        key = (ours.SYSTEM, op, size)
        return next(row for row in self.rows if (row.system, row.op, row.tokens) == key)

    def growth(self, op: str) -> float:
        """Time with most tokens over time with fewest, divided by the ratio of tokens."""
        least, most = self.settings.sizes[0], self.settings.sizes[-1]
        times = self.ours(op, most).median_ms / self.ours(op, least).median_ms
        return times * least / most

    def _make_bounds(self) -> list[Bound]:
        dispatch, combine = self.ours(ours.DISPATCH), self.ours(ours.COMBINE)
        no_block = self.ours(ours.NO_BLOCK).median_ms / dispatch.median_ms
        bounds = [
            Bound("dispatch: times faster than gloo", dispatch.times_gloo, least=12),
            Bound("combine: times faster than gloo", combine.times_gloo, least=20),
            Bound("dispatch: percent of the limit", dispatch.percent_of_limit, least=70),
            Bound("combine: percent of the limit", combine.percent_of_limit, least=70),
            Bound("dispatch, no block free: times the time of dispatch", no_block, most=1.5),
        ]
        sizes = self.settings.sizes
        if len(sizes) > 1:
            text = f"from {sizes[0]} to {sizes[-1]} tokens: growth of the time over that of tokens"
            for name, op in (("dispatch", ours.DISPATCH), ("combine", ours.COMBINE)):
                bounds.append(Bound(f"{name}, {text}", self.growth(op), least=0.85, most=1.15))
        return bounds

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "version": ep.__version__,
            "machine": host.describe() | {"load_before": self.load},
            "settings": dataclasses.asdict(self.settings),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "limit_ms": {str(size): limit for size, limit in self.limit_ms.items()},
            "bounds": [dataclasses.asdict(b) | {"met": b.met} for b in self.bounds],
            "not_measured": self.not_measured,
        }


def _duration(spans: Iterable[Span]) -> float:
    """From the first rank's begin to the last one's end.

    The longest span alone would flatter what ranks do without waiting for each other, where they
    share cores: then they do it one after the other.
    """
    pairs = list(spans)
    return max(end for _, end in pairs) - min(begin for begin, _ in pairs)


def _kind(op: str) -> str:
    """What an operation is, whatever its circumstances."""
    return op.split(",", maxsplit=1)[0]
