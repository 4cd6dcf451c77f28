# SPDX-License-Identifier: MIT
"""The doctor, of healthy machines and of others."""

import json
import os
import sys

import numpy as np
import pytest

import mscclpp_ep as ep
from harness.cli import run
from mscclpp_ep.cli import doctor

pytestmark = pytest.mark.multirank


def test_doctor_finds_a_machine_that_works():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["built"] == ep.build_info()
    assert report["self_test"] == {"passed": True, "rows": report["self_test"]["rows"]}
    assert report["self_test"]["rows"] > 100
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert report["machine"]["shared_memory_error"] is None
    assert report["frameworks"]["numpy"] == np.__version__
    text = run("doctor")
    assert text.returncode == 0
    assert ep.build_info()["compiler"] in text.stdout
    assert "passed" in text.stdout


def test_doctor_imports_no_framework(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run("doctor", PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, done.stderr


def test_doctor_fails_if_its_test_does(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "from mscclpp_ep.cli import doctor\n"
        "from mscclpp_ep.cli.app import app\n"
        "def exchange(rank, _):\n"
        "    raise RuntimeError('rows were lost')\n"
        "if __name__ == '__main__':\n"
        "    doctor.exchange = exchange\n"
        "    app()\n"
    )
    done = run("doctor", program=(sys.executable, str(script)))
    assert done.returncode == 1
    assert "the self-test failed: rank" in done.stdout
    assert "rows were lost" in done.stdout
    assert "what to do:" in done.stdout


def test_every_problem_comes_with_advice():
    report = {
        "self_test": {"passed": False, "error": "rank 1 died\n"},
        "machine": {
            "shared_memory_error": "memfd_create: denied",
            "memory_available": 1 << 20,
            "open_files_limit": 64,
        },
    }
    problems = doctor.find_problems(report)
    text = " ".join(entry["problem"] for entry in problems)
    for part in ("memfd_create: denied", "rank 1 died", "1.0 MB", "64 files"):
        assert part in text
    assert all(entry["advice"] for entry in problems)
    healthy = {
        "self_test": {"passed": True},
        "machine": {
            "shared_memory_error": None,
            "memory_available": None,
            "open_files_limit": None,
        },
    }
    assert doctor.find_problems(healthy) == []
