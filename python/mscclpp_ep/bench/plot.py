# SPDX-License-Identifier: MIT
"""Draws the figures of a run; needs the `plot` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mscclpp_ep.bench.ops import COMBINE, DISPATCH, OURS
from mscclpp_ep.cli import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from mscclpp_ep.bench.results import Results

_OPS = (DISPATCH, COMBINE)
_WIDTH = 0.8  # of the bars of an operation, where operations are 1 apart


def check_plot(path: Path) -> None:
    """Refuses, before anything is measured, what could not be drawn afterwards.

    Raises:
        InputError: matplotlib is not installed, or does not know such files.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise InputError(
            "--plot needs matplotlib, which is not installed. "
            "Install it with: pip install 'mscclpp_ep[plot]'"
        ) from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InputError(
            f"--plot {path}: matplotlib does not write such files; known: {', '.join(known)}"
        )


def draw(results: list[Results], path: Path) -> None:
    """Draws, for each mode, the time of each system, and of each number of tokens.

    Raises:
        OSError: the file cannot be written.
    """
    # Without pyplot: no window, and no state that outlives the figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), each in zip(axes, results, strict=True):
        _draw_systems(left, each)
        _draw_ladder(right, each)
    figure.savefig(path, dpi=150)


def _draw_systems(axes: Any, results: Results) -> None:
    # Times, as systems do not make equally many rows of the same tokens in LL mode.
    settings = results.settings
    rows = [row for row in results.rows if row.tokens == settings.tokens and row.name in _OPS]
    systems = list(dict.fromkeys(row.system for row in rows))
    width = _WIDTH / len(systems)
    for number, system in enumerate(systems):
        times = {row.op: row.median_us for row in rows if row.system == system}
        places = [place + (number + 0.5) * width - _WIDTH / 2 for place in range(len(_OPS))]
        bars = axes.bar(places, [times[op] for op in _OPS], width, label=system)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    for place, op in enumerate(_OPS):
        ours = next(row for row in rows if row.system == OURS and row.op == op)
        if ours.limit_us:
            ends = (place - _WIDTH / 2, place + _WIDTH / 2)
            label = "limit" if place == 0 else None
            axes.plot(
                ends, (ours.limit_us, ours.limit_us), color="black", linestyle="--", label=label
            )
    axes.set_xticks(range(len(_OPS)), _OPS)
    axes.margins(y=0.1)
    axes.set_ylabel("median µs (less is better)")
    axes.set_title(f"{settings.mode}: {settings.ranks} ranks, {settings.tokens} tokens each")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(systems) + 1)


def _draw_ladder(axes: Any, results: Results) -> None:
    for op in _OPS:
        rows = [row for row in results.rows if row.system == OURS and row.name == op]
        rows.sort(key=lambda row: row.tokens)
        tokens = [row.tokens for row in rows]
        (line,) = axes.plot(tokens, [row.median_us for row in rows], marker="o", label=op)
        limits = [row.limit_us for row in rows]
        color = line.get_color()
        axes.plot(tokens, limits, color=color, linestyle="--", label=f"limit of {op}")
    sizes = results.settings.sizes
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("tokens a rank")
    axes.set_ylabel("median µs")
    axes.set_title(f"{results.settings.mode}: {OURS}")
    axes.legend()
