# SPDX-License-Identifier: MIT
"""The oracle of low-latency operations, against other implementations and by hand."""

from __future__ import annotations

import ctypes
import ctypes.util

import ml_dtypes
import numpy as np

from harness import low_latency_oracle as oracle
from harness.cases import SPECIAL_FLOAT32
from harness.oracle import place


def floats(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random bits, like magnitudes, and what is special."""
    bits = rng.integers(0, 2**32, count, dtype=np.uint32)
    bits[::3] = 0x3F000000 + bits[::3] % 2**25
    bits[::7] = rng.choice(SPECIAL_FLOAT32, len(bits[::7]))
    return bits.view(np.float32)


def test_fma_is_that_of_the_c_library(seed):
    rng = np.random.default_rng(seed)
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.fmaf.restype, library.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = (floats(rng, 60000) for _ in range(3))
    # Half of the sums cancel all but the last bits of the product.
    with np.errstate(all="ignore"):
        c[::2] = -(a * b)[::2]
    expected = np.array([library.fmaf(*map(float, three)) for three in zip(a, b, c, strict=True)])
    got = oracle.narrowed(oracle.fma(a, b, c), np.dtype(np.float32))
    wanted = oracle.narrowed(expected.astype(np.float32), np.dtype(np.float32))
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_fma_rounds_once():
    one = np.float32(1)
    factor = np.float32(1 + 2**-12)
    fused = oracle.fma(
        np.array([factor]), np.array([factor]), np.array([-one - np.float32(2**-11)])
    )
    assert fused.tolist() == [2.0**-24]


def test_narrowing_to_bfloat16(seed):
    values = floats(np.random.default_rng(seed), 100000)
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    expected[np.isnan(values)] = 0x7FFF
    assert np.array_equal(oracle.narrowed(values, oracle.BFLOAT16).view(np.uint16), expected)


def test_every_code_of_float8_is_its_own_nearest():
    codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    values = codes.view(oracle.FLOAT8).astype(np.float32)
    assert np.array_equal(oracle.float8_codes(values), codes)
    assert oracle.MAGNITUDES[[1, 8, 0x38, 126]].tolist() == [2.0**-9, 2.0**-6, 1.0, 448.0]


def test_float8_of_any_value(seed):
    values = floats(np.random.default_rng(seed), 100000)
    halves = np.arange(-5000, 5000, dtype=np.float32) * np.float32(2**-10)
    values = np.concatenate([values[~np.isnan(values)], halves])
    with np.errstate(all="ignore"):
        expected = values.clip(-448, 448).astype(oracle.FLOAT8).view(np.uint8)
    assert np.array_equal(oracle.float8_codes(values), expected)


def test_quantised_by_hand():
    x = np.zeros((1, 130), ml_dtypes.bfloat16)
    x[0, :4] = [448, -224, 1, 17]
    x[0, 128:] = [3.5, -np.inf]
    codes, scales = oracle.quantised(x, "fp8")
    assert codes.view(np.uint8)[0, :4].tolist() == [0x7E, 0xF6, 0x38, 0x58]
    assert codes.view(np.uint8)[0, 128:].tolist() == [0, 0x7F]
    assert scales[0].tolist() == [1.0, np.inf]
    _, packed = oracle.quantised(x, "ue8m0")
    assert packed.tolist() == [[127 + 255 * 256]]
    _, rounded = oracle.quantised(np.full((1, 1), 449 * 2, ml_dtypes.bfloat16), "rounded")
    assert rounded.tolist() == [[2.0]]  # 898 becomes 896 in bfloat16
    _, rounded = oracle.quantised(np.full((1, 1), 900, ml_dtypes.bfloat16), "rounded")
    assert rounded.tolist() == [[4.0]]
    _, least = oracle.quantised(np.zeros((1, 1), ml_dtypes.bfloat16), "fp8")
    assert least[0, 0] == np.float32(1e-4) * np.float32(1 / 448)


def test_slots_by_hand():
    topk = [np.array([[0, 0], [2, 0], [-1, -1]]), np.array([[1, 0], [2, 2]])]
    slots = oracle.Slots(topk, place(3, 2))
    assert slots.counts(0).tolist() == [3, 1]
    assert slots.counts(1).tolist() == [2]
    assert slots.sources(0).tolist() == [0, 1, 0]
    assert slots.ranges(0).tolist() == [[2, 2 * 2**32 + 1], [0, 1]]
    assert slots.of[2][1].tolist() == [-1, 1]


def test_sums_by_hand():
    topk = [np.array([[0, 1, 0]]), np.zeros((0, 3), int)]
    slots = oracle.Slots(topk, place(2, 2))
    rows = [np.full((1, 4, 1), v, ml_dtypes.bfloat16) for v in (1.0, 3.0)]
    weights = np.array([[1, 2**-9, 2**-8]], np.float32)
    # 1 + 2^-8 lies half-way and becomes 1 in bfloat16, if it is rounded on its own.
    two = oracle.combined(slots, 0, topk[0], weights, rows, exact=False)
    one = oracle.combined(slots, 0, topk[0], weights, rows, exact=True)
    assert two.astype(np.float32).tolist() == [[1.0078125]]
    assert one.astype(np.float32).tolist() == [[1.0078125]]
    weights[0, 1] = 2.0**-10
    two = oracle.combined(slots, 0, topk[0], weights, rows, exact=False)
    one = oracle.combined(slots, 0, topk[0], weights, rows, exact=True)
    assert two.astype(np.float32).tolist() == [[1.0]]
    assert one.astype(np.float32).tolist() == [[1.0078125]]
