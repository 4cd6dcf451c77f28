# SPDX-License-Identifier: MIT
"""The commands and their options."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import mscclpp_ep as ep
from mscclpp_ep import _paths
from mscclpp_ep.cli import demo as demos
from mscclpp_ep.cli import doctor as doctors
from mscclpp_ep.cli.bench import bench
from mscclpp_ep.cli.moe import Model
from mscclpp_ep.cli.report import print_report
from mscclpp_ep.cli.status import errors, exit_statuses
from mscclpp_ep.cli.text import MOST_TOKENS, read_tokens

app = typer.Typer(
    name="mscclpp_ep",
    help="Expert-parallel dispatch and combine for mixture-of-experts models.",
    epilog="run-as-deep-ep SCRIPT ARGS runs a program written for deep_ep, as its --help tells.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)


def _answer(text: Callable[[], object]) -> Callable[[bool], None]:
    """Return the callback of an option that prints something and ends the program."""

    def callback(given: bool) -> None:
        if given:
            with exit_statuses():
                typer.echo(text())
            raise typer.Exit

    return callback


def _answering_option(name: str, text: Callable[[], object], description: str) -> bool:
    option: bool = typer.Option(name, callback=_answer(text), is_eager=True, help=description)
    return option


@app.callback()
def options(
    version: Annotated[
        bool, _answering_option("--version", lambda: ep.__version__, "Print the version.")
    ] = False,
    cmake_dir: Annotated[
        bool,
        _answering_option(
            "--cmake-dir", _paths.cmake_dir, "Print the folder of the CMake package."
        ),
    ] = False,
    include_dir: Annotated[
        bool,
        _answering_option("--include-dir", _paths.include_dir, "Print the folder of the headers."),
    ] = False,
) -> None:
    """Take the options that are answered before any command."""


@app.command()
def demo(  # noqa: PLR0913, PLR0917 (each parameter is an option)
    ranks: Annotated[int, typer.Option(min=1, max=256, help="Processes to start.")] = 4,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=f"all of the text, at most {MOST_TOKENS}",
            help="How many; a shorter text is repeated.",
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Elements a token.")] = 512,
    ffn: Annotated[int, typer.Option(min=1, help="Elements inside an expert.")] = 1024,
    experts: Annotated[int, typer.Option(min=1, help="Experts in all.")] = 32,
    topk: Annotated[int, typer.Option(min=1, help="Experts a token.")] = 4,
    skew: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="How uneven the load is; 0: even.")
    ] = 0.5,
    repeats: Annotated[int, typer.Option(min=1, help="Times to run the layer.")] = 5,
    text: Annotated[
        Path | None, typer.Option(show_default="one that ships", help="UTF-8 file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Run a mixture-of-experts layer over several processes and check its result."""
    with exit_statuses():
        ids = read_tokens(text, tokens)
        model = Model(int(ids.max()) + 1, hidden, ffn, experts, topk, skew, seed)
        task = demos.Task(model, ids, repeats)
        with _progress(ranks, task.steps) as on_step:
            report = demos.run_demo(task, ranks, on_step)
        if json:
            demos.write_json(report)
        else:
            print_report(Console(highlight=False, soft_wrap=True), report)
    raise typer.Exit(0 if report["check"]["passed"] else 1)


@contextlib.contextmanager
def _progress(ranks: int, steps: int) -> Iterator[Callable[[int, str], None]]:
    """Show, on standard error, what the rank that is furthest behind does."""
    done, latest = [0] * ranks, ["start"] * ranks
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("start", total=ranks * (steps + 1))

        def on_step(rank: int, step: str) -> None:
            done[rank] += 1
            latest[rank] = step
            last = min(range(ranks), key=done.__getitem__)
            finished = sum(done) == ranks * steps
            description = "comparison" if finished else f"rank {last}: {latest[last]}"
            progress.update(bar, completed=sum(done), description=description)

        yield on_step


@app.command()
def doctor(
    ranks: Annotated[
        int, typer.Option(min=2, max=256, help="Processes to test with, and to find room for.")
    ] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what was built, what this machine has, and whether ranks can exchange rows."""
    with exit_statuses():
        report = doctors.examine(ranks)
        if json:
            demos.write_json(report)
        else:
            doctors.print_report(Console(highlight=False, soft_wrap=True), report)
    raise typer.Exit(0 if doctors.passed(report) else 1)
