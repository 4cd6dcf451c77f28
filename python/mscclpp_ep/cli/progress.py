# SPDX-License-Identifier: MIT
"""The progress of a measurement, for people."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mscclpp_ep.cli.status import errors


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show, on standard error if it is a terminal, what is measured at the time."""
    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn())
    # Drawn at steps only: a thread that draws all the time would take a core from what is measured.
    with Progress(*columns, console=errors, transient=True, auto_refresh=False) as shown:
        bar = shown.add_task("start", total=steps + 1)

        def on_step(step: str) -> None:
            shown.update(bar, advance=1, description=step, refresh=True)

        yield on_step
