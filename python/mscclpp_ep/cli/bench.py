# SPDX-License-Identifier: MIT
"""The options of `bench`, and what it prints and writes."""

import enum
import json as json_format
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import mscclpp_ep as ep
from mscclpp_ep.bench import report, runs
from mscclpp_ep.bench.bounds import bounds_of
from mscclpp_ep.bench.checks import WrongResultError
from mscclpp_ep.bench.gpu_peers import GPU_PEERS
from mscclpp_ep.bench.gpu_settings import DEFAULT_SMS
from mscclpp_ep.bench.peers import PEERS, not_measurable
from mscclpp_ep.bench.plan import Options, plan
from mscclpp_ep.bench.plot import check_plot, draw
from mscclpp_ep.bench.results import to_json
from mscclpp_ep.bench.routing import read_routing
from mscclpp_ep.bench.settings import HT, LL, MODES, Settings
from mscclpp_ep.cli import InputError
from mscclpp_ep.cli.bench_gpu import run_on_gpus
from mscclpp_ep.cli.progress import progress
from mscclpp_ep.cli.status import exit_statuses, fail

_SIZES = "Sizes"
_METHOD = "Method"
_OUTPUT = "Output"


class Device(str, enum.Enum):
    """What to measure on."""

    cpu = "cpu"
    cuda = "cuda"


class Mode(str, enum.Enum):
    """Which modes to measure."""

    ht = HT
    ll = LL
    both = "both"


def bench(  # noqa: PLR0913, PLR0917 (each parameter is an option)
    device: Annotated[
        Device,
        typer.Option(
            help="What ranks are on; cuda needs torch. Rank r is on GPU r modulo their number.",
            rich_help_panel=_SIZES,
        ),
    ] = Device.cpu,
    mode: Annotated[
        Mode, typer.Option(help="ht: high throughput, ll: low latency.", rich_help_panel=_SIZES)
    ] = Mode.both,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            show_default="2, or as recorded; GPUs, if there are more",
            help="Processes to start.",
            rich_help_panel=_SIZES,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Of each rank, in ht mode.", rich_help_panel=_SIZES)
    ] = 4096,
    sizes: Annotated[
        str,
        typer.Option(
            show_default="half and twice --tokens",
            help="More numbers of tokens to measure, with commas between.",
            rich_help_panel=_SIZES,
        ),
    ] = "",
    ll_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of each rank, in ll mode, where it is also the most that a rank may send.",
            rich_help_panel=_SIZES,
        ),
    ] = 128,
    ll_sizes: Annotated[
        str,
        typer.Option(
            show_default="a sixteenth and a quarter of --ll-tokens",
            help="More numbers of tokens to measure in ll mode.",
            rich_help_panel=_SIZES,
        ),
    ] = "",
    hidden: Annotated[
        int, typer.Option(min=1, help="Elements a token.", rich_help_panel=_SIZES)
    ] = 7168,
    experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="256, or as recorded",
            help="Experts in all.",
            rich_help_panel=_SIZES,
        ),
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="8, or as recorded", help="Experts a token.", rich_help_panel=_SIZES
        ),
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            show_default="random choices",
            help="Choices that mscclpp_ep.record_routing wrote; --tokens and --sizes are not used.",
            rich_help_panel=_SIZES,
        ),
    ] = None,
    sms: Annotated[
        str | None,
        typer.Option(
            show_default=DEFAULT_SMS,
            help="Multiprocessors that a call may use on a GPU, with commas between.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            show_default=f"{','.join(PEERS)}; on GPUs {','.join(GPU_PEERS)}",
            help='Other systems to measure, with commas between, or "none".',
            rich_help_panel=_METHOD,
        ),
    ] = None,
    iters: Annotated[
        int, typer.Option(min=1, help="Timed calls of each.", rich_help_panel=_METHOD)
    ] = 20,
    refresh: Annotated[
        int, typer.Option(min=1, help="Calls with the same inputs.", rich_help_panel=_METHOD)
    ] = 5,
    warmup: Annotated[
        int,
        typer.Option(
            min=1, help="Untimed calls each time that inputs change.", rich_help_panel=_METHOD
        ),
    ] = 2,
    chain: Annotated[
        int,
        typer.Option(
            min=0,
            help="Dispatch and combine in a row, to time their period; 0: not.",
            rich_help_panel=_METHOD,
        ),
    ] = 16,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="cores over ranks",
            help="That a rank moves data with.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    flush: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            metavar="MB",
            help="Other memory that is read before each timed call; on GPUs it is written, and is "
            "twice the second-level cache at least.",
            rich_help_panel=_METHOD,
        ),
    ] = 64,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, show_default="a fresh one", help="Of all inputs.", rich_help_panel=_METHOD
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the figures here.", rich_help_panel=_OUTPUT),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Also draw them here; needs the plot extra.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    require: Annotated[
        bool,
        typer.Option(
            "--require",
            help="Exit with 1 if a bound of the ht mode is missed or was not measured.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
) -> None:
    """Measure dispatch and combine, what the machine allows, and peers, in one run.

    All that is measured is compared with what the definition says, outside the time. Run it on an
    idle machine: ranks are processes that need a core each.
    """
    with exit_statuses():
        on_gpus = device is Device.cuda
        if on_gpus and (require or plot is not None):
            raise InputError("--require and --plot are of the CPU: leave out --device cuda")
        if not on_gpus and sms is not None:
            raise InputError("--sms is of GPUs: add --device cuda")
        if require and mode is Mode.ll:
            raise InputError("--require needs the ht mode: there are no bounds of the ll mode")
        for path in (json, plot):
            _check_output(path)
        if plot is not None:
            check_plot(plot)
        recorded = None if routing is None else read_routing(routing)
        options = Options(
            ranks=ranks,
            tokens=tokens,
            sizes=sizes,
            ll_tokens=ll_tokens,
            ll_sizes=ll_sizes,
            hidden=hidden,
            experts=experts,
            topk=topk,
            iters=iters,
            refresh=refresh,
            warmup=warmup,
            chain=chain,
            threads=threads,
            flush=flush,
            seed=seed,
            peers=peers,
            routing=recorded,
        )
        if on_gpus:
            met = run_on_gpus(options, mode.value, DEFAULT_SMS if sms is None else sms, json)
            raise typer.Exit(0 if met else 1)
        met = _run(options, mode, json, plot)
    raise typer.Exit(1 if require and not met else 0)


