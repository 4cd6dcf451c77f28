# SPDX-License-Identifier: MIT
"""The report for people of a run on GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from mscclpp_ep.bench.gpu_results import EVENTS, HOST, KERNEL, WAYS
from mscclpp_ep.bench.ops import CHAINED, START
from mscclpp_ep.bench.report import print_whole

if TYPE_CHECKING:
    from rich.console import Console

    from mscclpp_ep.bench.gpu_results import Figure, GpuResults, GpuRow

_TEXT_COLUMNS = 2
_MEANINGS = {
    KERNEL: "kernels and copies of a call, by the profiler",
    EVENTS: "from before to after it on its stream",
    HOST: "as the host sees it",
}


def print_gpu_report(console: Console, results: GpuResults) -> None:
    """Prints the figures."""
    base = results.settings.base
    names = dict.fromkeys(device["name"] for device in results.devices)
    console.print(
        f"\n[bold]High throughput (ht)[/]: {base.ranks} ranks on {results.settings.gpus} GPU(s) "
        f"({', '.join(names)}), {base.tokens} tokens each of {base.hidden} elements, "
        f"top-{base.topk} of {base.experts} experts, seed {base.seed}"
    )
    if not results.settings.linked:
        console.print(
            "Ranks share GPUs: they take turns, and there is no link between them in the figures."
        )
    console.print(
        f"Times in µs, of the slowest rank: {_explained()}. Rates are of the first of them, in a "
        "chain of events."
    )
    print_whole(console, _table(results))
    _print_floor(console, results)


def _explained() -> str:
    return "; ".join(f"{way}: {meaning}" for way, meaning in _MEANINGS.items())


def _table(results: GpuResults) -> Table:
    peers = sorted({peer for row in results.rows for peer in row.times_faster})
    times = [f"{way} {what}" for way in WAYS for what in ("p50", "p95", "% of floor")]
    table = Table("system", "op", "SMs", *times, "logical GB/s", f"{results.floor_kind} GB/s")
    for peer in peers:
        table.add_column(f"x {peer}")
    table.box = box.SIMPLE_HEAD
    for number, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "left" if number < _TEXT_COLUMNS else "right"
    previous: tuple[str, str] | None = None
    for row in _sorted(results.rows):
        if previous is not None and previous != (row.system, row.name):
            table.add_section()
        previous = (row.system, row.name)
        table.add_row(*_cells(row, peers))
    return table


def _sorted(rows: list[GpuRow]) -> list[GpuRow]:
    """By operation, as they were measured, and number of multiprocessors."""
    places = {
        key: place for place, key in enumerate(dict.fromkeys((r.system, r.name) for r in rows))
    }
    return sorted(rows, key=lambda row: (places[row.system, row.name], row.sms or 0))


def _cells(row: GpuRow, peers: list[str]) -> tuple[str, ...]:
    # What a chain moves in a second depends on what is between its kernels too.
    ways = (EVENTS, HOST) if row.op == CHAINED else WAYS
    first = next((row.figures[way] for way in ways if way in row.figures), None)
    rates = ("", "") if first is None else (f"{first.logical_gbps:.1f}", f"{first.link_gbps:.1f}")
    return (
        row.system,
        row.name,
        "" if row.sms is None else str(row.sms),
        *(cell for way in WAYS for cell in _times(row.figures.get(way))),
        *rates,
        *(f"{row.times_faster[p]:.2f}" if p in row.times_faster else "" for p in peers),
    )


def _times(figure: Figure | None) -> tuple[str, str, str]:
    if figure is None:
        return "", "", ""
    share = figure.percent_of_floor
    return f"{figure.p50_us:.1f}", f"{figure.p95_us:.1f}", "" if share is None else f"{share:.0f}"


def _print_floor(console: Console, results: GpuResults) -> None:
    if results.best is None:
        return
    sms, best = results.best
    tried = ", ".join(f"{s} SMs: {each / 1e9:.1f}" for s, each in results.bandwidths.items())
    console.print(
        f"Floor: the bytes that cross, at {best / 1e9:.1f} GB/s ({results.floor_kind}, every rank "
        f"pushing to the next at once, {sms} SMs). Measured in GB/s: {tried}"
    )


def print_gpu_notes(console: Console, results: GpuResults, reasons: dict[str, str]) -> None:
    """Prints what is missing, and the errors of what failed."""
    for name, why in reasons.items():
        console.print(f"{name}: not measured: {why}", markup=False)
    for failure in results.failures:
        where = "" if failure.sms == 0 else f" with {failure.sms} SMs"
        what = "" if failure.op in {START, failure.system} else f": {failure.op}"
        console.print("[bold red]FAILED[/] ", end="")
        console.print(
            f"{failure.system}{what}{where}, on rank {failure.rank}:\n{failure.details.rstrip()}",
            markup=False,
        )
