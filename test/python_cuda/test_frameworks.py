# SPDX-License-Identifier: MIT
"""Arrays of each framework on a GPU: the calls that users make, by ranks that are threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import mscclpp_ep as ep

TOKENS, HIDDEN, EXPERTS, TOPK = 33, 129, 6, 3


class Torch:
    """Each rank works on a stream of its own, as several ranks of one process must."""

    def __init__(self):
        import torch

        self.torch = torch
        self.type = torch.Tensor

    def setup(self):
        self.torch.cuda.set_device(0)
        self.torch.cuda.set_stream(self.torch.cuda.Stream())

    def array(self, host):
        return self.torch.from_numpy(host).to("cuda:0")

    def host(self, array):
        return array.cpu().numpy()

    def device_of(self, array):
        return str(array.device)


class CuPy:
    def __init__(self):
        import cupy

        self.cupy = cupy
        self.type = cupy.ndarray

    def setup(self):
        self.cupy.cuda.Stream(non_blocking=True).use()

    def array(self, host):
        return self.cupy.asarray(host)

    def host(self, array):
        return self.cupy.asnumpy(array)

    def device_of(self, array):
        return f"cuda:{array.device.id}"


class Jax:
    def __init__(self):
        import jax

        self.jax = jax
        self.type = jax.Array

    def setup(self):
        pass

    def array(self, host):
        return self.jax.device_put(host, self.jax.devices("gpu")[0])

    def host(self, array):
        return np.asarray(array)

    def device_of(self, array):
        (device,) = array.devices()
        return f"cuda:{device.id}"


@pytest.fixture(params=[Torch, CuPy, Jax], ids=lambda kind: kind.__name__.lower())
def framework(request):
    return request.param()


def run_ranks(size, function):
    """Runs `function(group)` in a thread for each rank; returns what they return."""
    with ThreadPoolExecutor(size) as pool:
        runs = [pool.submit(function, group) for group in ep.Group.local(size)]
        return [run.result(timeout=120) for run in runs]


def inputs(rank, dtype):
    rng = np.random.default_rng((rank, 5))
    x = rng.integers(-8, 8, (TOKENS, HIDDEN)).astype(dtype)
    idx = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :TOPK].astype(np.int32)
    idx[rng.random(idx.shape) < 0.2] = -1
    return x, idx, rng.random(idx.shape, np.float32)


def ranks_of(idx, size):
    """How many ranks hold experts of each token."""
    owners = np.where(idx >= 0, idx // -(-EXPERTS // size), -1)
    return np.array([len(set(row[row >= 0])) for row in owners])[:, None]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(framework, size, dtype):
    def rank_main(group):
        framework.setup()
        x, idx, weights = inputs(group.rank, dtype)
        with ep.Buffer(group, device="cuda:0") as buffer:
            given = framework.array(idx)
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(given, EXPERTS)
            rows, local, recv_weights, counts, handle, event = buffer.dispatch(
                framework.array(x),
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=given,
                topk_weights=framework.array(weights),
                async_finish=True,
            )
            event.current_stream_wait()
            out, out_weights, _ = buffer.combine(rows, handle, topk_weights=recv_weights)
            for array in (per_rank, in_rank, rows, local, recv_weights, out, *handle):
                assert isinstance(array, framework.type)
                assert framework.device_of(array) == "cuda:0"
            assert sum(counts) == (framework.host(local) >= 0).sum()
            return framework.host(out), framework.host(out_weights)

    for rank, (out, out_weights) in enumerate(run_ranks(size, rank_main)):
        x, idx, weights = inputs(rank, dtype)
        np.testing.assert_array_equal(out, x * ranks_of(idx, size).astype(dtype))
        np.testing.assert_array_equal(out_weights, np.where(idx >= 0, weights, np.float32(0)))


def test_low_latency_says_that_it_is_not_there(framework):
    (group,) = ep.Group.local(1)
    framework.setup()
    x, idx, _ = inputs(0, "float32")
    with (
        ep.Buffer(group, device="cuda:0") as buffer,
        pytest.raises(ep.NotBuilt, match="low-latency operations on a GPU"),
    ):
        buffer.low_latency_dispatch(
            framework.array(x), framework.array(idx), TOKENS, EXPERTS, use_fp8=False
        )


def test_arrays_of_the_host_are_refused():
    def rank_main(group):
        x, idx, _ = inputs(group.rank, "float32")
        with ep.Buffer(group, device="cuda:0") as buffer:
            with pytest.raises(ep.InvalidArgument, match="takes tensors on cuda:0"):
                buffer.get_dispatch_layout(idx, EXPERTS)
            with pytest.raises((ep.InvalidArgument, ep.PeerFailure), match="cpu"):
                buffer.dispatch(x, is_token_in_rank=np.ones((TOKENS, 2), bool))

    run_ranks(2, rank_main)


class TestTorch:
    """What is Torch's own."""

    @pytest.fixture(autouse=True)
    def torch(self):
        import torch

        self.torch = torch
        torch.cuda.set_device(0)
        return torch

    def test_the_current_gpu_is_the_default(self, monkeypatch):
        monkeypatch.delenv("MSCCLPP_EP_DEVICE", raising=False)
        (group,) = ep.Group.local(1)
        with ep.Buffer(group) as buffer:
            assert buffer.device == "cuda:0"

    def test_a_call_waits_for_the_stream_that_is_given(self):
        torch = self.torch
        (group,) = ep.Group.local(1)
        with ep.Buffer(group, device="cuda:0") as buffer:
            stream = torch.cuda.Stream()
            idx = torch.full((1 << 16, 1), -1, device="cuda:0")
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000_000)
                idx.fill_(2)
            for given in (stream, stream.cuda_stream):
                per_expert = buffer.get_dispatch_layout(idx, 4, stream=given)[2]
                stream.synchronize()
                assert per_expert.tolist() == [0, 0, 1 << 16, 0]

    def test_a_call_waits_for_the_event_before_it(self):
        torch = self.torch
        (group,) = ep.Group.local(1)
        with ep.Buffer(group, device="cuda:0") as buffer:
            idx = torch.full((1 << 16, 1), -1, device="cuda:0")
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(100_000_000)
                idx.fill_(1)
                event = buffer.capture()
            per_expert = buffer.get_dispatch_layout(idx, 4, previous_event=event)[2]
            assert per_expert.tolist() == [0, 1 << 16, 0, 0]

    def test_memory_of_the_arena(self):
        torch = self.torch
        (group,) = ep.Group.local(1)
        with ep.Buffer(group, device="cuda:0") as buffer:
            rows = buffer.empty((5, 7), torch.bfloat16)
            assert (rows.device.type, rows.dtype, rows.shape) == ("cuda", torch.bfloat16, (5, 7))
            rows.fill_(3)
            assert rows.sum().item() == 5 * 7 * 3
            stream = buffer.get_comm_stream()
            assert isinstance(stream, torch.cuda.Stream)
            buffer.record_stream(rows, stream)
        rows.fill_(4)  # what a buffer gave is the caller's, also when the buffer is gone
        assert rows.sum().item() == 5 * 7 * 4


