# SPDX-License-Identifier: MIT
"""`bench --device cuda` and `doctor`, at sizes that take seconds, with two ranks on the GPUs."""

import json
import os
import subprocess
import sys

import pytest

SIZES = {
    **{"ranks": 2, "tokens": 96, "hidden": 256, "experts": 10, "topk": 3, "iters": 3},
    **{"refresh": 2, "warmup": 1, "chain": 4, "seed": 7, "sms": "4,8", "peers": "none"},
}
PLAIN = {("dispatch", 4), ("dispatch", 8), ("combine", 4), ("combine", 8)}
VARIANTS = {
    *(("dispatch", "cached"), ("dispatch", "worst-case rows"), ("dispatch", "no block free")),
    *(("dispatch", "FP8"), ("dispatch", "FP8, cached")),
    *(("combine", "ordinary input"), ("combine", "with weights")),
}
CHAINS = {None, "cached", "CUDA graph"}


def run(*arguments):
    """Runs to the end; standard output and error as text."""
    return subprocess.run(
        [sys.executable, "-m", "mscclpp_ep", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"COLUMNS": "300"},
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What it printed, and its figures."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    options = [f"--{name}={value}" for name, value in SIZES.items()]
    done = run("bench", "--device=cuda", *options, f"--json={file}")
    assert file.exists(), done.stdout + done.stderr
    return done, json.loads(file.read_text(encoding="utf-8"))


def test_everything_is_measured(bench):
    done, figures = bench
    assert figures["failed"] == [], done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert {(row["op"], row["sms"]) for row in figures["results"]} == PLAIN
    assert {(row["op"], row["variant"]) for row in figures["variants"]} == VARIANTS
    assert {row["variant"] for row in figures["chained"]} == CHAINS


def test_figures_fit_together(bench):
    done, figures = bench
    assert "times of kernels" not in figures["not_measured"], figures["not_measured"]
    for row in (*figures["results"], *figures["variants"], *figures["chained"]):
        assert row["floor_us"] > 0
        assert 0 < row["link_bytes"] < row["logical_bytes"]
        for way in ("kernel", "events", "host"):
            figure = row[way]
            assert figure["calls"] == 3
            assert 0 < figure["min_us"] <= figure["p50_us"] <= figure["p95_us"]
            share = 100 * row["floor_us"] / figure["p50_us"]
            assert figure["percent_of_floor"] == pytest.approx(share)
        assert sum(row["activities"].values()) > 0
        assert f"{row['events']['p50_us']:.1f}" in done.stdout


def test_doctor_tests_the_gpus():
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["gpus"]["error"] is None
    assert report["gpus"]["devices"]
    assert report["gpu_self_test"] == {"passed": True, "rows": report["self_test"]["rows"]}
    text = run("doctor").stdout
    assert "Self-test on GPUs" in text
    assert report["gpus"]["devices"][0]["name"] in text
