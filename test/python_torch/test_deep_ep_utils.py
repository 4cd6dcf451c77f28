# SPDX-License-Identifier: MIT
"""`deep_ep.utils` against computations of another kind, mostly element by element."""

from __future__ import annotations

import math
import os
import struct
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist

import mscclpp_ep as ep
from mscclpp_ep.deep_ep.utils import envs, gate, refs, testing
from mscclpp_ep.deep_ep.utils import math as ep_math


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


@pytest.fixture
def alone(tmp_path):
    """A default process group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# math


def test_integers() -> None:
    for x in range(40):
        for y in range(1, 9):
            assert ep_math.ceil_div(x, y) == math.ceil(x / y)
            assert ep_math.align(x, y) == next(m for m in range(x, x + y) if m % y == 0)
    assert ep_math.safe_div(3, 4) == 0.75
    assert ep_math.safe_div(3, 0) == 0


def test_calc_diff() -> None:
    x, y = torch.randn(7, 9), torch.randn(7, 9)
    above = below = 0.0
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        above += (a + 1) * (b + 1)
        below += (a + 1) ** 2 + (b + 1) ** 2
    assert ep_math.calc_diff(x, y) == pytest.approx(1 - 2 * above / below)
    assert ep_math.calc_diff(x, x) == pytest.approx(0, abs=1e-15)
    assert ep_math.calc_diff(x[:0], y[:0]) == 0


@pytest.mark.parametrize("hidden", [128, 100, 520, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_round_trip(hidden: int, dtype: torch.dtype) -> None:
    x = (torch.randn(6, hidden) * torch.logspace(-3, 3, 6).unsqueeze(1)).to(dtype)
    x[2] = 0
    rows, scales = ep_math.per_token_cast_to_fp8(x)
    blocks = math.ceil(hidden / 128)
    assert (rows.dtype, rows.shape) == (torch.float8_e4m3fn, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (6, blocks))
    for token in range(6):
        for block in range(blocks):
            part = slice(128 * block, 128 * (block + 1))
            greatest = max(1e-4, float(x[token, part].float().abs().max()))
            assert float(scales[token, block]) == pytest.approx(greatest / 448, rel=1e-6)
            assert torch.isfinite(rows[token, part].float()).all()
    back = ep_math.per_token_cast_back(rows, scales)
    assert (back.dtype, back.shape) == (torch.bfloat16, x.shape)
    # Three bits of mantissa: half a unit in the last place is 1/16; bfloat16 rounds once more.
    # Below the normal numbers, 2^-6 of the scale, the places are 2^-9 of it.
    steps = scales.repeat_interleave(128, dim=1)[:, :hidden] * 2**-9
    error = (back.float() - x.float()).abs()
    assert (error <= torch.maximum(x.float().abs() * (1 / 16 + 1 / 128), steps)).all()
    assert (back[2] == 0).all()


def test_packed_scales() -> None:
    tokens, hidden = 5, 128 * 6
    rows = torch.randn(tokens, hidden).to(torch.float8_e4m3fn)
    exponents = torch.randint(110, 140, (tokens, 8), dtype=torch.uint8)
    packed = torch.tensor(
        [
            [struct.unpack("<i", bytes(row[4 * i : 4 * i + 4]))[0] for i in range(2)]
            for row in exponents.tolist()
        ],
        dtype=torch.int32,
    )
    back = ep_math.per_token_cast_back(rows, packed)
    for token in range(tokens):
        for block in range(6):
            part = slice(128 * block, 128 * (block + 1))
            scale = 2.0 ** (int(exponents[token, block]) - 127)
            assert torch.equal(back[token, part], (rows[token, part].float() * scale).bfloat16())
    column_major = packed.T.contiguous().T
    assert torch.equal(ep_math.per_token_cast_back(rows, column_major), back)
    assert torch.equal(ep_math.per_token_cast_back(rows, packed.view(2, 5)), back)


def test_casts_check_shapes() -> None:
    rows, scales = ep_math.per_token_cast_to_fp8(torch.zeros(0, 256))
    assert (rows.shape, scales.shape) == ((0, 256), (0, 2))
    assert ep_math.per_token_cast_back(rows, scales).shape == (0, 256)
    with pytest.raises(ep.InvalidArgument, match="3 dimensions"):
        ep_math.per_token_cast_to_fp8(torch.zeros(2, 3, 4))
    rows, scales = ep_math.per_token_cast_to_fp8(torch.zeros(4, 256))
    with pytest.raises(ep.InvalidArgument, match=r"float32 \[4, 2\] or int32 \[4, 1\]"):
        ep_math.per_token_cast_back(rows, scales[:, :1])


def test_inplace_unique() -> None:
    x = torch.randint(-2, 6, (50, 7))
    before = x.tolist()
    ep_math.inplace_unique(x, 6)
    for row, got in zip(before, x.tolist(), strict=True):
        ids = sorted({value for value in row if value >= 0}, reverse=True)
        assert got == ids + [-1] * (7 - len(ids))
    column_major = torch.tensor([[3, 1], [3, -1]], dtype=torch.int32).T
    ep_math.inplace_unique(column_major, 4)
    assert column_major.tolist() == [[3, -1], [1, -1]]
    ep_math.inplace_unique(x[:0], 6)
    with pytest.raises(ep.InvalidArgument, match="id 5"):
        ep_math.inplace_unique(torch.tensor([[5]]), 5)


def test_grouped_scores() -> None:
    scores = torch.rand(20, 12) + 0.1
    groups = torch.rand(20, 4).topk(2, dim=1).indices
    grouped = ep_math.create_grouped_scores(scores, groups, 4)
    for token in range(20):
        for expert in range(12):
            inside = expert // 3 in groups[token].tolist()
            assert grouped[token, expert] == (scores[token, expert] if inside else 0)
    with pytest.raises(ep.InvalidArgument, match="num_groups is 5"):
        ep_math.create_grouped_scores(scores, groups, 5)


def test_hashes_and_sizes() -> None:
    x = torch.randn(6, 8).bfloat16()
    words = struct.unpack("<24i", x.view(torch.uint8).numpy().tobytes())
    assert ep_math.hash_tensor(x) == sum(words)
    assert ep_math.hash_tensor(x[[3, 1, 5, 0, 2, 4]]) == sum(words)
    assert ep_math.hash_tensor(x.T) != 0
    assert ep_math.hash_tensor(torch.tensor([1, 2, 3, 0, 4], dtype=torch.uint8)) == 0x30201 + 4
    y = torch.arange(4, dtype=torch.int32)
    assert ep_math.hash_tensors(x, (y, None)) == sum(words) ^ 6
    assert ep_math.count_bytes(x, (y, [x.double(), None]), None) == 96 + 16 + 384


# gate


def reached(scores: torch.Tensor, topk: int, ranks: int) -> Counter:
    """The tokens of each rank."""
    per_rank: Counter = Counter()
    for experts in scores.topk(topk, dim=1).indices.tolist():
        per_rank.update({expert // (scores.shape[1] // ranks) for expert in experts})
    return per_rank


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    ("per_rank", "ranks", "topk"), [(1, 4, 1), (4, 8, 2), (8, 8, 8), (8, 16, 6), (16, 3, 1)]
)
def test_precise_ratio(per_rank: int, ranks: int, topk: int, ratio: float) -> None:
    least = max(1, math.ceil(topk / per_rank))
    if least > min(topk, ranks, int((ranks - 1) / ratio) + 1):
        with pytest.raises(ep.InvalidArgument, match="no choice of"):
            gate.get_unbalanced_scores(8, per_rank * ranks, ranks, topk, ratio, True)
        return
    total: Counter = Counter()
    for _ in range(2):
        scores = gate.get_unbalanced_scores(1500, per_rank * ranks, ranks, topk, ratio, True)
        assert (scores.dtype, scores.shape) == (torch.float32, (1500, per_rank * ranks))
        assert 0 <= float(scores.min()) <= float(scores.max()) <= 1
        total += reached(scores, topk, ranks)
    others = [total[rank] for rank in range(1, ranks)]
    assert max(others) <= 1.02 * min(others)
    assert total[0] / min(others) == pytest.approx(ratio, rel=0.02)


def test_random_ratio() -> None:
    state = torch.get_rng_state()
    first = gate.get_unbalanced_scores(3000, 64, 8, 4, 2.0, False)
    total = reached(first, 4, 8)
    others = [total[rank] for rank in range(1, 8)]
    assert total[0] / (sum(others) / 7) == pytest.approx(2, rel=0.1)
    torch.set_rng_state(state)
    again = gate.get_unbalanced_scores(3000, 64, 8, 4, 2.0, False)
    assert torch.equal(first, again), "the search for the weight must not use the program's numbers"


def test_gate_edges() -> None:
    for tokens in (0, 1):
        for precise in (True, False):
            assert len(gate.get_unbalanced_scores(tokens, 8, 4, 2, 1.5, precise)) == tokens
    for wrong in ((9, 4, 2, 1), (8, 4, 9, 1), (8, 4, 0, 1), (8, 4, 2, 0.5)):
        with pytest.raises(ep.InvalidArgument):
            gate.get_unbalanced_scores(4, *wrong, True)


# refs


def test_ordered_accumulate() -> None:
    data = torch.randn(4, 5, 6).bfloat16()
    start = torch.randn(4, 6).bfloat16()
    for initial in (None, start):
        got = refs.ordered_accumulate(data, initial)
        total = torch.zeros(4, 6) if initial is None else initial.float()
        for choice in range(5):
            total = total + data[:, choice].float()
        assert torch.equal(got, total.bfloat16())
    assert refs.ordered_accumulate(data[:, :0], start).equal(start)


@pytest.mark.parametrize("levels", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("biases", [0, 1, 2])
def test_reference_combine(levels: tuple[bool, bool], biases: int) -> None:
    tokens, topk, hidden, domains, ranks_per_domain, experts = 30, 6, 4, 2, 3, 12
    topk_idx = torch.rand(tokens, experts).topk(topk, dim=1).indices
    topk_idx[torch.rand(tokens, topk) < 0.2] = -1
    y = torch.randn(tokens, topk, hidden).bfloat16().masked_fill(topk_idx[..., None] < 0, 0)
    given = [torch.randn(tokens, hidden).bfloat16() for _ in range(biases)]
    bias = None if not given else given[0] if biases == 1 else tuple(given)
    got = refs.combine(y, topk_idx, domains, ranks_per_domain, experts, bias, *levels)

    for token in range(tokens):
        values = [(int(e) // 2, y[token, k]) for k, e in enumerate(topk_idx[token]) if e >= 0]
        for level, ranks_of_group in zip(levels, (1, ranks_per_domain), strict=True):
            values = by_group(values, ranks_of_group) if level else values
        total = sum((b[token].float() for b in given), torch.zeros(hidden))
        for _, value in values:
            total = total + value.float()
        assert torch.equal(got[token], total.bfloat16())


def by_group(values, ranks_of_group: int):
    """Sums of the values of each group, in order of the last value of the group."""
    groups = [rank // ranks_of_group for rank, _ in values]
    sums = []
    for place, (rank, _) in enumerate(values):
        if groups[place] not in groups[place + 1 :]:
            total = torch.zeros(values[0][1].shape)
            for group, (_, value) in zip(groups, values, strict=True):
                total = total + value.float() if group == groups[place] else total
            sums.append((rank, total.bfloat16()))
    return sums


def test_reference_data_and_dispatch(alone: None) -> None:
    envs.init_seed(3)
    assert (envs.get_global_seed(), envs.get_local_seed()) == (3, 3)
    source = torch.tensor([4, 0, 9], dtype=torch.int32)
    made = refs.generate_pre_combine_data(source, 10, 2, 5)
    assert (made.dtype, made.shape) == (torch.bfloat16, (3, 2, 5))
    for token in range(3):
        for choice in range(2):
            seed = (int(source[token]) * 2 + choice) * 131071 % 20 + 1
            for k in range(5):
                right = math.sin(seed / 20 * (k + 1) + math.sin(3))
                assert float(made[token, choice, k]) == pytest.approx(right, abs=0.005)

    x, topk_idx = (
        torch.randn(6, 4),
        torch.tensor([[0, 2], [-1, -1], [3, -1], [1, 1], [2, 0], [0, 1]]),
    )
    recv_x, idx, weights, source, counts = refs.dispatch(x, topk_idx, None, 8, 4)
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(recv_x, x[kept])
    assert torch.equal(idx, topk_idx[kept])
    assert weights is None
    assert (source.tolist(), counts.tolist()) == (kept, [5])
    with pytest.raises(ep.InvalidArgument, match="do not fit"):
        refs.dispatch(x, topk_idx, None, 5, 4)


# envs and testing


def test_printing_and_cards(alone: None, capfd: pytest.CaptureFixture[str]) -> None:
    envs.dist_print("hello")
    envs.dist_print("once", once_in_node=True)
    assert capfd.readouterr().out == "hello\nonce\n"
    assert envs.get_rdma_gbs("no_such_card") == 0


def test_bench() -> None:
    calls: list[str] = []

    def work() -> None:
        calls.append("work")
        time.sleep(0.002)

    mean, least, most = testing.bench(work, 2, 4, post_fn=lambda: calls.append("after"))
    assert calls == ["work"] * 2 + ["work", "after"] * 4
    assert 0.002 <= least <= mean <= most
    assert len(testing.bench(work, 0, 1, flush_l2=False)) == 3


def test_bench_kineto(alone: None, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    calls: list[str] = []

    def work() -> None:
        calls.append("work")
        print("noise", flush=True)
        os.write(1, b"native noise")
        time.sleep(0.002)

    one = testing.bench_kineto(work, "dispatch", 3, suppress_kineto_output=True)
    assert one >= 0.002
    both = testing.bench_kineto(
        work, ("dispatch", "combine"), 3, True, None, False, True, num_kernels_per_period=2
    )
    assert len(both) == 2
    assert all(len(times) == 2 and min(times) >= 0.002 for times in both)
    begin = {"barrier_comm_profiling": True, "barrier": lambda: calls.append("begin")}
    calls.clear()
    testing.bench_kineto(work, "dispatch", 2, True, **begin)
    assert calls == ["begin", "work"] * 2
    assert capfd.readouterr().out == ""
    monkeypatch.setenv("EP_USE_NVIDIA_TOOLS", "1")
    assert testing.bench_kineto(work, ("a", "b"), 1) == (1, 1)
