# SPDX-License-Identifier: MIT
"""The doctor, of healthy machines and of others."""

import copy
import io
import json
import os
import sys

import numpy as np
import pytest
from rich.console import Console

import mscclpp_ep as ep
from harness.cli import run
from mscclpp_ep.cli import doctor, packages
from mscclpp_ep.cli.problems import find_problems

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


def test_doctor_with_more_ranks():
    done = run("doctor", "--json", "--ranks=3")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["ranks"] == 3
    assert report["self_test"]["passed"]
    found = report["machine"]
    assert found["open_files_needed"] > found["open_files"] + 4


HEALTHY = {
    "ranks": 4,
    "built": {"simd": "avx2", "simd_available": "portable, avx2"},
    "not_built": {},
    "machine": {
        "cores": 8,
        "cgroup_cores": None,
        "numa_nodes": {0: 4, 1: 4},
        "numa_balancing": False,
        "memory": 64 << 30,
        "memory_available": 32 << 30,
        "cgroup_memory_limit": None,
        "cgroup_processes_left": None,
        "open_files": 9,
        "open_files_limit": 1024,
        "open_files_needed": 79,
        "address_space_limit": None,
        "locked_memory_limit": 1 << 16,
        "shared_memory_error": None,
    },
    "frameworks": dict.fromkeys(
        ("numpy", "ml_dtypes", "torch", "jax", "jaxlib", "cupy", "mpi4py"), "1.0"
    ),
    "mpi": {"launcher": "/usr/bin/mpirun", "version": "mpirun 5", "library": None},
    "variables": {"MSCCLPP_EP_TOKEN": "(set)"},
    "self_test": {"passed": True, "rows": 7},
    "problems": [],
}


def with_(**sections):
    """The healthy report with other values in some of its sections."""
    changed = copy.deepcopy(HEALTHY)
    for section, values in sections.items():
        changed[section].update(values)
    return changed


def test_a_healthy_machine_has_no_problems():
    assert find_problems(HEALTHY) == []
    unknown = {"memory": None, "memory_available": None, "open_files_limit": None}
    assert find_problems(with_(machine=unknown)) == []


PROBLEMS = [
    (
        {"machine": {"shared_memory_error": "memfd_create: denied"}},
        "memfd_create: denied",
        "seccomp",
    ),
    (
        {"self_test": {"passed": False, "error": "rank 1 died\nof it"}},
        "failed: rank 1 died",
        "output",
    ),
    ({"machine": {"open_files_limit": 70}}, "only 70 files, and 4 ranks need 79", "ulimit -n 4096"),
    ({"machine": {"cgroup_processes_left": 12}}, "only 12 more processes", "pids"),
    ({"machine": {"address_space_limit": 1 << 30}}, "map only 1.1 GB", "ulimit -v"),
    ({"machine": {"memory_available": 1 << 20}}, "only 1.0 MB of memory", "max_arena_bytes"),
    (
        {"machine": {"memory_available": 1 << 20, "cgroup_memory_limit": 1 << 21}},
        "under a limit of 2.1 MB",
        "container",
    ),
    ({"machine": {"cgroup_cores": 1.5}}, "the time of 1.5 cores", "--cpus"),
    ({"machine": {"cores": 2}}, "4 ranks have 2 cores", "fewer ranks"),
    ({"machine": {"numa_balancing": True}}, "between 2 NUMA nodes", "numactl"),
    ({"built": {"simd": "portable"}}, "in use is portable", "MSCCLPP_EP_SIMD"),
    ({"variables": {"MSCCLPP_EP_PROT": "1"}}, "MSCCLPP_EP_PROT is set", "name"),
    ({"mpi": {"launcher": None}}, "no MPI library", "openmpi"),
    ({"frameworks": {"jaxlib": None}}, "without jaxlib", "pip install"),
    ({"frameworks": {"ml_dtypes": None}}, "no bfloat16", "pip install ml_dtypes"),
]


@pytest.mark.parametrize(("sections", "problem", "advice"), PROBLEMS)
def test_every_problem_comes_with_advice(sections, problem, advice):
    report = with_(**sections)
    (entry,) = find_problems(report)
    assert problem in entry["problem"]
    assert advice in entry["advice"]
    report["problems"] = [entry]
    output = io.StringIO()
    doctor.print_report(Console(file=output, width=200), report)
    assert entry["advice"] in output.getvalue()


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_a_machine_under_cgroups_of_version_2(tmp_path):
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 8192 kB\nMemFree: 1 kB\nMemAvailable: 4096 kB\n",
            "proc/self/cgroup": "0::/job/step\n",
            "proc/sys/kernel/numa_balancing": "1\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/memory.max": f"{3 << 20}\n",
            "sys/fs/cgroup/job/memory.current": f"{2 << 20}\n",
            "sys/fs/cgroup/job/step/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/job/cpu.max": "max 100000\n",
            "sys/fs/cgroup/job/pids.max": "100\n",
            "sys/fs/cgroup/job/pids.current": "60\n",
            "sys/devices/system/node/node0/cpulist": "0-4095\n",
            "sys/devices/system/node/node1/cpulist": "5000,5002-5004\n",
        },
    )
    found = doctor.examine_machine(4, tmp_path)
    assert found["memory"] == 8 << 20
    assert found["memory_available"] == 1 << 20
    assert found["cgroup_memory_limit"] == 3 << 20
    assert found["cgroup_cores"] == 1.5
    assert found["cgroup_processes_left"] == 40
    assert found["numa_nodes"] == {0: found["cores"]}
    assert found["numa_balancing"]
    problems = [entry["problem"] for entry in find_problems(with_(machine=found))]
    for part in ("40 more processes", "1.0 MB of memory are available under a limit of 3.1 MB"):
        assert any(part in problem for problem in problems)


def test_a_machine_under_cgroups_of_version_1(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job\n8:pids:/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{5 << 20}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{6 << 20}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/pids/pids.max": "max\n",
        },
    )
    found = doctor.examine_machine(2, tmp_path)
    assert found["memory"] is None
    assert found["memory_available"] == 0
    assert found["cgroup_memory_limit"] == 5 << 20
    assert found["cgroup_cores"] == 0.5
    assert found["cgroup_processes_left"] is None
    assert found["numa_nodes"] == {}


def test_a_machine_that_tells_nothing(tmp_path):
    found = doctor.examine_machine(2, tmp_path)
    assert found["memory"] is found["memory_available"] is found["cgroup_cores"] is None
    assert not any("memory" in p["problem"] for p in find_problems(with_(machine=found)))


def test_mpi_is_found_by_its_launcher(tmp_path, monkeypatch):
    launcher = tmp_path / "mpirun"
    launcher.write_text("#!/bin/sh\necho 'mpirun (Some MPI) 9.1'\necho more\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = packages.mpi()
    assert found["launcher"] == str(launcher)
    assert found["version"] == "mpirun (Some MPI) 9.1"


def test_the_token_is_not_shown():
    found = packages.variables({"MSCCLPP_EP_TOKEN": "secret", "MSCCLPP_EP_SIMD": "avx2", "A": "1"})
    assert found == {"MSCCLPP_EP_SIMD": "avx2", "MSCCLPP_EP_TOKEN": "(set)"}
    assert packages.unknown_variables(found) == []
