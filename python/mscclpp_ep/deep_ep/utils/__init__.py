# SPDX-License-Identifier: MIT
"""What programs and tests written for `deep_ep` use beside its buffer."""

from mscclpp_ep.deep_ep.utils import envs, event, gate, math, refs, testing
from mscclpp_ep.event import EventHandle, EventOverlap

__all__ = [
    "EventHandle",
    "EventOverlap",
    "envs",
    "event",
    "gate",
    "math",
    "refs",
    "testing",
]
