# SPDX-License-Identifier: MIT
"""Figures from what the ranks measured."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import mscclpp_ep as ep
from mscclpp_ep.bench import host
from mscclpp_ep.bench.ll import FP8_GROUP
from mscclpp_ep.bench.ops import (
    CHAINED,
    COMBINE,
    DISPATCH,
    FP8_DISPATCH,
    LAYOUT,
    LIMIT,
    OURS,
    kind,
    variant,
)
from mscclpp_ep.bench.settings import HT, LL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mscclpp_ep.bench.bounds import Bound
    from mscclpp_ep.bench.clock import Key, Span
    from mscclpp_ep.bench.settings import Settings
    from mscclpp_ep.bench.worker import Traffic

Spans = dict["Key", list["Span"]]
Seconds = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Times are over iterations, of what `seconds_of_calls` says, in microseconds. Of a chain they are
    those of one dispatch and combine.

    Attributes:
        mode: HT or LL.
        variant: how the operation differs from the plain one of its name; None if it is that.
        tokens: of each rank.
        calls: how many were timed; of a chain, how many chains.
        fastest_rank_us: median of the shortest time that a rank took, beside the others'.
        slowest_rank_us: median of the longest.
        logical_bytes: of rows that a rank receives, on average, its own included.
        wire_bytes: of rows that a rank receives from others, on average.
        logical_gbps: `logical_bytes` in the median time, 10^9 bytes a second.
        wire_gbps: likewise.
        limit_us: the fastest that the machine does the same, without any routing.
        percent_of_limit: `limit_us` as a share of the median time.
        times_faster: how many times as long each peer takes.
    """

    system: str
    mode: str
    op: str
    variant: str | None
    tokens: int
    calls: int
    median_us: float
    p90_us: float
    p99_us: float
    min_us: float
    fastest_rank_us: float
    slowest_rank_us: float
    logical_bytes: float | None
    wire_bytes: float | None
    logical_gbps: float | None
    wire_gbps: float | None
    limit_us: float | None
    percent_of_limit: float | None
    times_faster: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The operation and how it differs from the plain one."""
        return self.op if self.variant is None else f"{self.op}, {self.variant}"


def seconds_of_calls(spans: Sequence[Sequence[Span]]) -> Seconds:
    """How long each iteration took: from the first rank's begin to the last one's end.

    The longest span alone would flatter what ranks do without waiting for each other, where they
    share cores: then they do it one after the other.

    Args:
        spans: of each rank, one an iteration.
    """
    times = np.array(spans)
    seconds: Seconds = times[:, :, 1].max(axis=0) - times[:, :, 0].min(axis=0)
    return seconds


def seconds_of_chains(spans: Sequence[Sequence[Span]]) -> Seconds:
    """The period of each chain: the median of what ranks saw."""
    times = np.array(spans)
    seconds: Seconds = np.median(times[:, :, 1] - times[:, :, 0], axis=0)
    return seconds


class Results:
    """The figures of one mode."""

    def __init__(self, settings: Settings, spans: list[Spans], traffic: list[Any]) -> None:
        """Computes them.

        Args:
            settings: What was measured.
            spans: Of each rank.
            traffic: Of each rank, by tokens, one for each iteration.
        """
        self.settings = settings
        self._traffic: dict[int, list[Traffic]] = {
            size: [each for rank in traffic for each in rank[size]] for size in settings.sizes
        }
        self._spans = {key: [rank[key] for rank in spans] for key in spans[0]}
        self.limit_us = {
            key: 1e6 * float(np.median(seconds_of_calls(each)))
            for key, each in self._spans.items()
            if key[1] == LIMIT
        }
        rows = [self._row(key) for key in self._spans if key[1] != LIMIT]
        self.rows = [self._compared(row, rows) for row in rows]

    def limit(self, tokens: int, op: str) -> tuple[str, float] | None:
        """The fastest way to do without routing what an operation does, and its microseconds."""
        if op == LAYOUT:
            return None
        if op == CHAINED:
            parts = [self.limit(tokens, each) for each in (DISPATCH, COMBINE)]
            return "both", sum(part[1] for part in parts if part is not None)
        ways = {way: us for (size, _, way), us in self.limit_us.items() if size == tokens}
        if self.settings.mode == LL:
            same = op if op in ways else kind(op)
            return (same, ways[same]) if same in ways else None
        return min(ways.items(), key=lambda item: item[1])

    def _bytes(self, key: Key) -> tuple[float | None, float | None]:
        """Logical and wire, of one call of one rank on average."""
        tokens, system, op = key
        if op == LAYOUT:
            return None, None
        each = self._traffic[tokens]
        expanded = self.settings.mode == LL and system == OURS
        logical = statistics.fmean(t.choices if expanded else t.rows for t in each)
        wire = statistics.fmean(t.rows_from_others for t in each)
        row_bytes = self.settings.row_bytes
        if op == FP8_DISPATCH:
            row_bytes = self.settings.hidden + self.settings.hidden // FP8_GROUP * 4
        # A chain moves them there and back; a combine gives back as many as a dispatch brought.
        times = 2 * row_bytes if op == CHAINED else row_bytes
        return logical * times, wire * times

    def _row(self, key: Key) -> Row:
        tokens, system, op = key
        spans = self._spans[key]
        seconds = (seconds_of_chains if op == CHAINED else seconds_of_calls)(spans)
        of_ranks = np.diff(np.array(spans), axis=2)[:, :, 0]
        median, p90, p99 = (1e6 * float(p) for p in np.percentile(seconds, (50, 90, 99)))
        logical, wire = self._bytes(key)
        limit = self.limit(tokens, op)
        return Row(
            system=system,
            mode=self.settings.mode,
            op=kind(op),
            variant=variant(op),
            tokens=tokens,
            calls=len(seconds),
            median_us=median,
            p90_us=p90,
            p99_us=p99,
            min_us=1e6 * float(seconds.min()),
            fastest_rank_us=1e6 * float(np.median(of_ranks.min(axis=0))),
            slowest_rank_us=1e6 * float(np.median(of_ranks.max(axis=0))),
            logical_bytes=logical,
            wire_bytes=wire,
            logical_gbps=None if logical is None else logical / median / 1e3,
            wire_gbps=None if wire is None else wire / median / 1e3,
            limit_us=None if limit is None else limit[1],
            percent_of_limit=None if limit is None else 100 * limit[1] / median,
        )

    def _compared(self, row: Row, rows: list[Row]) -> Row:
        if row.system != OURS:
            return row
        peers = {
            peer.system: peer.median_us / row.median_us
            for peer in rows
            if peer.system != OURS and (peer.op, peer.tokens) == (row.op, row.tokens)
        }
        return dataclasses.replace(row, times_faster=peers)

    def find(self, name: str, tokens: int | None = None, system: str = OURS) -> Row:
        """The line of an operation, plain or not; by default at the headline number of tokens."""
        size = self.settings.tokens if tokens is None else tokens
        key = (system, name, size)
        return next(row for row in self.rows if (row.system, row.name, row.tokens) == key)

    def limits_to_json(self) -> dict[str, Any]:
        """Of the plain operations, at the headline number of tokens, and all that was tried."""
        tokens = self.settings.tokens
        found = {}
        for op in (DISPATCH, COMBINE):
            limit = self.limit(tokens, op)
            assert limit is not None
            logical, wire = self._bytes((tokens, LIMIT if self.settings.mode == HT else OURS, op))
            assert logical is not None and wire is not None
            found[op] = {
                "median_us": limit[1],
                "logical_gbps": logical / limit[1] / 1e3,
                "wire_gbps": wire / limit[1] / 1e3,
                "way": limit[0],
            }
        tried = {way: us for (size, _, way), us in self.limit_us.items() if size == tokens}
        return found | {"ways_us": tried}


def to_json(
    results: list[Results],
    bounds: list[Bound],
    not_measured: dict[str, str],
    load: float,
) -> dict[str, Any]:
    """Everything, for a file.

    `results` has the plain operations at the headline number of tokens; `ladder` at the others.
    """
    rows = [(row, each.settings.tokens) for each in results for row in each.rows]
    plain = [(r, headline) for r, headline in rows if r.op in {DISPATCH, COMBINE} and not r.variant]
    return {
        "version": ep.__version__,
        "machine": host.describe() | {"load_before": load},
        "config": {each.settings.mode: each.settings.to_json() for each in results},
        "limits": {each.settings.mode: each.limits_to_json() for each in results},
        "results": [_entry(r) for r, headline in plain if r.tokens == headline],
        "ladder": [_entry(r) for r, headline in plain if r.tokens != headline],
        "chained": [_entry(r) for r, _ in rows if r.op == CHAINED],
        "variants": [_entry(r) for r, _ in rows if r.variant or r.op == LAYOUT],
        "bounds": [dataclasses.asdict(b) | {"met": b.met} for b in bounds],
        "not_measured": not_measured,
    }


def _entry(row: Row) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    return fields if row.variant else {k: v for k, v in fields.items() if k != "variant"}
