# SPDX-License-Identifier: MIT
"""The report for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.measure import Measurement
from rich.table import Table

from mscclpp_ep.bench.settings import HT

if TYPE_CHECKING:
    from rich.console import Console

    from mscclpp_ep.bench.bounds import Bound
    from mscclpp_ep.bench.results import Results, Row
    from mscclpp_ep.bench.settings import Settings

_HEADERS = (
    *("system", "op", "tokens", "median µs", "p90", "p99", "min"),
    *("logical GB/s", "wire GB/s", "% of limit"),
)
_TEXT_COLUMNS = 2
_MOST_WIDTH = 1000
_BUSY = 1.0  # programs that ran at that time, on average of a minute
_MODES = {HT: "High throughput (ht)"}


def print_report(console: Console, results: Results) -> None:
    """Prints the figures of a mode."""
    settings = results.settings
    console.print(f"\n[bold]{_MODES.get(settings.mode, 'Low latency (ll)')}[/]: {_sizes(settings)}")
    peers = sorted({peer for row in results.rows for peer in row.times_faster})
    table = Table(*_HEADERS, *(f"x {peer}" for peer in peers), box=box.SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "left" if number < _TEXT_COLUMNS else "right"
    previous: tuple[str, int] | None = None
    for row in sorted(results.rows, key=lambda row: (row.tokens != settings.tokens, row.tokens)):
        if previous is not None and previous != (row.system, row.tokens):
            table.add_section()
        previous = (row.system, row.tokens)
        table.add_row(*_cells(row, peers))
    print_whole(console, table)
    for op in ("dispatch", "combine"):
        limit = results.limit(settings.tokens, op)
        if limit is not None:
            console.print(f"limit of {op}: {_number(limit[1])} µs ({limit[0]})")


def print_whole(console: Console, table: Table) -> None:
    """Prints a table whole, however narrow the terminal is, and if there is none."""
    wide = console.options.update(max_width=_MOST_WIDTH)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def _sizes(settings: Settings) -> str:
    text = (
        f"{settings.ranks} ranks with {settings.threads} thread(s) each, rows of "
        f"{settings.hidden} bfloat16, top-{settings.topk} of {settings.experts} experts, "
        f"seed {settings.seed}"
    )
    if settings.routing is None:
        return text
    used, recorded = len(settings.rounds()), len(settings.routing.steps)
    return f"{text}; {min(used, recorded)} of the {recorded} steps of {settings.routing.path}"


def _cells(row: Row, peers: list[str]) -> tuple[str, ...]:
    times = (row.median_us, row.p90_us, row.p99_us, row.min_us)
    rates = (row.logical_gbps, row.wire_gbps)
    return (
        row.system,
        row.name,
        str(row.tokens),
        *map(_number, times),
        *("" if rate is None else f"{rate:.2f}" for rate in rates),
        "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f}",
        *(f"{row.times_faster[p]:.1f}" if p in row.times_faster else "" for p in peers),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def print_notes(
    console: Console, bounds: list[Bound], not_measured: dict[str, str], load: float
) -> None:
    """Prints the bounds, what is missing, and what may have disturbed the figures."""
    if load > _BUSY:
        console.print(f"The machine was busy when the run began (load {load:.1f}).")
    for name, why in not_measured.items():
        console.print(f"{name}: not measured: {why}", markup=False)
    if bounds:
        console.print("\nBounds:")
    for bound in bounds:
        value = "" if bound.value is None else f"{bound.value:.2f} "
        console.print(f"  {_verdict(bound):12} {bound.name}: {value}({_range(bound)})")


def _range(bound: Bound) -> str:
    parts = []
    if bound.least is not None:
        parts.append(f"at least {bound.least:g}")
    if bound.most is not None:
        parts.append(f"at most {bound.most:g}")
    return ", ".join(parts)


def _verdict(bound: Bound) -> str:
    if bound.value is None:
        return "not measured"
    return "met" if bound.met else "MISSED"