def test_a_block_is_not_given_out_while_the_gpu_uses_it():
    """Rows dropped right after work on them was enqueued keep their bytes until it ends."""
    import torch

    (group,) = ep.Group.local(1)
    torch.cuda.set_device(0)
    with ep.Buffer(group, device="cuda:0", num_nvl_bytes=1 << 20) as buffer:
        side = torch.cuda.Stream()
        for turn in range(8):
            rows = buffer.empty((1024, 64), torch.int32)
            rows.fill_(turn)
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                kept = rows.clone()
            buffer.record_stream(rows, side)
            del rows
            buffer.empty((1024, 64), torch.int32).fill_(-1)
            side.synchronize()
            assert (kept == turn).all()


def test_ranks_end_in_errors_not_in_hangs():
    """A rank that never comes: the other gets a Timeout, and its GPU goes on working."""
    import torch

    ready = threading.Barrier(2)

    def rank_main(group):
        torch.cuda.set_device(0)
        buffer = ep.Buffer(group, device="cuda:0", timeout=1.0)
        ready.wait()
        if group.rank == 1:
            ready.wait()
            buffer._core.leave()
            return
        rows = torch.ones((4, 8), device="cuda:0")
        idx = torch.zeros((4, 1), dtype=torch.int64, device="cuda:0")
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2)
        with pytest.raises(ep.Timeout, match="rank 1"):
            buffer.dispatch(
                rows,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
        ready.wait()
        assert rows.sum().item() == 4 * 8
        buffer._core.leave()

    run_ranks(2, rank_main)


def test_pool_of_torch():
    """Tensors made in the pool are read where they are; its memory comes back in the end."""
    torch = pytest.importorskip("torch")

    def rank_main(group):
        torch.cuda.set_device(0)
        torch.cuda.set_stream(torch.cuda.Stream())
        x, idx, _ = inputs(group.rank, "float32")
        with ep.Buffer(group, device="cuda:0", num_nvl_bytes=64 << 20) as buffer:
            given = torch.from_numpy(idx).cuda()
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(given, EXPERTS)
            rows, _, _, _, handle, _ = buffer.dispatch(
                torch.from_numpy(x).cuda(),
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
            held = buffer.stats().held_bytes
            pool = buffer.mem_pool(16 << 20)
            with torch.cuda.use_mem_pool(pool):
                output = rows * 2
            before = buffer.stats()
            out, _, _ = buffer.combine(output, handle)
            after = buffer.stats()
            assert after.pulled_rows - before.pulled_rows == len(rows)
            assert after.staged_rows == before.staged_rows
            result = out.cpu().numpy()
            del output, pool
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            assert buffer.stats().held_bytes <= held
            return result

    for rank, out in enumerate(run_ranks(2, rank_main)):
        x, idx, _ = inputs(rank, "float32")
        np.testing.assert_array_equal(out, 2 * x * ranks_of(idx, 2).astype("float32"))
