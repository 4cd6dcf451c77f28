# SPDX-License-Identifier: MIT
"""The oracle, against results worked out by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from harness import oracle

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_experts_lie_in_blocks():
    placement = oracle.place(7, 3)
    assert placement.owner.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert placement.local.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_fewer_experts_than_ranks():
    placement = oracle.place(2, 4)
    assert placement.owner.tolist() == [0, 1]
    assert placement.experts_of(3).tolist() == []


def test_experts_lie_as_mapped():
    placement = oracle.place(5, 2, np.array([1, 0, 1, 1, 0]))
    assert placement.local.tolist() == [0, 0, 1, 2, 1]


def test_layout_counts_a_token_once_a_rank_and_every_choice():
    idx = np.array([[0, 1], [3, -1], [2, 2]])
    layout = oracle.layout(idx, 2, oracle.place(4, 2))
    assert layout.per_rank.tolist() == [1, 2]
    assert layout.per_expert.tolist() == [1, 1, 2, 1]
    assert layout.in_rank.tolist() == [[True, False], [False, True], [False, True]]


def test_rows_come_by_source_then_token():
    masks = [np.array([[1, 0], [1, 1]], bool), np.array([[0, 1], [1, 1], [0, 1]], bool)]
    route = oracle.route(masks, 1)
    assert route.source.tolist() == [0, 1, 1, 1]
    assert route.token.tolist() == [1, 0, 1, 2]
    rows = route.gather([np.array([[10], [11]]), np.array([[20], [21], [22]])])
    assert rows.ravel().tolist() == [11, 20, 21, 22]
    assert oracle.rank_prefix_matrix(masks, 1).tolist() == [[-1, 1], [-1, 4]]
    assert oracle.send_head(masks[1]).tolist() == [[-1, 0], [0, 1], [-1, 2]]


def test_indices_become_local():
    idx, weights = np.array([[0, 3, -1]], np.int32), np.array([[1, 2, 4]], np.float32)
    local, kept = oracle.localise(idx, weights, 1, oracle.place(4, 2))
    assert local.tolist() == [[-1, 1, -1]]
    assert kept.tolist() == [[0, 2, 0]]


def test_counts_are_rounded_up():
    assert oracle.round_up(np.array([0, 1, 8, 9]), 8) == [0, 8, 8, 16]


def sum_of(rows: list, dtype: np.dtype, biases: tuple = ()) -> int:
    """Bits of the sum of one-element rows, one of each rank."""
    route = oracle.Route(np.array([0]), np.array([0]))
    outputs = [np.array([[row]], dtype) for row in rows]
    biases = tuple(np.array([[bias]], dtype) for bias in biases)
    out = oracle.combine(outputs, [route] * len(rows), 0, 1, biases)
    return int(out.view(f"u{dtype.itemsize}")[0, 0])


def test_sum_is_in_float32_by_ascending_rank():
    # ((1 + 2^-24) + 2^-24) is 1 in float32; (2^-24 + 2^-24) + 1 is not.
    tiny = 2.0**-24
    assert sum_of([1, tiny, tiny], np.dtype(np.float32)) == 0x3F800000
    assert sum_of([tiny, tiny, 1], np.dtype(np.float32)) == 0x3F800001


def test_sum_is_rounded_once_to_even():
    assert sum_of([1, 2.0**-8], BF16) == 0x3F80
    assert sum_of([1, 2.0**-8, 2.0**-16], BF16) == 0x3F81
    assert sum_of([1.0078125, 2.0**-8], BF16) == 0x3F82


def test_bias_comes_first():
    tiny = 2.0**-24
    assert sum_of([1], np.dtype(np.float32), (tiny, tiny)) == 0x3F800001
    assert sum_of([tiny], np.dtype(np.float32), (1, tiny)) == 0x3F800000


def test_zero_is_positive_unless_everything_is_negative():
    assert sum_of([-0.0], BF16) == 0x0000
    assert sum_of([-0.0], BF16, (-0.0,)) == 0x0000
    assert sum_of([-0.0], BF16, (-0.0, -0.0)) == 0x8000


def test_nan_is_canonical():
    assert sum_of([np.nan], BF16) == 0x7FFF
    assert sum_of([np.inf, -np.inf], np.dtype(np.float16)) == 0x7FFF
    assert sum_of([-np.nan], np.dtype(np.float32)) == 0x7FFFFFFF


def test_sum_overflows_to_infinity():
    assert sum_of([65504, 16], np.dtype(np.float16)) == 0x7C00
    assert sum_of([65504, 15], np.dtype(np.float16)) == 0x7BFF


def test_token_without_rank_gets_the_bias():
    nothing = oracle.Route(np.array([], int), np.array([], int))
    out = oracle.combine([np.zeros((0, 2), BF16)], [nothing], 0, 1, (np.ones((1, 2), BF16),))
    assert out.astype(float).tolist() == [[1, 1]]


def test_dropped_rows_are_not_summed():
    route = oracle.Route(np.array([0, 0]), np.array([0, 1])).first(1)
    out = oracle.combine([np.ones((1, 1), BF16)], [route], 0, 2)
    assert out.astype(float).tolist() == [[1], [0]]
