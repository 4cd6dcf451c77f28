# SPDX-License-Identifier: MIT
"""`bench` with gloo as a peer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [sys.executable, "-m", "mscclpp_ep", "bench", "--mode=ht", "--flush=1", "--peers=gloo"]
SIZES = ["--hidden=72", "--iters=3", "--refresh=2", "--tokens=40", "--chain=4"]


def bench(folder: Path, *arguments: str) -> dict:
    """Run it; return the figures."""
    file = folder / "figures.json"
    run = subprocess.run(
        [*COMMAND, *SIZES, *arguments, f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_is_measured_beside_the_library(tmp_path: Path, ranks: int) -> None:
    figures = bench(tmp_path, f"--ranks={ranks}", "--experts=10", "--topk=3")
    results = {(row["system"], row["op"]): row for row in figures["results"]}
    assert len(results) == len(figures["results"]) == 4
    assert {row["system"] for row in figures["chained"]} == {"mscclpp_ep", "gloo"}
    for op in ("dispatch", "combine"):
        ours, gloo = results["mscclpp_ep", op], results["gloo", op]
        assert gloo["calls"] == ours["calls"] == 3
        assert gloo["logical_bytes"] == ours["logical_bytes"]
        assert gloo["wire_bytes"] == ours["wire_bytes"]
        assert ours["times_faster"]["gloo"] == pytest.approx(gloo["median_us"] / ours["median_us"])
    values = [bound["value"] for bound in figures["bounds"][:2]]
    assert values == [
        results["mscclpp_ep", op]["times_faster"]["gloo"] for op in ("dispatch", "combine")
    ]


def test_recorded_choices_are_measured_with_by_gloo(tmp_path: Path) -> None:
    file = tmp_path / "routing.npz"
    steps = {"rank0/step0": np.array([[0, -1, 9]]), "rank1/step0": np.full((2, 3), -1)}
    np.savez(file, format="mscclpp_ep routing 1", ranks=2, experts=10, **steps)
    for row in bench(tmp_path, f"--routing={file}")["results"]:
        # One token goes to both ranks, whose mean is one.
        assert row["logical_bytes"] == 144
        assert row["wire_bytes"] == 72
