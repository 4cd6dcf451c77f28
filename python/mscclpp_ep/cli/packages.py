# SPDX-License-Identifier: MIT
"""Which frameworks, MPI libraries and variables of the environment there are; imports nothing."""

import ctypes.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata

_NAMES = ("numpy", "ml_dtypes", "torch", "jax", "jaxlib", "cupy", "mpi4py", "nanobind-backend")
_VARIABLES = {
    *("MSCCLPP_EP_DEVICE", "MSCCLPP_EP_PORT", "MSCCLPP_EP_SIMD", "MSCCLPP_EP_TOKEN"),
    "MSCCLPP_EP_TRACE",
}
_SECRET = {"MSCCLPP_EP_TOKEN"}


def versions() -> dict[str, str | None]:
    """Return the installed version of each package of interest, None where there is none."""
    return {name: _version(name) for name in _NAMES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    # CuPy's wheels carry the version of CUDA in their name: cupy-cuda12x.
    for distribution in metadata.distributions():
        if (distribution.name or "").startswith(f"{name}-cuda"):
            return distribution.version
    return None


def mpi() -> dict[str, str | None]:
    """Return what there is of MPI: the launcher, what it says it is, and the library."""
    launcher = shutil.which("mpirun") or shutil.which("mpiexec")
    return {
        "launcher": launcher,
        "version": _first_line(launcher) if launcher else None,
        "library": ctypes.util.find_library("mpi"),
    }


def _first_line(launcher: str) -> str | None:
    try:
        done = subprocess.run(
            [launcher, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else None


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that start with MSCCLPP_EP_; a secret is not shown."""
    return {
        name: "(set)" if name in _SECRET else value
        for name, value in sorted(environment.items())
        if name.startswith("MSCCLPP_EP_")
    }


def unknown_variables(found: Mapping[str, str]) -> list[str]:
    """Return those variables that mean nothing."""
    return [name for name in found if name not in _VARIABLES]
