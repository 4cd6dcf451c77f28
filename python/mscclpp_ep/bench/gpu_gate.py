# SPDX-License-Identifier: MIT
"""Lets the GPUs of all ranks begin something together."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import mscclpp_ep as ep

if TYPE_CHECKING:
    from collections.abc import Callable

# Of a row, the fewest that all ways of copying take.
_ELEMENTS = 64
_ARENA_BYTES = 4 << 20


class Gate:
    """Enqueues what ends on no GPU before every GPU has come to it.

    Hosts that leave a barrier together launch kernels a few microseconds apart, and a rank that
    begins first waits for the last one in a collective call: its time would have that in it. Here
    a row goes from every rank to every other one, so that all know of each other's arrival within
    the time of one signal.
    """

    def __init__(self, torch: Any, group: ep.Group, device: str, timeout: float) -> None:
        """Of ranks that are on these devices; collective."""
        ranks = group.size
        self._group = group
        self._device = device
        self._timeout = timeout
        self._row: Any = torch.zeros((1, _ELEMENTS), dtype=torch.bfloat16, device=device)
        ones = torch.ones(ranks, dtype=torch.int32, device=device)
        everywhere = torch.ones((1, ranks), dtype=torch.bool, device=device)
        self._routing = {
            "num_tokens_per_rank": ones,
            "num_tokens_per_expert": ones,
            "is_token_in_rank": everywhere,
        }
        self._connect()

    def _connect(self) -> None:
        self._buffer = ep.Buffer(
            self._group, _ARENA_BYTES, device=self._device, timeout=self._timeout
        )
        handle = self._buffer.dispatch(self._row, **self._routing)[4]
        self._enqueue: Callable[[], object] = lambda: self._buffer.dispatch(
            self._row, handle=handle, config=ep.Config(1)
        )

    def __call__(self) -> None:
        """On the current stream; collective."""
        self._enqueue()

    def renew(self) -> None:
        """Goes on, also where some ranks have called it more often; collective."""
        with contextlib.suppress(ep.Error):
            self._buffer._core.leave()
        self._connect()

    def destroy(self) -> None:
        """Leaves the group; collective."""
        self._buffer.destroy()
