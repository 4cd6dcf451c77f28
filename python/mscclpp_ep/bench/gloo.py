# SPDX-License-Identifier: MIT
"""The same work over gloo, by way of torch.distributed."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from mscclpp_ep.bench.all_to_all import AllToAll
from mscclpp_ep.bench.checks import require_close, require_equal
from mscclpp_ep.bench.ops import CHAINED, COMBINE, DISPATCH, LAYOUT

if TYPE_CHECKING:
    from pathlib import Path

    from mscclpp_ep.bench.cases import Case
    from mscclpp_ep.bench.clock import Clock
    from mscclpp_ep.bench.settings import Settings

GLOO = "gloo"


def why_not() -> str | None:
    """Why gloo cannot be measured here; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    import torch.distributed

    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return "this build of torch has no gloo"
    return None


class Gloo:
    """Dispatch and combine over `all_to_all_single` of torch.distributed, on one rank."""

    def __init__(self, clock: Clock, settings: Settings, rank: int, folder: Path) -> None:
        import torch
        from torch import distributed

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(settings.threads)
        distributed.init_process_group(
            GLOO, init_method=f"file://{folder / GLOO}", rank=rank, world_size=settings.ranks
        )
        self._torch: Any = torch
        self._work = AllToAll(settings.ranks, settings.experts_held)
        self._leave: Any = distributed.destroy_process_group
        self._clock = clock
        self._settings = settings

    def destroy(self) -> None:
        """Leaves the group; collective."""
        self._leave()

    def measure(self, case: Case, iterations: int, thorough: bool) -> None:
        """Times a layer, and checks its results; only if `thorough`."""
        if not thorough:
            return
        x = self._rows(case.tokens_of(case.rank))
        topk_idx = self._torch.from_numpy(case.choices_of(case.rank))
        topk_weights = self._torch.from_numpy(case.weights_of(case.rank))
        output = self._rows(case.expert_output_of(case.rank))

        def measure(op: str, call: Any) -> Any:
            return self._clock.measure((case.tokens, GLOO, op), call, iterations)

        layout = measure(LAYOUT, lambda: self._work.layout(topk_idx))
        arrays = (x, topk_idx, topk_weights)
        received, counts = measure(DISPATCH, lambda: self._work.dispatch(arrays, layout))
        require_equal(f"{GLOO}: {DISPATCH}", self._bits(received[0]), case.expected_rows())
        del received
        combined = measure(COMBINE, lambda: self._work.combine(output, len(x), layout[0], counts))
        require_close(f"{GLOO}: {COMBINE}", self._bits(combined), case.expected_sums())
        if self._settings.chain == 0:
            return

        def pair() -> Any:
            received, counts = self._work.dispatch(arrays, layout)
            return self._work.combine(received[0], len(x), layout[0], counts)

        combined = self._clock.measure_chain((case.tokens, GLOO, CHAINED), pair)
        require_close(f"{GLOO}: {CHAINED}", self._bits(combined), case.expected_echo())

    def _rows(self, bits: Any) -> Any:
        return self._torch.from_numpy(bits.view(np.int16)).view(self._torch.bfloat16)

    def _bits(self, rows: Any) -> Any:
        return rows.view(self._torch.int16).numpy().view(np.uint16)
