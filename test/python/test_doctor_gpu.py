# SPDX-License-Identifier: MIT
"""What the doctor says of GPUs, of which there need be none."""

import copy
import io
import json
import types

import numpy as np
import pytest
from rich.console import Console

from mscclpp_ep import _core
from mscclpp_ep.cli import doctor, gpu_memory, gpus
from mscclpp_ep.cli.launch import Rank


def device(**changes):
    healthy = {
        **{
            "name": "A GPU",
            "total_bytes": 80 << 30,
            "free_bytes": 79 << 30,
            "multiprocessors": 132,
        },
        **{"capability": (9, 0), "posix_handles": True, "peers": [True, True]},
    }
    return healthy | changes


HEALTHY = {
    "ranks": 2,
    "gpus": {
        **{"built": True, "seen_by_system": 2, "runtime": 13000, "driver": 13010, "error": None},
        **{"driver_release": "580.95.05", "topology": "GPU0 [X] NV18", "nccl": "2.27.3"},
        **{"devices": [device(), device()], "torch_built_for": "13.0"},
        "variables": dict.fromkeys(
            ("MSCCLPP_EP_DEVICE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS")
        ),
    },
    "gpu_self_test": {"passed": True, "rows": 7},
}


def with_(ranks=2, test=None, variables=None, **changes):
    report = copy.deepcopy(HEALTHY)
    report["ranks"] = ranks
    report["gpus"].update(changes)
    report["gpus"]["variables"].update(variables or {})
    report["gpu_self_test"] = report["gpu_self_test"] if test is None else test
    return report


def test_healthy_gpus_have_no_problems():
    assert list(gpus.problems(HEALTHY)) == []
    assert list(gpus.problems({"ranks": 2})) == []
    # Neither has a machine without any, whatever the build.
    for built in (True, False):
        none = with_(devices=[], seen_by_system=0, built=built, driver=None)
        assert list(gpus.problems(none)) == []


