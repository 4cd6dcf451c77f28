# SPDX-License-Identifier: MIT
"""The LL mode of the library, as its users call it, with NumPy arrays."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

import mscclpp_ep as ep
from mscclpp_ep.bench.checks import Bits, Bytes, Floats, require_same_rows, require_within
from mscclpp_ep.bench.ops import CHAINED, COMBINE, DISPATCH, FP8_DISPATCH, OURS
from mscclpp_ep.bench.settings import BFLOAT16

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.cases import Case
    from mscclpp_ep.bench.clock import Clock
    from mscclpp_ep.bench.settings import Settings

FP8_GROUP = 128  # elements with a scale of their own
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_MOST = np.float32(448)
_LEAST_AMAX = np.float32(1e-4)
_SIGN = np.uint16(0x8000)
_TIMEOUT_S = 60.0


def why_not(settings: Settings) -> str | None:
    """Why the mode cannot be measured here; None if it can. One rank alone tries it."""
    small = dataclasses.replace(settings, ranks=1, experts=1, tokens=4, hidden=FP8_GROUP)
    try:
        with _make(ep.Group.local(1)[0], small) as buffer:
            x = np.zeros((1, small.hidden), BFLOAT16)
            choices = np.zeros((1, 1), np.int64)
            buffer.low_latency_dispatch(x, choices, small.tokens, small.experts, use_fp8=False)
    except ep.NotBuilt as error:
        return str(error)
    return None


def _make(group: ep.Group, settings: Settings) -> Any:
    needed = ep.Buffer.get_low_latency_rdma_size_hint(
        settings.tokens, settings.hidden, settings.ranks, settings.experts
    )
    return ep.Buffer(
        group,
        num_rdma_bytes=needed,
        low_latency_mode=True,
        device="cpu",
        timeout=_TIMEOUT_S,
        num_threads=settings.threads,
    )


class LowLatency:
    """Measures the library on one rank.

    Every expert multiplies by one, those of odd number by minus one: what combine must give then
    does not depend on the order in which rows came, which the mode leaves open.
    """

    def __init__(self, group: ep.Group, clock: Clock, settings: Settings) -> None:
        self._clock = clock
        self._settings = settings
        self._buffer = _make(group, settings)

    def destroy(self) -> None:
        """Leaves the group; collective."""
        self._buffer.destroy()

    def measure(self, case: Case, iterations: int, thorough: bool) -> None:
        """Times a layer, and checks its results; FP8 and chains only if `thorough`."""
        x = case.tokens_of(case.rank).view(BFLOAT16)
        topk_idx, topk_weights = case.choices_of(case.rank), case.weights_of(case.rank)

        def dispatch(use_fp8: bool = False) -> Any:
            return self._buffer.low_latency_dispatch(
                x, topk_idx, self._settings.tokens, self._settings.experts, use_fp8=use_fp8
            )

        def combine(y: Any, handle: Any) -> Any:
            return self._buffer.low_latency_combine(y, topk_idx, topk_weights, handle)[0]

        def measure(op: str, call: Callable[[], Any]) -> Any:
            return self._clock.measure((case.tokens, OURS, op), call, iterations)

        recv_x, recv_count, handle, _, _ = measure(DISPATCH, dispatch)
        received = recv_x.view(np.uint8)
        _check_rows(DISPATCH, case, recv_count, lambda e, count: received[e, :count])
        output = self._experts(case, recv_x.view(np.uint16), recv_count)
        combined = measure(COMBINE, lambda: combine(output, handle))
        _check_sums(COMBINE, case, combined, negated=True)
        if not thorough:
            return
        del recv_x
        if self._settings.hidden % FP8_GROUP == 0:
            (rows, scales), recv_count, _, _, _ = measure(FP8_DISPATCH, lambda: dispatch(True))
            values = rows.view(np.uint8)

            def sent(e: int, count: int) -> Bytes:
                scale_bytes = np.ascontiguousarray(scales[e, :count]).view(np.uint8)
                return np.concatenate([values[e, :count], scale_bytes], axis=1)

            _check_rows(FP8_DISPATCH, case, recv_count, sent)
        if self._settings.chain:

            def pair() -> Any:
                recv_x, _, handle, _, _ = dispatch()
                return combine(recv_x, handle)

            combined = self._clock.measure_chain((case.tokens, OURS, CHAINED), pair)
            _check_sums(CHAINED, case, combined, negated=False)

    def _experts(self, case: Case, received: Bits, counts: Any) -> Any:
        """[L, R * M, H]: the rows received, negated for experts of odd number."""
        first = case.rank * self._settings.experts_held
        # Not a copy of everything: memory that nothing came to need not be there at all.
        output = np.empty_like(received)
        for e, count in enumerate(counts.tolist()):
            sign = _SIGN if (first + e) % 2 == 1 else np.uint16(0)
            np.bitwise_xor(received[e, :count], sign, out=output[e, :count])
        return output.view(BFLOAT16)


def quantized(tokens: Bits) -> tuple[Bytes, Floats]:
    """E4M3 [T, H] as bytes and scales [T, H / 128], as DeepEP defines them."""
    shape = (len(tokens), tokens.shape[1] // FP8_GROUP, FP8_GROUP)
    groups = tokens.view(BFLOAT16).astype(np.float32).reshape(shape)
    most = np.maximum(np.abs(groups).max(axis=2), _LEAST_AMAX)
    scaled = groups * (_FP8_MOST / most)[:, :, np.newaxis]
    values = np.clip(scaled, -_FP8_MOST, _FP8_MOST).astype(_FP8)
    return values.view(np.uint8).reshape(tokens.shape), most * (np.float32(1) / _FP8_MOST)


def _check_rows(op: str, case: Case, counts: Any, rows_of: Callable[[int, int], Bytes]) -> None:
    """Compares what each expert got, in any order, with what it should get.

    `rows_of`: the first so many rows of a local expert.
    """
    first = case.rank * case.settings.experts_held
    held = range(first, min(first + case.settings.experts_held, case.settings.experts))
    sources = range(case.settings.ranks)
    sent = [_as_sent(op, case.tokens_of(source)) for source in sources]
    choices = [case.choices_of(source) for source in sources]
    for expert in held:
        wanted = [sent[r][np.nonzero(choices[r] == expert)[0]] for r in sources]
        given = rows_of(expert - first, int(counts[expert - first]))
        require_same_rows(f"{OURS}: {op}, expert {expert}", given, np.concatenate(wanted))


def _as_sent(op: str, tokens: Bits) -> Bytes:
    if op != FP8_DISPATCH:
        return tokens.view(np.uint8)
    values, scales = quantized(tokens)
    return np.concatenate([values, scales.view(np.uint8)], axis=1)


def _check_sums(op: str, case: Case, combined: Any, negated: bool) -> None:
    x = case.tokens_of(case.rank).view(BFLOAT16).astype(np.float32)
    choices, weights = case.choices_of(case.rank), case.weights_of(case.rank)
    present = np.where(choices < 0, np.float32(0), weights)
    signed = np.where(choices % 2 == 1, -present, present) if negated else present
    expected = signed.sum(axis=1, keepdims=True) * x
    largest = present.sum(axis=1, keepdims=True) * np.abs(x)
    require_within(f"{OURS}: {op}", combined.astype(np.float32), expected, largest)
