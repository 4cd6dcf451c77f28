# SPDX-License-Identifier: MIT
"""The bench, at a size that takes seconds: that it runs, and that its figures fit together."""

import json
import sys
from pathlib import Path

import pytest

from harness.cli import run

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPT = (sys.executable, str(BENCH / "bench_ht.py"))
# Where torch cannot be imported, whether it is installed or not.
WITHOUT_TORCH = (
    sys.executable,
    "-c",
    f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(BENCH)!r}); "
    "import bench_ht; sys.exit(bench_ht.main())",
)
SMALL = ("--hidden=72", "--experts=10", "--topk=3", "--iters=3", "--refresh=2", "--seed=7")
LIMITS = {
    f"{way}, {kind}" for way in ("memcpy", "streaming stores") for kind in ("private", "shared")
}
EVERY_SIZE = {"layout", "dispatch", "combine, arena input"}
ONE_SIZE = {"combine, ordinary input", "dispatch, no block free", "dispatch, cold", "combine, cold"}

pytestmark = pytest.mark.multirank


def bench(folder, *arguments, program=SCRIPT):
    file = folder / "figures.json"
    done = run(*SMALL, f"--json={file}", *arguments, program=program)
    return done, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("count", [2, 3])
def test_figures_fit_together(tmp_path, count):
    done, figures = bench(tmp_path, f"--ranks={count}", "--tokens=60", "--peers=none")
    assert done.returncode == 0, done.stderr
    assert figures["settings"]["seed"] == 7
    assert figures["settings"]["sizes"] == [30, 60, 120]
    rows = {(row["system"], row["op"], row["tokens"]): row for row in figures["rows"]}
    assert len(rows) == len(figures["rows"])
    assert set(rows) == (
        {("limit", op, size) for op in LIMITS for size in (30, 60, 120)}
        | {("mscclpp_ep", op, size) for op in EVERY_SIZE for size in (30, 60, 120)}
        | {("mscclpp_ep", op, 60) for op in ONE_SIZE}
    )
    for (system, op, size), row in rows.items():
        assert row["calls"] == (2 if op.endswith("cold") else 3)
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p99_ms"]
        assert row["times_gloo"] is None
        if op == "layout":
            assert row["bytes"] is row["gb_per_s"] is row["percent_of_limit"] is None
            continue
        # Between one and all ranks are sent each token.
        assert size * 144 <= row["bytes"] <= count * size * 144
        limit = min(rows["limit", way, size]["median_ms"] for way in LIMITS)
        assert figures["limit_ms"][str(size)] == limit
        assert row["percent_of_limit"] == pytest.approx(100 * limit / row["median_ms"])
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6, rel=1e-3)
        assert system == "mscclpp_ep" or row["percent_of_limit"] <= 100
        assert f"{row['median_ms']:.3f}" in done.stdout
    assert figures["not_measured"] == {"gloo": "not asked for"}


def test_bounds_are_those_of_the_table(tmp_path):
    done, figures = bench(tmp_path, "--tokens=60", "--peers=none", "--require")
    rows = {(row["op"], row["tokens"]): row for row in figures["rows"]}
    time = {key: row["median_ms"] for key, row in rows.items()}
    values = [bound["value"] for bound in figures["bounds"]]
    assert values == [
        None,
        None,
        rows["dispatch", 60]["percent_of_limit"],
        rows["combine, arena input", 60]["percent_of_limit"],
        pytest.approx(time["dispatch, no block free", 60] / time["dispatch", 60]),
        pytest.approx(time["dispatch", 120] / time["dispatch", 30] / 4),
        pytest.approx(time["combine, arena input", 120] / time["combine, arena input", 30] / 4),
    ]
    for bound in figures["bounds"]:
        least, most, value = bound["least"], bound["most"], bound["value"]
        holds = value is not None and (least or 0) <= value <= (most or value)
        assert bound["met"] is holds
    # What was not measured is not met.
    assert done.returncode == 1


def test_a_peer_that_is_not_installed_is_named(tmp_path):
    done, figures = bench(tmp_path, "--tokens=20", program=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert figures["not_measured"] == {"gloo": "torch is not installed"}
    assert "gloo: not measured: torch is not installed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--ranks=1"], "one rank sends nothing"),
        (["--topk=11"], "--topk must be at most --experts, which is 10"),
        (["--flush=-1"], "-1 is not between 0 and 65535"),
        (["--sizes=1,x"], "it must be like 2048,4096,8192"),
        (["--peers=none,nccl"], "known: gloo"),
        (["--tokens=100000000000"], "GB are available"),
    ],
)
def test_wrong_options_are_refused(arguments, answer):
    done = run(*SMALL, *arguments, program=SCRIPT)
    assert done.returncode == 2
    assert answer in done.stderr
    assert not done.stdout
