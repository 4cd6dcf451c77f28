# SPDX-License-Identifier: MIT
"""The command line, run as a user runs it: exit status, what it prints, what it leaves behind."""

import itertools
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import mscclpp_ep as ep
from harness.cli import SMALL, run
from mscclpp_ep.cli import moe
from mscclpp_ep.cli.text import read_tokens

pytestmark = pytest.mark.multirank


def demo_json(*arguments):
    done = run("demo", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected_rows(report, text=None):
    """The rows of each pair of ranks, from the model alone."""
    settings = report["settings"]
    ranks = settings["ranks"]
    tokens = read_tokens(text, settings["tokens"])
    model = moe.Model(**{key: settings[key] for key in moe.Model.__dataclass_fields__})
    topk_idx, _ = moe.route(model, moe.embed(model, tokens))
    cuts = moe.shares(len(tokens), ranks)
    held = [moe.experts_of(rank, ranks, model.experts) for rank in range(ranks)]
    rows = [
        [int(np.isin(topk_idx[start:end], held[to]).any(axis=1).sum()) for to in range(ranks)]
        for start, end in itertools.pairwise(cuts)
    ]
    return rows, np.bincount(topk_idx.ravel(), minlength=model.experts).tolist()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_demo_moves_what_the_router_says(size):
    report = demo_json(f"--ranks={size}", *SMALL)
    rows, load = expected_rows(report)
    assert report["rows"] == rows
    assert report["load"] == load
    assert report["routes"] == sum(load) == 301 * 3
    assert report["tokens_per_rank"] == np.diff(moe.shares(301, size)).tolist()
    between = sum(map(sum, rows)) - sum(rows[rank][rank] for rank in range(size))
    assert report["row_bytes"] == 64 * 2
    assert report["bytes_each_way"] == 128 * sum(map(sum, rows))
    assert report["bytes_each_way_between_ranks"] == 128 * between
    assert set(report["seconds"]) == {"router", "layout", "dispatch", "experts", "combine"}
    assert all(0 < phase["min"] <= phase["max"] < 60 for phase in report["seconds"].values())
    check = report["check"]
    assert check["passed"] is check["weights_equal"] is check["load_equal"] is True
    assert check["beyond_bound"] == 0
    assert check["elements"] == 301 * 64
    assert 0 < check["largest_share_of_bound"] <= 1


def test_demo_repeats_itself_for_the_same_seed_only():
    first, again, other = (demo_json(*SMALL, f"--seed={seed}") for seed in (5, 5, 6))
    assert first["rows"] == again["rows"]
    assert first["check"] == again["check"]
    assert first["load"] != other["load"]


def test_demo_prints_tables_and_its_bound():
    done = run("demo", "--repeats=1", "--ranks=2", "--ffn=64")
    assert done.returncode == 0, done.stderr
    for text in ("to 1", "from 1", "received", "█", "routes", "combine", " ms", moe.BOUND_TEXT):
        assert text in done.stdout
    assert done.stdout.splitlines()[-1] == "passed"


@pytest.mark.parametrize("words", ["alone", "two words", "\ufeffGrüße, 世界 🙂"])
def test_demo_of_a_tiny_text(tmp_path, words):
    text = tmp_path / "tiny.txt"
    text.write_text(words, encoding="utf-8")
    report = demo_json("--text", text, "--hidden=16", "--ffn=8", "--repeats=1")
    assert report["settings"]["tokens"] == len(read_tokens(text))
    assert report["rows"] == expected_rows(report, text)[0]
    assert 0 in report["tokens_per_rank"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "{tmp}/empty"], "empty holds no words"),
        (["--text", "{tmp}/latin1"], "latin1 is not UTF-8 text: byte 0xe9 at position 3"),
        (["--text", "{tmp}/missing"], "missing: No such file or directory"),
        (["--text", "{tmp}"], "Is a directory"),
        (["--ranks", "0"], "--ranks"),
        (["--tokens", "-3"], "--tokens"),
        (["--hidden", "many"], "--hidden"),
        (["--seed", "-1"], "--seed"),
        (["--topk", "9", "--experts", "8"], "--topk 9 is more than --experts 8"),
        (["--hidden", "1000000", "--ffn", "1000000"], "GB of memory"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_demo_refuses_what_it_cannot_use(tmp_path, arguments, message):
    (tmp_path / "empty").touch()
    (tmp_path / "latin1").write_bytes(b"abc\xe9")
    done = run("demo", "--json", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


CORRUPTED = """
import sys
from mscclpp_ep.cli import demo
from mscclpp_ep.cli.app import app

run_ranks = demo.run_ranks

def run_and_corrupt(*arguments, **options):
    results = run_ranks(*arguments, **options)
    {corruption}
    return results

if __name__ == "__main__":
    demo.run_ranks = run_and_corrupt
    app()
"""


@pytest.mark.parametrize(
    ("corruption", "field", "value"),
    [
        ("results[1].output[0, :] += 4", "beyond_bound", 64),
        ("results[2].output[3, 5] = float('nan')", "beyond_bound", 1),
        ("results[0].topk_weights[0, 0] += 1e-6", "weights_equal", False),
        ("results[0].load[0] += 1", "load_equal", False),
    ],
)
def test_demo_fails_if_a_result_is_wrong(tmp_path, corruption, field, value):
    script = tmp_path / "corrupted.py"
    script.write_text(CORRUPTED.format(corruption=corruption))
    done = run("demo", "--json", "--ranks=3", *SMALL, program=(sys.executable, str(script)))
    assert done.returncode == 1, done.stderr
    check = json.loads(done.stdout)["check"]
    assert check["passed"] is False
    assert check[field] == value


@pytest.fixture
def without(tmp_path):
    """Environment in which a package cannot be imported, as if it were not installed."""

    def hide(name):
        text = f'raise ModuleNotFoundError("No module named {name}", name="{name}")'
        (tmp_path / f"{name}.py").write_text(text)
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths)}

    return hide


def test_what_build_scripts_ask_needs_no_extra(without):
    environment = without("typer")
    version = run("--version", **environment)
    assert version.stdout == f"{metadata.version('mscclpp_ep')}\n" == f"{ep.__version__}\n"
    cmake_dir = run("--cmake-dir", **environment).stdout.removesuffix("\n")
    assert (Path(cmake_dir) / "mscclpp_ep-config.cmake").is_file()
    include_dir = run("--include-dir", **environment).stdout.removesuffix("\n")
    assert (Path(include_dir) / "mscclpp_ep" / "buffer.hpp").is_file()
    for arguments in (["demo"], ["doctor"], ["--help"], []):
        done = run(*arguments, **environment)
        assert done.returncode == 2
        assert "needs typer" in done.stderr
        assert "pip install 'mscclpp_ep[cli]'" in done.stderr
        assert "Traceback" not in done.stderr


def test_help_names_everything():
    done = run("--help")
    assert done.returncode == 0
    for word in ("--version", "--cmake-dir", "--include-dir", "bench", "demo", "doctor"):
        assert word in done.stdout
