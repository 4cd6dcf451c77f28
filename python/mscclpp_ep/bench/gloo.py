# SPDX-License-Identifier: MIT
"""The same work over gloo, by way of torch.distributed."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np

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
    """Dispatch and combine over `all_to_all_single` of torch.distributed, on one rank.

    As they are written without a library: a token goes once to each rank that holds some of its
    experts, with its choices and weights, and what comes back is summed in float32.
    """

    def __init__(self, clock: Clock, settings: Settings, rank: int, folder: Path) -> None:
        import torch
        from torch import distributed

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(settings.threads)
        distributed.init_process_group(
            GLOO, init_method=f"file://{folder / GLOO}", rank=rank, world_size=settings.ranks
        )
        self._torch: Any = torch
        self._exchange: Any = distributed.all_to_all_single
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

        layout = measure(LAYOUT, lambda: self._layout(topk_idx))
        recv_x, _, _, counts = measure(
            DISPATCH, lambda: self._dispatch(x, topk_idx, topk_weights, layout)
        )
        require_equal(f"{GLOO}: {DISPATCH}", self._bits(recv_x), case.expected_rows())
        del recv_x
        combined = measure(COMBINE, lambda: self._combine(output, len(x), layout[0], counts))
        require_close(f"{GLOO}: {COMBINE}", self._bits(combined), case.expected_sums())
        if self._settings.chain == 0:
            return

        def pair() -> Any:
            recv_x, _, _, counts = self._dispatch(x, topk_idx, topk_weights, layout)
            return self._combine(recv_x, len(x), layout[0], counts)

        combined = self._clock.measure_chain((case.tokens, GLOO, CHAINED), pair)
        require_close(f"{GLOO}: {CHAINED}", self._bits(combined), case.expected_echo())

    def _rows(self, bits: Any) -> Any:
        return self._torch.from_numpy(bits.view(np.int16)).view(self._torch.bfloat16)

    def _bits(self, rows: Any) -> Any:
        return rows.view(self._torch.int16).numpy().view(np.uint16)

    def _layout(self, topk_idx: Any) -> tuple[Any, Any]:
        """The tokens to send, by destination, and how many to each."""
        torch, ranks = self._torch, self._settings.ranks
        # One column more, for the choices that are none.
        in_rank = torch.zeros(len(topk_idx), ranks + 1, dtype=torch.bool)
        holders = topk_idx // self._settings.experts_held
        in_rank.scatter_(1, holders.masked_fill_(topk_idx < 0, ranks), True)
        chosen = [in_rank[:, rank].nonzero().squeeze(1) for rank in range(ranks)]
        return torch.cat(chosen), torch.tensor([len(tokens) for tokens in chosen])

    def _dispatch(
        self, x: Any, topk_idx: Any, topk_weights: Any, layout: tuple[Any, Any]
    ) -> tuple[Any, Any, Any, tuple[list[int], list[int]]]:
        torch = self._torch
        order, to_send = layout
        to_receive = torch.empty_like(to_send)
        self._exchange(to_receive, to_send)
        sent, received = to_send.tolist(), to_receive.tolist()
        rows = sum(received)
        outputs = [
            torch.empty(rows, a.shape[1], dtype=a.dtype) for a in (x, topk_idx, topk_weights)
        ]
        for output, array in zip(outputs, (x, topk_idx, topk_weights), strict=True):
            self._exchange(output, array[order], received, sent)
        recv_x, recv_idx, recv_weights = outputs
        return recv_x, recv_idx, recv_weights, (sent, received)

    def _combine(
        self, output: Any, num_tokens: int, order: Any, counts: tuple[list[int], list[int]]
    ) -> Any:
        torch = self._torch
        sent, received = counts
        back = torch.empty(len(order), output.shape[1], dtype=output.dtype)
        self._exchange(back, output, sent, received)
        total = torch.zeros(num_tokens, output.shape[1])
        return total.index_add_(0, order, back.float()).to(output.dtype)
