# SPDX-License-Identifier: MIT
"""`bench` with MPI as a peer, under a real mpirun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIZES = ("--hidden=72", "--experts=10", "--topk=3", "--iters=3", "--refresh=2", "--tokens=40")
COMMAND = [sys.executable, "-m", "mscclpp_ep", "bench", "--mode=ht", "--flush=1", "--peers=mpi"]
PATIENCE = 120


def bench(folder: Path, *arguments: str, **environment: str) -> tuple[str, dict]:
    """Run it; return what it printed and the figures."""
    file = folder / "figures.json"
    run = subprocess.run(
        [*COMMAND, *SIZES, *arguments, f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpi_is_measured_beside_the_library(tmp_path: Path, ranks: int) -> None:
    _, figures = bench(tmp_path, f"--ranks={ranks}", "--chain=4")
    results = {(row["system"], row["op"]): row for row in figures["results"]}
    assert len(results) == len(figures["results"])
    assert set(results) == {
        (s, op) for s in ("mscclpp_ep", "mpi") for op in ("dispatch", "combine")
    }
    assert {row["system"] for row in figures["chained"]} == {"mscclpp_ep", "mpi"}
    for op in ("dispatch", "combine"):
        ours, mpi = results["mscclpp_ep", op], results["mpi", op]
        assert mpi["calls"] == ours["calls"] == 3
        assert mpi["logical_bytes"] == ours["logical_bytes"]
        assert mpi["wire_bytes"] == ours["wire_bytes"]
        assert ours["times_faster"]["mpi"] == pytest.approx(mpi["median_us"] / ours["median_us"])
    assert figures["not_measured"] == {"gloo": "not asked for"}


def test_recorded_choices_are_measured_with_by_mpi(tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "routing.npz"
    steps = {"rank0/step0": np.array([[0, -1, 9]]), "rank1/step0": np.full((2, 3), -1)}
    np.savez(file, format="mscclpp_ep routing 1", ranks=2, experts=10, **steps)
    _, figures = bench(tmp_path, f"--routing={file}")
    for row in figures["results"]:
        # One token goes to both ranks, whose mean is one.
        assert row["logical_bytes"] == 144
        assert row["wire_bytes"] == 72


def test_an_mpi_that_does_not_work_is_not_measured(tmp_path: Path) -> None:
    broken = tmp_path / "mpi4py"
    broken.mkdir()
    (broken / "__init__.py").touch()
    (broken / "MPI.py").write_text("raise RuntimeError('there is no library')\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    printed, figures = bench(tmp_path, PYTHONPATH=os.pathsep.join(paths))
    why = figures["not_measured"]["mpi"]
    assert why.startswith("mpirun ended with exit status ")
    assert why.endswith("RuntimeError: there is no library")
    assert f"mpi: not measured: {why}" in printed
    assert {row["system"] for row in figures["results"]} == {"mscclpp_ep"}


def _ranks_of_mpi() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"mscclpp_ep.bench.mpi_rank" in path.read_bytes():
                found.add(path.parent.name)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_of_mpi_do_not_outlive_the_command(number: signal.Signals) -> None:
    before = _ranks_of_mpi()
    # The library's own ranks would take as long: this starts those of MPI alone.
    program = (
        "from mscclpp_ep.bench import mpirun; from mscclpp_ep.bench.settings import Settings; "
        "mpirun.run(Settings('ht', 2, 40, (40,), 72, 10, 3, 10**6, 10**6, 1, 1, 1, 0, 7, ('mpi',)),"
        " lambda: print('step', flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"step\n"
        assert len(_ranks_of_mpi() - before) >= 2
        process.send_signal(number)
        process.wait(30)
    deadline = time.monotonic() + 30
    while _ranks_of_mpi() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _ranks_of_mpi() - before
