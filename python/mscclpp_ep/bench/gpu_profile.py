# SPDX-License-Identifier: MIT
"""Tells the work of one call on a GPU from that of others, in a trace of Torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Activities = dict[str, float]  # seconds, by name

_KINDS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
# The kernel of torch.cuda._sleep, which marks where calls begin and end.
_MARK = "spin_kernel"
# One before what lets ranks begin together, one before the call, and one after it.
_MARKS_OF_CALL = 3
_US = 1e-6


def activities_between_marks(events: Iterable[Mapping[str, Any]]) -> list[Activities]:
    """What the GPU did between the second and the third of every three marks.

    That is what began there: a kernel may begin as soon as the mark does, on another stream.

    Args:
        events: `traceEvents` of a trace in Chrome's format, in any order.

    Returns:
        For each three marks, the time of each kind of kernel and copy between the last two. Fewer
        than three at the end are not counted.
    """
    work = [e for e in events if e.get("ph") == "X" and e.get("cat") in _KINDS]
    work.sort(key=lambda event: float(event["ts"]))
    calls: list[Activities] = []
    marks = 0
    current: defaultdict[str, float] = defaultdict(float)
    for event in work:
        if _MARK in event["name"]:
            marks = (marks + 1) % _MARKS_OF_CALL
            if marks == 0:
                calls.append(dict(current))
            current = defaultdict(float)
        elif marks == _MARKS_OF_CALL - 1:
            name = event["name"]
            # Those of copies say from where to where in brackets.
            name = short_name(name) if event["cat"] == "kernel" else name
            current[name] += float(event["dur"]) * _US
    return calls


def short_name(name: str) -> str:
    """A kernel's name without its return type, namespaces and arguments."""
    plain = name.replace("(anonymous namespace)::", "")
    # Up to the arguments, or to what a template is made with.
    found = re.match(r"(?:void )?(?:[\w~]+::)*([\w~]+)\s*(?=[<(]|$)", plain)
    return found.group(1) if found else name
