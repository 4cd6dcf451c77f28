# SPDX-License-Identifier: MIT
"""The same work over MPI, by way of mpi4py: one rank of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mscclpp_ep.bench.checks import Bits, Floats, require_close, require_equal, rounded
from mscclpp_ep.bench.ops import CHAINED, COMBINE, DISPATCH, LAYOUT

if TYPE_CHECKING:
    from mscclpp_ep.bench.cases import Case, Ids
    from mscclpp_ep.bench.clock import Clock
    from mscclpp_ep.bench.settings import Settings

MPI = "mpi"

# The tokens to send, by destination.
_Layout = list[npt.NDArray[np.intp]]


class Mpi:
    """Dispatch and combine over `Alltoallv`, on one rank, with NumPy arrays.

    As they are written without a library: a token goes once to each rank that holds some of its
    experts, with its choices and weights, and what comes back is summed in float32.
    """

    def __init__(self, clock: Clock, settings: Settings) -> None:
        from mpi4py import MPI as mpi

        self._comm: Any = mpi.COMM_WORLD
        # Counted in rows, as bytes would not fit in MPI's 32-bit counts.
        self._types = {
            size: mpi.BYTE.Create_contiguous(size).Commit()
            for size in {settings.row_bytes, settings.topk * 8, settings.topk * 4}
        }
        self._clock = clock
        self._settings = settings

    def measure(self, case: Case, iterations: int) -> None:
        """Times a layer, and checks its results."""
        x, choices = case.tokens_of(case.rank), case.choices_of(case.rank)
        weights, output = case.weights_of(case.rank), case.expert_output_of(case.rank)

        def measure(op: str, call: Any) -> Any:
            return self._clock.measure((case.tokens, MPI, op), call, iterations)

        layout = measure(LAYOUT, lambda: self._layout(choices))
        recv_x, counts = measure(DISPATCH, lambda: self._dispatch(x, choices, weights, layout))
        require_equal(f"{MPI}: {DISPATCH}", recv_x, case.expected_rows())
        del recv_x
        combined = measure(COMBINE, lambda: self._combine(output, len(x), layout, counts))
        require_close(f"{MPI}: {COMBINE}", combined, case.expected_sums())
        if self._settings.chain == 0:
            return

        def pair() -> Bits:
            recv_x, counts = self._dispatch(x, choices, weights, layout)
            return self._combine(recv_x, len(x), layout, counts)

        combined = self._clock.measure_chain((case.tokens, MPI, CHAINED), pair)
        require_close(f"{MPI}: {CHAINED}", combined, case.expected_echo())

    def _layout(self, choices: Ids) -> _Layout:
        ranks = self._settings.ranks
        # One column more, for the choices that are none.
        in_rank = np.zeros((len(choices), ranks + 1), np.bool_)
        holders = np.where(choices < 0, ranks, choices // self._settings.experts_held)
        np.put_along_axis(in_rank, holders, True, axis=1)
        return [np.flatnonzero(in_rank[:, rank]) for rank in range(ranks)]

    def _exchange(
        self, array: npt.NDArray[Any], sent: list[int], received: list[int]
    ) -> npt.NDArray[Any]:
        row = self._types[array.shape[1] * array.itemsize]
        output = np.empty((sum(received), array.shape[1]), array.dtype)
        self._comm.Alltoallv(
            [array, (sent, _offsets(sent)), row], [output, (received, _offsets(received)), row]
        )
        return output

    def _dispatch(
        self, x: Bits, choices: Ids, weights: Floats, layout: _Layout
    ) -> tuple[Bits, list[int]]:
        sent = [len(tokens) for tokens in layout]
        received: list[int] = self._comm.alltoall(sent)
        order = np.concatenate(layout)
        recv_x, _, _ = (self._exchange(a[order], sent, received) for a in (x, choices, weights))
        return recv_x, received

    def _combine(self, output: Bits, tokens: int, layout: _Layout, received: list[int]) -> Bits:
        back = self._exchange(output, received, [len(mine) for mine in layout])
        total = np.zeros((tokens, output.shape[1]), np.float32)
        begin = 0
        for mine in layout:
            part = back[begin : begin + len(mine)]
            # Of bfloat16 by its bits, several times as fast as by the conversion of ml_dtypes.
            total[mine] += (part.astype(np.uint32) << np.uint32(16)).view(np.float32)
            begin += len(mine)
        return rounded(total)


def _offsets(counts: list[int]) -> list[int]:
    return [sum(counts[:rank]) for rank in range(len(counts))]
