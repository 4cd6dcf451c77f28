# SPDX-License-Identifier: MIT
"""The demo's layer: its parts against loops, its bound against honest and dishonest results."""

import numpy as np
import pytest

from mscclpp_ep.cli import InputError, moe
from mscclpp_ep.cli.text import MOST_BYTES, MOST_TOKENS, read_tokens

MODEL = moe.Model(vocabulary=50, hidden=24, ffn=40, experts=10, topk=3, skew=1.0, seed=7)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocabulary, 200)


def distributed(model, tokens, ranks):
    """What ranks must compute: partial sums rounded to bfloat16, summed in float32, rounded."""
    x = moe.embed(model, tokens)
    topk_idx, topk_weights = moe.route(model, x)
    total = np.zeros(x.shape, np.float32)
    for rank in range(ranks):
        held = moe.experts_of(rank, ranks, model.experts)
        experts = [(index, moe.make_expert(model, index)) for index in held]
        partial = moe.apply_experts(x, topk_idx, topk_weights, experts)
        total += partial.astype(moe.BFLOAT16).astype(np.float32)
    return total.astype(moe.BFLOAT16)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_honest_results_are_within_the_bound(size):
    reference = moe.compute_reference(MODEL, TOKENS, size)
    difference = moe.compare(distributed(MODEL, TOKENS, size), reference)
    assert difference.beyond == 0
    assert difference.elements == TOKENS.size * MODEL.hidden
    assert 0.1 < difference.of_bound <= 1.0  # a bound that is never approached would find nothing


def row_lost(output):
    output[17] = 0


def rows_swapped(output):
    output[[3, 4]] = output[[4, 3]]


def row_counted_twice(output):
    output[9] *= 2


def one_element(output):
    index = np.unravel_index(np.argmax(np.abs(output.astype(np.float32))), output.shape)
    output[index] *= moe.BFLOAT16.type(1.1)


def not_a_number(output):
    output[0, 0] = np.nan


def infinity(output):
    output[-1, -1] = -np.inf


@pytest.mark.parametrize(
    "corrupt", [row_lost, rows_swapped, row_counted_twice, one_element, not_a_number, infinity]
)
def test_corrupted_results_are_beyond_the_bound(corrupt):
    assert TOKENS[3] != TOKENS[4]
    output = distributed(MODEL, TOKENS, 4)
    corrupt(output)
    difference = moe.compare(output, moe.compute_reference(MODEL, TOKENS, 4))
    assert difference.beyond > 0
    assert difference.of_bound > 1.0


def test_a_result_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(200, 23\), not \(200, 24\)"):
        moe.compare(np.zeros((200, 23)), moe.compute_reference(MODEL, TOKENS, 2))


def test_reference_does_not_depend_on_the_ranks():
    one, four = (moe.compute_reference(MODEL, TOKENS, ranks) for ranks in (1, 4))
    np.testing.assert_allclose(one.output, four.output, rtol=1e-12, atol=1e-14)
    assert one.load == four.load
    assert sum(one.load) == TOKENS.size * MODEL.topk
    # Sums that cancel are bounded by their parts.
    assert np.all(four.bound >= one.bound * (1 - 1e-12))


def test_experts_are_applied_as_a_loop_would():
    x = moe.embed(MODEL, TOKENS[:20])
    topk_idx, topk_weights = moe.route(MODEL, x)
    topk_idx[5] = -1
    topk_idx[6, 1:] = -1
    experts = [moe.make_expert(MODEL, index) for index in range(MODEL.experts)]
    expected = np.zeros(x.shape)
    for row, choice in np.ndindex(topk_idx.shape):
        if topk_idx[row, choice] >= 0:
            expert = experts[topk_idx[row, choice]]
            inner = x[row].astype(np.float64) @ expert.up
            y = (inner / (1 + np.exp(-inner))) @ expert.down
            expected[row] += float(topk_weights[row, choice]) * y
    got = moe.apply_experts(x, topk_idx, topk_weights, enumerate(experts))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    assert not got[5].any()


def test_an_expert_overflows_to_the_limit_of_its_function():
    expert = moe.Expert(np.full((1, 1), 1e4, np.float32), np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(expert(np.array([[-1.0], [0.0], [1.0]])), [[0], [0], [1e4]])


def test_router_chooses_the_best_and_does_not_depend_on_the_batch():
    x = moe.embed(MODEL, TOKENS)
    topk_idx, topk_weights = moe.route(MODEL, x)
    assert topk_idx.dtype == np.int64
    assert topk_idx.flags.c_contiguous
    assert topk_weights.flags.c_contiguous
    assert all(len(set(row)) == MODEL.topk for row in topk_idx.tolist())
    np.testing.assert_allclose(topk_weights.sum(axis=1), 1, rtol=1e-6)
    assert np.all(np.diff(topk_weights, axis=1) <= 0)
    for rows in (slice(0, 1), slice(30, 77), slice(200, 200)):
        part_idx, part_weights = moe.route(MODEL, x[rows])
        np.testing.assert_array_equal(part_idx, topk_idx[rows])
        np.testing.assert_array_equal(part_weights, topk_weights[rows])


def test_skew_makes_the_load_uneven():
    def busiest(skew):
        model = moe.Model(5000, 24, 1, 16, 2, skew, 0)
        topk_idx, _ = moe.route(model, moe.embed(model, np.arange(5000)))
        return np.bincount(topk_idx.ravel(), minlength=16).max() / (5000 * 2 / 16)

    even, skewed, extreme = busiest(0.0), busiest(1.0), busiest(4.0)
    assert even < skewed < extreme
    assert skewed > 2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("experts", [1, 2, 7, 32])
def test_every_expert_has_one_rank(size, experts):
    held = [moe.experts_of(rank, size, experts) for rank in range(size)]
    assert [index for block in held for index in block] == list(range(experts))
    assert max(map(len, held)) == -(-experts // size)


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("tokens", [1, 2, 5, 3494])
def test_every_token_has_one_rank(size, tokens):
    cuts = moe.shares(tokens, size)
    assert cuts[0] == 0
    assert cuts[-1] == tokens
    assert len(cuts) == size + 1
    assert cuts == sorted(cuts)


def test_equal_words_are_equal_tokens(tmp_path):
    text = tmp_path / "text"
    text.write_bytes("\ufeffOne two, one TWO; größer two".encode())
    assert read_tokens(text).tolist() == [0, 1, 2, 3, 4, 5, 6, 1]
    assert read_tokens(text, 3).tolist() == [0, 1, 2]
    assert read_tokens(text, 10).tolist() == [0, 1, 2, 3, 4, 5, 6, 1, 0, 1]


def test_the_text_that_ships_is_long_enough_to_be_cut():
    tokens = read_tokens(None)
    assert 2000 < len(tokens) <= MOST_TOKENS
    assert set(tokens.tolist()) == set(range(tokens.max() + 1))


def test_a_huge_text_may_be_cut_inside_a_character(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"x " * (MOST_BYTES // 2 - 1) + b"y" + "ß".encode() + b" end")
    assert len(read_tokens(text)) == MOST_TOKENS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no words"),
        (b" \n\t\n", "holds no words"),
        (b"abc\xe9 end", "not UTF-8 text: byte 0xe9 at position 3"),
        (b"ok \xe2\x82", "not UTF-8 text: byte 0xe2 at position 3"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, content, message):
    text = tmp_path / "text"
    text.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tokens(text)
