# SPDX-License-Identifier: MIT
"""What low-latency dispatch and combine return, to the bit, from first principles.

Formats are tables and integers here, and a fused multiply-add is made of exact doubles: nothing is
left to a library that could err as the one under test does.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from harness.oracle import Placement

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
GROUP = 128


def float8_magnitudes() -> np.ndarray:
    """The 127 finite magnitudes of e4m3, in the order of their codes: 448 is the largest."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    return np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)


MAGNITUDES = float8_magnitudes()


def float8_codes(values: np.ndarray) -> np.ndarray:
    """The nearest e4m3, of two the even code; 448 for what is larger, 0x7F for NaN."""
    exact = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(MAGNITUDES, exact), 1, 126)
    below = above - 1
    with np.errstate(invalid="ignore"):
        up, down = MAGNITUDES[above] - exact, exact - MAGNITUDES[below]
    take_above = (up < down) | ((up == down) & (above % 2 == 0))
    codes = np.where(take_above, above, below) | (np.signbit(values) << 7)
    return np.where(np.isnan(values), 0x7F, codes).astype(np.uint8)


def widened(values: np.ndarray) -> np.ndarray:
    """bfloat16, float16 or float32 as float32."""
    if values.dtype == BFLOAT16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def narrowed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 to `dtype`, to nearest even; every NaN becomes the canonical one."""
    isnan = np.isnan(values)
    if dtype == np.float32:
        bits = values.view(np.uint32).copy()
        bits[isnan] = 0x7FFFFFFF
        return bits.view(dtype)
    if dtype == np.float16:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16).view(np.uint16)
    else:
        wide = values.view(np.uint32).astype(np.uint64)
        half = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    half[isnan] = 0x7FFF
    return half.view(dtype)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once.

    The product is exact in double. Their sum is rounded to odd, which makes the second rounding,
    to float32, the only one that counts.
    """
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + addend
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        inexact = np.isfinite(total) & (lost != 0) & (bits % 2 == 0)
        step = np.where((lost > 0) == (total > 0), 1, -1)
        return np.where(inexact, bits + step, bits).view(np.float64).astype(np.float32)


def quantised(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of e4m3 and what is returned of their scales: kind "fp8", "rounded" or "ue8m0"."""
    tokens, hidden = x.shape
    groups = -(-hidden // GROUP)
    padded = np.zeros((tokens, groups * GROUP), np.float32)
    padded[:, :hidden] = widened(x)
    parts = padded.reshape(tokens, groups, GROUP)
    most = np.nanmax(np.abs(parts), axis=2, initial=np.float32(1e-4))
    inverse = most * (np.float32(1) / np.float32(448))
    with np.errstate(all="ignore"):
        if kind == "fp8":
            scale = np.float32(448) / most
        else:
            mantissa, exponent = np.frexp(inverse)
            exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
            scale = np.where(np.isinf(most), 0, np.ldexp(np.float32(1), -exponent))
            inverse = np.where(np.isinf(most), np.inf, np.ldexp(np.float32(1), exponent))
        scaled = parts * scale.astype(np.float32)[..., None]
    codes = float8_codes(scaled).reshape(tokens, groups * GROUP)[:, :hidden]
    scales = inverse.astype(np.float32)
    if kind == "ue8m0":
        scales = packed_exponents(scales)
    return np.ascontiguousarray(codes).view(FLOAT8), scales


def packed_exponents(scales: np.ndarray) -> np.ndarray:
    """The exponents of powers of two, four to an int32, the first in the lowest byte."""
    tokens, groups = scales.shape
    words = -(-groups // 4)
    exponents = np.zeros((tokens, words * 4), np.int64)
    with np.errstate(all="ignore"):
        exponents[:, :groups] = np.where(np.isinf(scales), 255, np.frexp(scales)[1] + 126)
    quads = exponents.reshape(tokens, words, 4) << np.array([0, 8, 16, 24])
    return quads.sum(2).astype(np.uint32).view(np.int32)


class Slots:
    """Where the rows of every (expert, source rank, source token) lie on the expert's rank."""

    def __init__(self, topk: list[np.ndarray], placement: Placement) -> None:
        self.placement = placement
        experts = len(placement.owner)
        self.tokens = [[self._tokens(idx, e) for idx in topk] for e in range(experts)]
        self.of = [self._slots_of(e, topk) for e in range(experts)]

    @staticmethod
    def _tokens(idx: np.ndarray, expert: int) -> np.ndarray:
        """Tokens that chose the expert, once each however often they chose it."""
        return np.flatnonzero((idx == expert).any(axis=1))

    def _slots_of(self, expert: int, topk: list[np.ndarray]) -> list[np.ndarray]:
        next_slot, slots = 0, []
        for idx, tokens in zip(topk, self.tokens[expert], strict=True):
            own = np.full(len(idx), -1)
            own[tokens] = next_slot + np.arange(len(tokens))
            next_slot += len(tokens)
            slots.append(own)
        return slots

    def counts(self, rank: int) -> np.ndarray:
        mine = self.placement.experts_of(rank)
        return np.array([sum(map(len, self.tokens[e])) for e in mine], np.int32)

    def sources(self, expert: int) -> np.ndarray:
        return np.concatenate(self.tokens[expert]).astype(np.int32)

    def gather(self, expert: int, per_source: list[np.ndarray]) -> np.ndarray:
        """The rows that the expert gets, taken from one array a source rank."""
        parts = [a[t] for a, t in zip(per_source, self.tokens[expert], strict=True)]
        return np.concatenate(parts)

    def ranges(self, rank: int) -> np.ndarray:
        table = []
        for expert in self.placement.experts_of(rank):
            counts = np.array([len(t) for t in self.tokens[expert]], np.int64)
            table.append((np.cumsum(counts) - counts) * 2**32 + counts)
        return np.array(table, np.int64).reshape(-1, len(self.tokens[0]))


def weighted(
    slots: Slots, source: int, idx: np.ndarray, weights: np.ndarray, rows: list[np.ndarray], only
) -> tuple[np.ndarray, np.ndarray]:
    """The chain of fused multiply-adds over a token's choices, and which tokens have any.

    `only`: choices of experts of this rank; None: of all.
    """
    owner = slots.placement.owner
    sums = np.zeros((len(idx), rows[0].shape[2]), np.float32)
    found = np.zeros(len(idx), bool)
    for k in range(idx.shape[1]):
        for expert in np.unique(idx[:, k][idx[:, k] >= 0]):
            if only is not None and owner[expert] != only:
                continue
            tokens = np.flatnonzero(idx[:, k] == expert)
            places = slots.of[expert][source][tokens]
            values = widened(rows[owner[expert]][slots.placement.local[expert]][places])
            sums[tokens] = fma(values, weights[tokens, k][:, None], sums[tokens])
            found[tokens] = True
    return sums, found


def combined(
    slots: Slots,
    source: int,
    idx: np.ndarray,
    weights: np.ndarray,
    rows: list[np.ndarray],
    exact: bool,
) -> np.ndarray:
    """What `source` gets for its tokens; `rows[r]` is what rank r gave to combine."""
    dtype = rows[0].dtype
    if exact:
        return narrowed(weighted(slots, source, idx, weights, rows, None)[0], dtype)
    total = np.zeros((len(idx), rows[0].shape[2]), np.float32)
    for rank in range(len(rows)):
        sums, found = weighted(slots, source, idx, weights, rows, rank)
        with np.errstate(all="ignore"):
            total[found] += widened(narrowed(sums, dtype))[found]
    return narrowed(total, dtype)
