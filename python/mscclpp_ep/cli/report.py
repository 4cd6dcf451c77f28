# SPDX-License-Identifier: MIT
"""The demo's report for people: tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

_BAR_WIDTH = 40
_MOST_COLUMNS = 16
_MOST_ROWS = 64


def size(count: float) -> str:
    """Return a number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print what moved, the load of each expert, the time of each phase, and the verdict."""
    settings = report["settings"]
    console.print(
        f"{settings['tokens']} tokens of {settings['hidden']} bfloat16 over {settings['ranks']} "
        f"ranks ({', '.join(map(str, report['tokens_per_rank']))}), top-{settings['topk']} of "
        f"{settings['experts']} experts with {settings['ffn']} inner elements"
    )
    _print_rows(console, report)
    _print_load(console, report)
    _print_times(console, report)
    _print_check(console, report["check"])


def _print_rows(console: Console, report: dict[str, Any]) -> None:
    rows = report["rows"]
    total = sum(map(sum, rows))
    console.print(
        f"\n[bold]What moved[/]: {report['routes']} routes in {total} rows of "
        f"{size(report['row_bytes'])}; dispatch {size(report['bytes_each_way'])}, of which "
        f"{size(report['bytes_each_way_between_ranks'])} between ranks; combine the same, back"
    )
    if len(rows) > _MOST_COLUMNS:
        console.print(f"(rows of each pair: --json; too many columns for {len(rows)} ranks)")
        return
    table = Table("rows", *(f"to {rank}" for rank in range(len(rows))), "sent", "bytes sent")
    for column in table.columns:
        column.justify = "right"
    for rank, row in enumerate(rows):
        sent = sum(row)
        table.add_row(f"from {rank}", *map(str, row), str(sent), size(sent * report["row_bytes"]))
    received = [sum(column) for column in zip(*rows, strict=True)]
    table.add_section()
    table.add_row("received", *map(str, received), str(total), size(report["bytes_each_way"]))
    console.print(table)


def _print_load(console: Console, report: dict[str, Any]) -> None:
    load, ranks = report["load"], report["settings"]["ranks"]
    block = -(-len(load) // ranks)
    mean, most = sum(load) / len(load), max(load)
    table = Table("expert", "rank", "routes", "")
    busiest = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))[:_MOST_ROWS]
    for expert in sorted(busiest):
        bar = "█" * round(_BAR_WIDTH * load[expert] / most)
        table.add_row(str(expert), str(expert // block), str(load[expert]), bar)
    for column in table.columns[:3]:
        column.justify = "right"
    console.print(
        f"\n[bold]Load of the experts[/]: mean {mean:.1f} routes, the busiest {most / mean:.1f} x"
        + (f"; the {_MOST_ROWS} busiest of {len(load)}" if len(load) > _MOST_ROWS else "")
    )
    console.print(table)


def _print_times(console: Console, report: dict[str, Any]) -> None:
    repeats = report["settings"]["repeats"]
    table = Table("phase", "slowest rank", "fastest rank")
    for phase, seconds in report["seconds"].items():
        table.add_row(phase, *(f"{seconds[key] * 1e3:.2f} ms" for key in ("max", "min")))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(f"\n[bold]Time of each phase[/]: median of {repeats}")
    console.print(table)


def _print_check(console: Console, check: dict[str, Any]) -> None:
    share, largest = check["largest_share_of_bound"], check["largest_difference"]
    console.print(
        f"\n[bold]Compared with one process[/]: {check['elements']} elements, allowed "
        f"difference {check['bound']}"
    )
    if share is not None:
        console.print(f"largest difference {largest:.3g}; at most {share:.0%} of what is allowed")
    for key, text in (("weights_equal", "top-k weights"), ("load_equal", "load of the experts")):
        console.print(f"{text}: {'equal' if check[key] else '[bold red]different[/]'}")
    if check["passed"]:
        console.print("[bold green]passed[/]")
    else:
        console.print(f"[bold red]failed[/]: {check['beyond_bound']} elements beyond the bound")
