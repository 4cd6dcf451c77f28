# SPDX-License-Identifier: MIT
"""The floor of the figures on GPUs: how fast rows could cross, if nothing else had to be done."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PUSH_BYTES = 512 << 20
_REPEATS = 5


def push(core: Any, sms: int) -> list[float]:
    """Times the library's plain copy of `PUSH_BYTES` to the next rank, by all at once; collective.

    Args:
        core: The C++ buffer.
        sms: Multiprocessors that each copy uses.

    Returns:
        Seconds of each repeat, as this rank sees them.

    Raises:
        RuntimeError: this build cannot measure it.
    """
    time_push = getattr(core, "time_push", None)
    if time_push is None:
        msg = "the C++ library of this build has no time_push"
        raise RuntimeError(msg)
    return [float(seconds) for seconds in time_push(PUSH_BYTES, sms, _REPEATS)]


def bandwidth(times: Sequence[Sequence[float]]) -> float:
    """Bytes a second in one direction: of the slowest rank, in the median repeat.

    Args:
        times: of each rank, seconds of each repeat.
    """
    slowest = [max(repeat) for repeat in zip(*times, strict=True)]
    return PUSH_BYTES / float(statistics.median(slowest))