PROBLEMS = [
    (with_(devices=[], error="no function"), "cannot say which GPUs", "wheel"),
    (with_(devices=[], built=False), "system has 2 GPUs, but this build has no", "MSCCLPP_EP_CUDA"),
    (
        with_(
            **{"devices": [], "seen_by_system": 0, "built": False},
            variables={"MSCCLPP_EP_DEVICE": "cuda"},
        ),
        "MSCCLPP_EP_DEVICE asks for one",
        "nvcc",
    ),
    (
        with_(devices=[], variables={"CUDA_VISIBLE_DEVICES": ""}),
        "hides all GPUs",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    (with_(devices=[]), "system has 2 GPUs, but CUDA finds none", "nvidia-smi"),
    (with_(test={"passed": False, "error": "rank 1 died\nof it"}), "failed: rank 1 died", "above"),
    (with_(driver=11080), "driver is of CUDA 11.8", "driver 525"),
    (
        with_(devices=[device(), device(capability=(7, 5))]),
        "GPU 1 (A GPU) has compute capability 7.5",
        "CUDA_VISIBLE_DEVICES",
    ),
    (with_(devices=[device(posix_handles=False), device()]), "GPU 0 (A GPU) cannot share", "WSL"),
    (with_(devices=[device(free_bytes=5 << 20), device()]), "only 0.0 GB of memory", "nvidia-smi"),
    (
        with_(devices=[device(peers=[True, False]), device()]),
        "do not reach each other's memory: 0 and 1",
        "ACS",
    ),
    (with_(torch_built_for="cpu"), "build without CUDA", "pytorch.org"),
    (with_(variables={"MSCCLPP_EP_DEVICE": "gpu"}), "'gpu', which is no device", "cuda:N"),
    (with_(variables={"MSCCLPP_EP_DEVICE": "cuda:2"}), "but there are 2 GPUs", "unset"),
    (
        with_(ranks=3, variables={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        "3 ranks share 2 GPUs",
        "set it to 32",
    ),
]


@pytest.mark.parametrize(("report", "problem", "advice"), PROBLEMS)
def test_every_problem_comes_with_advice(report, problem, advice):
    ((found, what_to_do),) = gpus.problems(report)
    assert problem in found
    assert advice in what_to_do


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """A machine on which the library and the system tell of two."""
    monkeypatch.setattr(_core, "is_cuda_built", lambda: True)
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 2)
    monkeypatch.setattr(_core, "cuda_versions", lambda: (12090, 13000), raising=False)
    monkeypatch.setattr(_core, "cuda_devices", lambda: [device(), device()], raising=False)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$*" = "topo -m" ] && printf "\\033[4mGPU0\\033[0m X NV18\\n"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
    )
    return tmp_path


def test_what_is_found(two_gpus):
    found = gpus.examine(two_gpus)
    assert json.loads(json.dumps(found)) == found
    assert (found["runtime"], found["driver"], found["error"]) == (12090, 13000, None)
    assert found["driver_release"] == "580.159.04"
    assert found["seen_by_system"] == 2
    assert found["topology"] == "GPU0 X NV18"
    assert found["devices"][1]["capability"] == [9, 0]
    assert list(gpus.problems({"ranks": 2, "gpus": found})) == []


def test_a_library_that_does_not_tell(two_gpus, monkeypatch):
    def fail():
        raise _core.CudaError("it is broken")

    monkeypatch.setattr(_core, "cuda_devices", fail)
    found = gpus.examine(two_gpus)
    assert found["error"] == "it is broken"
    assert found["devices"] == []


def test_a_machine_without_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 0)
    found = gpus.examine(tmp_path)
    assert found["devices"] == []
    assert found["error"] is found["driver"] is found["driver_release"] is found["topology"] is None


def test_versions_are_those_of_cuda():
    assert gpus.version_name(13010) == "13.1"
    assert gpus.version_name(12000) == "12.0"
    assert gpus.version_name(None) is None


@pytest.mark.parametrize(
    ("text", "built_for"),
    [
        ("cuda: Optional[str] = '12.8'\n", "12.8"),
        ("cuda: Optional[str] = None\ngit = 'x'\n", "cpu"),
        ("hip = None\n", None),
        (None, None),
    ],
)
def test_what_torch_was_built_for(monkeypatch, tmp_path, text, built_for):
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: spec)
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    assert gpus._torch_built_for() == built_for


def test_gpus_are_printed():
    output = io.StringIO()
    doctor._print_gpus(Console(file=output, width=300), HEALTHY["gpus"])
    text = output.getvalue()
    assert "13.1" in text
    assert "85.9 GB free, 132 SMs, compute capability 9.0" in text
    assert "reaches: 1" in text
    assert "GPU0 [X] NV18" in text
    assert "MSCCLPP_EP_DEVICE           not set" in text


def test_both_self_tests_must_pass():
    report = {"self_test": {"passed": True}, "gpu_self_test": None}
    assert doctor.passed(report)
    assert doctor.passed(report | {"gpu_self_test": {"passed": True}})
    assert not doctor.passed(report | {"gpu_self_test": {"passed": False}})
    assert not doctor.passed({"self_test": {"passed": False}, "gpu_self_test": None})


class HostMemory:
    """In the place of a GPU's."""

    def __init__(self, gpu):
        self.gpu = gpu

    def put(self, out, values):
        out[...] = values

    def get(self, array, dtype):
        return np.asarray(array).astype(dtype)


@pytest.mark.multirank
def test_the_self_test_of_gpus_compares(monkeypatch, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    import mscclpp_ep as ep

    chosen = []

    def on_cpu(group, *, device, timeout):
        chosen.append(device)
        return ep.Buffer(group, device="cpu", timeout=timeout)

    monkeypatch.setattr(doctor, "GpuMemory", HostMemory)
    monkeypatch.setattr(doctor, "ep", types.SimpleNamespace(Buffer=on_cpu))
    ranks = [Rank(index, 3, str(tmp_path / "meeting"), None) for index in range(3)]
    with ThreadPoolExecutor(3) as threads:
        rows = list(threads.map(lambda rank: doctor.exchange_on_gpu(rank, 2), ranks))
    assert sum(rows) > 100
    assert sorted(chosen) == ["cuda:0", "cuda:0", "cuda:1"]


def test_a_wrong_result_is_noticed():
    x, topk_idx = np.ones((2, 4), np.float32), np.array([[0, 1], [0, 3]])
    times = np.array([[1], [2]], np.float32)
    doctor._check(x * times, x, topk_idx, 2)
    with pytest.raises(RuntimeError, match="wrong result"):
        doctor._check(x, x, topk_idx, 2)


def test_the_address_of_elements():
    array = np.arange(12, dtype=np.int32)
    assert gpu_memory.address_of(array) == array.ctypes.data
    assert gpu_memory.address_of(array[4:]) == array.ctypes.data + 16