def _run(options: Options, mode: Mode, json: Path | None, plot: Path | None) -> bool:
    """Measure, print and write; return whether all bounds are met."""
    load = os.getloadavg()[0]
    planned, not_measured = _plan(options, mode)
    results = []
    with progress(sum(map(runs.steps_of, planned))) as on_step:
        for settings in planned:
            try:
                each, failed = runs.measure(settings, on_step)
            except WrongResultError as error:
                fail(str(error), 1)
            results.append(each)
            not_measured |= failed
    bounds = [bound for each in results if each.settings.mode == HT for bound in bounds_of(each)]
    console = Console(highlight=False, soft_wrap=True)
    for each in results:
        report.print_report(console, each)
    report.print_notes(console, bounds, not_measured, load)
    if json is not None:
        figures = to_json(results, bounds, not_measured, load)
        json.write_text(json_format.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(results, plot)
    return all(bound.met for bound in bounds)


def _plan(options: Options, mode: Mode) -> tuple[list[Settings], dict[str, str]]:
    """What is measured, and why the rest is not.

    Raises:
        InputError: the input cannot be used.
        mscclpp_ep.NotBuilt: the only mode asked for is not in this build.
    """
    planned, not_measured = [], {}
    for each in MODES if mode is Mode.both else (mode.value,):
        try:
            settings = plan(options, each)
            if (reason := runs.why_not(settings)) is not None:
                raise ep.NotBuilt(reason)
        except (InputError, ep.NotBuilt) as error:
            # The HT mode is there on every machine, so that nothing would be left without it.
            if mode is not Mode.both or each == HT:
                raise
            not_measured[f"{each} mode"] = str(error)
            continue
        planned.append(settings)
    missing = not_measurable(planned[0].peers)
    return [each.without_peers(set(missing)) for each in planned], not_measured | missing


def _check_output(path: Path | None) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission")
