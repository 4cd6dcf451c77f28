# SPDX-License-Identifier: MIT
"""The machine on which figures were taken."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name.group(1) if name else platform.machine()


def describe() -> dict[str, Any]:
    """What absolute times depend on."""
    packages = {"mpi4py", "numpy", "torch"} & {d.metadata["Name"] for d in metadata.distributions()}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in sorted(packages)},
    }
