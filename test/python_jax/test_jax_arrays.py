# SPDX-License-Identifier: MIT
"""JAX arrays of the CPU in and out."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mscclpp_ep as ep
from harness.threads import on_ranks
from mscclpp_ep import _arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RANKS, EXPERTS, TOPK, HIDDEN = 3, 12, 4, 264
DTYPES = [
    jnp.bool_, jnp.uint8, jnp.int8, jnp.uint16, jnp.int16, jnp.uint32, jnp.int32, jnp.float16,
    jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e8m0fnu,
    jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz,
]  # fmt: skip


def on_buffers(body: Callable[[ep.Buffer], Any]) -> list[Any]:
    """Runs `body` on ranks that are threads, each with a buffer."""

    def run(group: ep.Group) -> Any:
        with ep.Buffer(group, timeout=30) as buffer:
            return body(buffer)

    return on_ranks(RANKS, run)


@pytest.fixture
def buffer() -> Iterator[ep.Buffer]:
    with ep.Buffer(ep.Group.local(1)[0], timeout=30) as single:
        yield single


def route(buffer: ep.Buffer, tokens: int, seed: int) -> dict[str, jax.Array]:
    scores = jax.random.uniform(jax.random.key(seed), (tokens, EXPERTS), jnp.float32)
    weights, topk_idx = jax.lax.top_k(scores, TOPK)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    owners = topk_idx // -(-EXPERTS // buffer.group_size)
    expected = (owners[:, :, None] == jnp.arange(buffer.group_size)).any(axis=1)
    assert isinstance(in_rank, jax.Array)
    assert (in_rank == expected).all()
    assert (per_rank == expected.sum(0)).all()
    assert (per_expert == jnp.bincount(topk_idx.ravel(), length=EXPERTS)).all()
    return {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": topk_idx,
        "topk_weights": weights,
    }


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_round_trip(dtype: Any) -> None:
    def body(buffer: ep.Buffer) -> None:
        tokens = 40 + buffer.rank
        routing = route(buffer, tokens, buffer.rank)
        x = jax.random.normal(jax.random.key(7 + buffer.rank), (tokens, HIDDEN), dtype)
        recv_x, recv_idx, recv_w, counts, handle, _ = buffer.dispatch(x, **routing)
        assert {type(item) for item in (recv_x, recv_idx, recv_w, *handle)} == {type(x)}
        assert recv_x.dtype == x.dtype
        assert recv_idx.dtype == routing["topk_idx"].dtype
        assert [int((recv_idx == e).sum()) for e in range(EXPERTS // RANKS)] == counts
        assert ((recv_w != 0) == (recv_idx >= 0)).all()

        # Every rank scales its copy differently: the sum tells which rank added what.
        y = (recv_x.astype(jnp.float32) * (1 + buffer.rank)).astype(dtype)
        out, weights, _ = buffer.combine(y, handle, topk_weights=recv_w)
        expected = np.zeros((tokens, HIDDEN), np.float32)
        for rank in range(RANKS):
            part = (x.astype(jnp.float32) * (1 + rank)).astype(dtype)
            sent = np.asarray(routing["is_token_in_rank"])[:, rank, None]
            expected += np.where(sent, np.asarray(part.astype(jnp.float32)), 0)
        assert isinstance(out, jax.Array)
        assert (out == jnp.asarray(expected).astype(dtype)).all()
        assert (weights == routing["topk_weights"]).all()

    on_buffers(body)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_as_it_is(buffer: ep.Buffer, dtype: Any) -> None:
    size = np.dtype(dtype).itemsize
    top = 2 if np.dtype(dtype) == np.bool_ else 256
    raw = np.random.default_rng().integers(0, top, (8, 6 * size), np.uint8)
    x = jnp.asarray(raw.view(dtype))
    routing = route(buffer, 8, 0)
    recv, *_ = buffer.dispatch(x, **routing)
    assert recv.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(recv).view(np.uint8), raw)
    (rows, scales), *_ = buffer.dispatch((x, x[:, :2]), **routing)
    np.testing.assert_array_equal(np.asarray(rows).view(np.uint8), raw)
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint8), raw[:, : 2 * size])


def test_results_are_the_memory_of_the_buffer_for_as_long_as_they_are_held() -> None:
    with ep.Buffer(ep.Group.local(1)[0], timeout=30) as buffer:
        before = buffer.stats().held_bytes
        recv, *_, handle, _ = buffer.dispatch(jnp.ones((64, 1024)), **route(buffer, 64, 0))
        assert buffer.stats().held_bytes >= before + recv.nbytes
        kept = recv
        del recv, handle
        gc.collect()
        assert buffer.stats().held_bytes >= before + kept.nbytes
    assert (kept == 1).all()
    assert float(jax.jit(jnp.sum)(kept)) == 64 * 1024


def test_no_tokens(buffer: ep.Buffer) -> None:
    routing = route(buffer, 0, 0)
    recv, *_, handle, _ = buffer.dispatch(jnp.zeros((0, 16)), **routing)
    out, _, _ = buffer.combine(recv, handle)
    assert recv.shape == out.shape == (0, 16)


def test_arrays_being_computed_are_waited_for(buffer: ep.Buffer) -> None:
    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x)

    x = slow(jnp.eye(128))
    recv, *_ = buffer.dispatch(x, **route(buffer, 128, 0))
    assert (recv == x).all()


def test_tracers_are_refused_and_the_buffer_goes_on(buffer: ep.Buffer) -> None:
    routing = route(buffer, 4, 0)

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        return buffer.dispatch(x, **routing)[0]

    x = jnp.ones((4, 8))
    with pytest.raises(ep.InvalidArgument, match=r"x cannot be used.*traced by JAX.*outside of"):
        traced(x)
    with pytest.raises(ep.InvalidArgument, match=r"topk_idx cannot be used.*traced"):
        jax.vmap(lambda idx: buffer.get_dispatch_layout(idx, 4))(jnp.zeros((2, 4, 1), int))
    recv, *_, handle, _ = buffer.dispatch(x, **routing)
    with pytest.raises(ep.InvalidArgument, match=r"x cannot be used.*traced"):
        jax.grad(lambda y: buffer.combine(y, handle)[0].sum())(recv)
    assert (buffer.combine(recv, handle)[0] == 1).all()


def test_deleted_arrays_are_refused(buffer: ep.Buffer) -> None:
    routing = route(buffer, 4, 0)
    x = jnp.ones((4, 8))
    x.delete()
    with pytest.raises(ep.InvalidArgument, match=r"x cannot be used.*deleted"):
        buffer.dispatch(x, **routing)


def test_jax_arrays_are_never_written_to() -> None:
    with pytest.raises(ep.InvalidArgument, match=r"out cannot be used.*JAX.*never written"):
        _arguments.output_view("out", jnp.ones((2, 2)))


def test_memory_of_the_buffer_is_numpy_for_the_types_of_jax(buffer: ep.Buffer) -> None:
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32):
        rows = buffer.empty((4, 8), dtype)
        assert isinstance(rows, np.ndarray)
        assert rows.dtype == dtype


def test_numpy_rows_with_jax_routing_come_back_as_numpy(buffer: ep.Buffer) -> None:
    x = np.ones((4, 8), jnp.bfloat16)
    recv, recv_idx, *_ = buffer.dispatch(x, **route(buffer, 4, 0))
    assert isinstance(recv, np.ndarray)
    assert isinstance(recv_idx, np.ndarray)
    assert recv.dtype == x.dtype


def test_int64_with_x64_disabled(buffer: ep.Buffer) -> None:
    topk_idx = np.array([[0, 3], [-1, 2]], np.int64)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    recv = buffer.dispatch(
        jnp.ones((2, 8)),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=np.ones((2, 2), np.float32),
    )
    assert (recv[1] == topk_idx).all()
    assert recv[4].num_recv_tokens_per_expert.tolist() == per_expert.tolist()


def test_int64_with_x64_enabled(buffer: ep.Buffer) -> None:
    with jax.enable_x64(True):
        routing = route(buffer, 8, 0)
        routing["topk_idx"] = routing["topk_idx"].astype(jnp.int64)
        x = jnp.arange(64, dtype=jnp.float64).reshape(8, 8)
        recv, recv_idx, *_, handle, _ = buffer.dispatch(x, **routing)
        assert (recv.dtype, recv_idx.dtype) == (jnp.float64, jnp.int64)
        assert handle.num_recv_tokens_per_expert.dtype == jnp.int64
        assert (recv == x).all()
        assert (recv_idx == routing["topk_idx"]).all()


SEVERAL_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 3)
import mscclpp_ep as ep
devices = jax.devices("cpu")
mesh = jax.sharding.Mesh(np.array(devices), "i")
with ep.Buffer(ep.Group.local(1)[0]) as buffer:
    def dispatch(x):
        idx = np.zeros((len(x), 1), np.int64)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2)
        return buffer.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                               num_tokens_per_expert=per_expert)
    x = jnp.arange(96, dtype=jnp.bfloat16).reshape(6, 16)
    for spec in (("i",), ()):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        sharded = jax.device_put(x, sharding)
        try:
            dispatch(sharded)
        except ep.InvalidArgument as error:
            assert "sharded over 3 devices" in str(error), error
            assert "addressable_shards" in str(error), error
        else:
            raise SystemExit("a sharded array was taken")
    shards = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("i"))).addressable_shards
    for shard in shards:
        recv, *_, handle, _ = dispatch(shard.data)
        assert recv.devices() == shard.data.devices() == handle[0].devices()
        assert (recv == shard.data).all()
        out, _, _ = buffer.combine(recv, handle)
        assert out.devices() == shard.data.devices()
        assert (out == shard.data).all()
"""


def test_arrays_over_several_devices_are_refused_and_shards_are_taken() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_DEVICES], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
