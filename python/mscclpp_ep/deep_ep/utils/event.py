# SPDX-License-Identifier: MIT
"""Events, where deep_ep has them."""

from mscclpp_ep.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
