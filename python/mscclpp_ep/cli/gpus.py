# SPDX-License-Identifier: MIT
"""Which GPUs there are, what they can do together, and what is wrong with them; for the doctor."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from mscclpp_ep import _core
from mscclpp_ep.cli import machine

_DEVICE_VARIABLE = "MSCCLPP_EP_DEVICE"
_CONNECTIONS_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
_VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_OLDEST_CAPABILITY = (8, 0)
# As cudaDriverGetVersion counts: CUDA 12.0, which came with driver 525.
_OLDEST_DRIVER = 12000
_LITTLE_MEMORY = 1 << 30
_SMI_TIMEOUT_S = 20.0
_NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")

Problem = tuple[str, str]


def examine(root: Path = machine.ROOT) -> dict[str, Any]:
    """Return what the library, the driver and the environment say about GPUs.

    Nothing is imported, and no GPU is used. Written as JSON it stays as it is.

    Args:
        root: where /dev is.
    """
    runtime: int | None = None
    driver: int | None = None
    devices: list[dict[str, Any]] = []
    error: str | None = None
    if _core.is_cuda_built():
        try:
            runtime, driver, devices = _asked_of_library()
        except (AttributeError, RuntimeError) as failure:
            error = str(failure)
    return {
        "built": _core.is_cuda_built(),
        "seen_by_system": len(list((root / "dev").glob("nvidia[0-9]*"))),
        "runtime": runtime,
        "driver": driver,
        "driver_release": _driver_release(root),
        "devices": devices,
        "error": error,
        "topology": _smi("topo", "-m"),
        "nccl": _nccl(),
        "torch_built_for": _torch_built_for(),
        "variables": {
            name: os.environ.get(name)
            for name in (_DEVICE_VARIABLE, _VISIBLE_VARIABLE, _CONNECTIONS_VARIABLE)
        },
    }


def _asked_of_library() -> tuple[int | None, int | None, list[dict[str, Any]]]:
    if _core.cuda_device_count() == 0:
        return None, None, []  # there may be no driver either, which is no error
    core: Any = _core  # an older build of it has no such functions
    runtime, driver = core.cuda_versions()
    # A pair is a list in JSON.
    devices = [d | {"capability": list(d["capability"])} for d in core.cuda_devices()]
    return runtime, driver, devices


def _driver_release(root: Path) -> str | None:
    """The version of the kernel's module, such as 580.95.05."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def _smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None if it is not there, or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=_SMI_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # It underlines the heading of a table.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).rstrip()
    return plain if done.returncode == 0 and plain else None


def _nccl() -> str | None:
    for name in _NCCL_PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _torch_built_for() -> str | None:
    """The CUDA that the installed Torch was built for; "cpu" for none; None: not known."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*(.+)$", text, re.MULTILINE)
    if found is None:
        return None
    value = found.group(1).strip()
    return "cpu" if value == "None" else value.strip("'\"")


def version_name(number: int | None) -> str | None:
    """A version as CUDA counts them, such as 13000, for people."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def problems(report: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong, each with what to do about it."""
    found = report.get("gpus")
    if found is None:
        return
    if not found["devices"]:
        yield from _of_no_device(found)
        return
    yield from _of_test(report)
    yield from _of_driver(found)
    yield from _of_devices(found)
    yield from _of_pairs(found)
    yield from _of_torch(found)
    yield from _of_variables(found, report["ranks"])


def _of_no_device(found: dict[str, Any]) -> Iterator[Problem]:
    device = found["variables"][_DEVICE_VARIABLE] or ""
    seen = found["seen_by_system"]
    if found["error"]:
        yield (
            f"the library cannot say which GPUs there are: {found['error']}",
            "install the wheel again, of one version; nvidia-smi tells whether the driver works",
        )
    elif not found["built"] and (seen or device.startswith("cuda")):
        yield (
            f"{_gpus(seen)} this build has no CUDA, so that buffers are on the CPU",
            "build it where nvcc of CUDA 12.5 or later is found: "
            "pip install . -C cmake.define.MSCCLPP_EP_CUDA=ON",
        )
    elif found["variables"][_VISIBLE_VARIABLE] in {"", "-1"}:
        yield f"{_VISIBLE_VARIABLE} hides all GPUs", f"unset {_VISIBLE_VARIABLE}"
    elif seen or device.startswith("cuda"):
        yield (
            f"{_gpus(seen)} CUDA finds none",
            "run nvidia-smi: the driver may be missing, or older than 525, or not let into the "
            "container (docker run --gpus all)",
        )


