# SPDX-License-Identifier: MIT
"""Thousands of mixed operations, delayed at random on each rank, with every result checked."""

from __future__ import annotations

import pytest

import mscclpp_ep
from harness.programs import sequences, torrent

# How many operations: more are left out of a plain run, like more numbers of ranks.
LENGTHS = [500, pytest.param(4000, marks=pytest.mark.grid)]


@pytest.mark.slow
@pytest.mark.ranks(3)
@pytest.mark.parametrize("operations", LENGTHS)
def test_soak(ranks, operations, seed):
    ranks.check(sequences.soak, operations, seed, timeout=240)


@pytest.mark.slow
@pytest.mark.ranks(8)
def test_soak_with_more_ranks_than_cores(ranks, seed):
    ranks.check(sequences.soak, 200, seed, timeout=120)


@pytest.mark.gpu_only
@pytest.mark.ranks(2, 4)
def test_short_torrent(ranks, seed):
    ranks.check(torrent.torrent, 200, seed)


@pytest.mark.gpu_only
@pytest.mark.slow
@pytest.mark.ranks(2, 4, modes=("thread",))
def test_torrent(ranks, seed):
    ranks.check(torrent.torrent, 10_000, seed, timeout=240)


@pytest.mark.gpu_only
@pytest.mark.slow
@pytest.mark.ranks(8)
def test_torrent_of_many_ranks(ranks, seed):
    ranks.check(torrent.torrent, 200, seed, timeout=240)


@pytest.mark.gpu_only
@pytest.mark.ranks(1, 2)
def test_behind_long_work(ranks, seed):
    ranks.check(torrent.behind_long_work, seed)


@pytest.mark.gpu_only
@pytest.mark.ranks(1, 2, 3)
def test_timed_pushes(ranks, seed):
    ranks.check(torrent.timed_pushes, seed)


@pytest.mark.gpu_only
@pytest.mark.ranks(2, 4)
def test_two_buffers(ranks, seed):
    ranks.check(torrent.two_buffers, 100, seed)


@pytest.mark.gpu_only
@pytest.mark.ranks(2, modes=("process",))
def test_beside_nccl(ranks, seed, tmp_path):
    if mscclpp_ep._core.cuda_device_count() < 2:
        pytest.skip("NCCL wants a GPU for each rank")
    ranks.check(torrent.beside_nccl, str(tmp_path / "nccl"), 100, seed)


@pytest.mark.gpu_only
@pytest.mark.ranks(1, 2, modes=("thread",))  # which have enough queues for it: see gpu.sh
def test_calls_overlap(ranks, seed):
    ranks.check(torrent.overlaps, seed)


@pytest.mark.cpu_only
@pytest.mark.ranks(3)
def test_short_soak_of_both_modes(ranks, seed):
    ranks.check(sequences.mixed_soak, 120, seed)


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.ranks(3)
@pytest.mark.parametrize("operations", LENGTHS)
def test_soak_of_both_modes(ranks, operations, seed):
    ranks.check(sequences.mixed_soak, operations, seed, timeout=240)


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.ranks(8)
def test_soak_of_both_modes_with_more_ranks_than_cores(ranks, seed):
    ranks.check(sequences.mixed_soak, 200, seed, timeout=120)
