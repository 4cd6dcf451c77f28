# SPDX-License-Identifier: MIT
"""`bench` on GPUs: what it runs, prints and writes."""

import json as json_format
import os
from pathlib import Path

from rich.console import Console

from mscclpp_ep.bench import gpu_report
from mscclpp_ep.bench.gpu_results import GpuResults, gpu_to_json, not_measured
from mscclpp_ep.bench.gpu_settings import plan_gpu, require_gpus
from mscclpp_ep.bench.gpu_worker import run_rank
from mscclpp_ep.bench.plan import Options
from mscclpp_ep.cli.launch import run_ranks
from mscclpp_ep.cli.progress import progress


def run_on_gpus(options: Options, mode: str, sms: str, json: Path | None) -> bool:
    """Measure, print and write; return whether all of the library was measured and right.

    Raises:
        InputError: the input cannot be used, or there is no GPU that can.
        RankError: a rank failed.
    """
    load = os.getloadavg()[0]
    settings, left_out = plan_gpu(options, mode, sms, require_gpus())
    with progress(settings.steps()) as on_step:

        def step(rank: int, text: str) -> None:
            if rank == 0:
                on_step(text)

        measured = run_ranks(run_rank, settings, settings.base.ranks, on_step=step)
    results = GpuResults(settings, measured)
    console = Console(highlight=False, soft_wrap=True)
    gpu_report.print_gpu_report(console, results)
    gpu_report.print_gpu_notes(console, results, not_measured(results, left_out))
    if json is not None:
        figures = gpu_to_json(results, left_out, load)
        json.write_text(json_format.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return results.passed