def _gpus(count: int) -> str:
    return f"the system has {count} GPUs, but" if count else f"{_DEVICE_VARIABLE} asks for one, but"


def _of_test(report: dict[str, Any]) -> Iterator[Problem]:
    test = report.get("gpu_self_test")
    if test is not None and not test["passed"]:
        message = test["error"].strip().splitlines()[0]
        yield f"the self-test on GPUs failed: {message}", "see its output above"


def _of_driver(found: dict[str, Any]) -> Iterator[Problem]:
    if found["driver"] is not None and found["driver"] < _OLDEST_DRIVER:
        yield (
            f"the driver is of CUDA {version_name(found['driver'])}, and 12.0 is needed",
            "install driver 525 or later",
        )


def _of_devices(found: dict[str, Any]) -> Iterator[Problem]:
    for number, device in enumerate(found["devices"]):
        named = f"GPU {number} ({device['name']})"
        if tuple(device["capability"]) < _OLDEST_CAPABILITY:
            capability = ".".join(map(str, device["capability"]))
            yield (
                f"{named} has compute capability {capability}, and 8.0 is needed",
                f"leave it out of {_VISIBLE_VARIABLE}, or set {_DEVICE_VARIABLE}=cpu",
            )
        if not device["posix_handles"]:
            yield (
                f"{named} cannot share memory between processes by file descriptors",
                "give each virtual machine a whole GPU, and use a driver for Linux itself (not "
                "WSL); ranks as threads of one process may work",
            )
        if device["free_bytes"] < _LITTLE_MEMORY:
            yield (
                f"{named} has only {device['free_bytes'] / 1e9:.1f} GB of memory left",
                "end the programs that nvidia-smi lists on it",
            )


def _of_pairs(found: dict[str, Any]) -> Iterator[Problem]:
    missing = unreachable(found["devices"])
    if missing:
        pairs = ", ".join(f"{a} and {b}" for a, b in missing)
        yield (
            f"these GPUs do not reach each other's memory: {pairs}",
            "nvidia-smi topo -p2p rw tells why; without NVLink turn off ACS in the BIOS, give the "
            "container all GPUs, leave MIG off, or use groups of GPUs that reach each other",
        )


def unreachable(devices: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The pairs of GPUs of which one does not reach the memory of the other."""
    numbers = range(len(devices))
    return [
        (a, b)
        for a in numbers
        for b in numbers
        if a < b and not (devices[a]["peers"][b] and devices[b]["peers"][a])
    ]


def _of_torch(found: dict[str, Any]) -> Iterator[Problem]:
    if found["torch_built_for"] == "cpu":
        yield (
            "the torch that is installed is a build without CUDA: its tensors are on the CPU",
            "install one with CUDA, by the command that pytorch.org gives for your driver",
        )


def _of_variables(found: dict[str, Any], ranks: int) -> Iterator[Problem]:
    device, count = found["variables"][_DEVICE_VARIABLE] or "", len(found["devices"])
    if device and not re.fullmatch(r"cpu|cuda(:\d+)?", device, re.ASCII):
        yield (
            f"{_DEVICE_VARIABLE} is {device!r}, which is no device",
            'set it to "cpu", "cuda" or "cuda:N", or unset it',
        )
    elif ":" in device and int(device.partition(":")[2]) >= count:
        yield f"{_DEVICE_VARIABLE} is {device!r}, but there are {count} GPUs", "unset it"
    if found["variables"][_CONNECTIONS_VARIABLE] == "1" and ranks > count:
        yield (
            f"{_CONNECTIONS_VARIABLE} is 1, and {ranks} ranks share {count} GPUs: streams of "
            "ranks in one process wait for each other",
            "unset it, or set it to 32, where ranks are threads that share a GPU",
        )
