# SPDX-License-Identifier: MIT
"""The report for people; with rich on a wide terminal, if it is there, else as plain text."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from results import Bound, Results, Row

HEADERS = ("system", "op", "tokens", "median ms", "p99 ms", "GB/s", "% of limit", "x gloo")
_TEXT_COLUMNS = 2
_RICH_WIDTH = 100  # below that, the table would break words
_BUSY = 1.0  # programs that ran at that time, on average of a minute


def print_report(results: Results) -> None:
    """Prints the table, the bounds, and what is missing."""
    settings = results.settings
    print(
        f"{settings.ranks} ranks with {settings.threads} thread(s) each, rows of {settings.hidden} "
        f"bfloat16, top-{settings.topk} of {settings.experts} experts, seed {settings.seed}"
    )
    lines = [_cells(row) for row in results.rows]
    wide = sys.stdout.isatty() and shutil.get_terminal_size().columns >= _RICH_WIDTH
    if wide and importlib.util.find_spec("rich") is not None:
        _print_rich(lines)
    else:
        _print_plain(lines)
    if results.load > _BUSY:
        print(f"The machine was busy when the run began (load {results.load:.1f}).")
    for peer, why in results.not_measured.items():
        print(f"{peer}: not measured: {why}")
    print("\nBounds:")
    for bound in results.bounds:
        print(f"  {_verdict(bound):12} {bound.name}: {_number(bound.value)} ({_range(bound)})")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.system,
        row.op,
        str(row.tokens),
        f"{row.median_ms:.3f}",
        f"{row.p99_ms:.3f}",
        _number(row.gb_per_s),
        "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f}",
        "" if row.times_gloo is None else f"{row.times_gloo:.1f}",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


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


def _print_rich(lines: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADERS)
    for column in table.columns[_TEXT_COLUMNS:]:
        column.justify = "right"
    for previous, line in zip([None, *lines], lines, strict=False):
        if previous is not None and (previous[0], previous[2]) != (line[0], line[2]):
            table.add_section()
        table.add_row(*line)
    Console().print(table)


def _print_plain(lines: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(HEADERS, *lines, strict=True)]
    for line in (HEADERS, *lines):
        cells = [
            cell.ljust(width) if number < _TEXT_COLUMNS else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
