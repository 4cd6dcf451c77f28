"""How arrays are taken and given, on a group of one rank."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import mscclpp_ep as ep
from mscclpp_ep import _arguments, _core, _frameworks

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def buffer() -> Iterator[ep.Buffer]:
    with ep.Buffer(ep.Group.local(1)[0], timeout=30) as single:
        yield single


def routing(buffer: ep.Buffer, tokens: int) -> dict[str, Any]:
    topk_idx = np.random.default_rng().integers(0, 4, (tokens, 2))
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    return {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


DTYPES = [
    np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64,
    np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2fnuz,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_as_it_is(buffer: ep.Buffer, dtype: Any) -> None:
    size = np.dtype(dtype).itemsize
    top = 2 if np.dtype(dtype) == np.bool_ else 256
    raw = np.random.default_rng().integers(0, top, (6, 5 * size), np.uint8)
    x = raw.view(dtype)
    recv, *_ = buffer.dispatch(x, **routing(buffer, 6))
    assert recv.dtype == x.dtype
    np.testing.assert_array_equal(recv.view(np.uint8), raw)


def test_read_only_arrays_are_taken(buffer: ep.Buffer) -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        x = np.ones((4, 3), dtype)
        x.flags.writeable = False
        recv, *_, handle, _ = buffer.dispatch(x, **routing(buffer, 4))
        recv.flags.writeable = False
        out, _, _ = buffer.combine(recv, handle)
        np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("dtype", [np.int64, np.float32, ml_dtypes.bfloat16])
def test_arrays_that_came_through_pickle_are_taken(buffer: ep.Buffer, dtype: Any) -> None:
    x = pickle.loads(pickle.dumps(np.ones((4, 3), dtype)))
    recv, *_ = buffer.dispatch(x, **routing(buffer, 4))
    assert recv.dtype == dtype
    np.testing.assert_array_equal(recv, x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((4, 6))[:, ::2], "x is float64.*contiguous"),
        (np.zeros(4), r"x is float64\[4\] on cpu; its shape must be"),
        (np.float32(1.0), "x cannot be used"),
        ([[1.0, 2.0]], "x cannot be used: a list was given"),
        (np.zeros((4, 2), np.complex64), "x cannot be used"),
        (np.zeros((4, 2), ml_dtypes.int4), "x cannot be used: .*int4"),
        (np.zeros((4, 2), "M8[s]"), "x cannot be used"),
        (np.zeros((4, 2), ">f4"), "x cannot be used: .*>f4"),
        (None, r"x is missing; it must be \[T, H\]"),
    ],
)
def test_what_cannot_be_taken_is_named(buffer: ep.Buffer, x: Any, message: str) -> None:
    with pytest.raises(ep.InvalidArgument, match=message):
        buffer.dispatch(x, **routing(buffer, 4))
    recv, *_ = buffer.dispatch(np.ones((4, 2)), **routing(buffer, 4))
    assert recv.sum() == 8


class Foreign:
    """A tensor of a framework nobody has heard of."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_objects_with_dlpack_only_come_back_as_such(buffer: ep.Buffer) -> None:
    topk_idx = np.array([[0, 3], [2, -1]])
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(Foreign(topk_idx), 4)
    assert per_node is None
    assert isinstance(in_rank, ep.DLPackArray)
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    recv, recv_idx, recv_w, _, handle, _ = buffer.dispatch(
        Foreign(x),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=Foreign(topk_idx),
        topk_weights=Foreign(np.ones((2, 2), np.float32)),
    )
    assert (recv.shape, recv.dtype, len(recv)) == ((2, 5), "float32", 2)
    assert repr(recv) == "<mscclpp_ep.DLPackArray float32[2, 5]>"
    np.testing.assert_array_equal(np.from_dlpack(recv), x)
    np.testing.assert_array_equal(recv_idx, topk_idx)
    np.testing.assert_array_equal(np.from_dlpack(handle[0]), [[2]])
    out, weights, _ = buffer.combine(recv, handle, topk_weights=recv_w)
    assert isinstance(out, ep.DLPackArray)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(weights, [[1, 1], [1, 0]])


def test_dlpack_results_as_numpy_arrays(buffer: ep.Buffer) -> None:
    tensor = buffer._core.empty([2, 3], _core.DataType.float32, True)
    result = _frameworks.framework_of(Foreign(np.zeros(1))).export(tensor)
    plain = np.asarray(result)
    plain[:] = 7
    assert np.shares_memory(plain, np.from_dlpack(result))
    assert not np.shares_memory(plain, np.array(result))
    assert np.asarray(result, np.float64).tolist() == [[7.0] * 3] * 2
    with pytest.raises(ValueError, match="only by a copy"):
        np.asarray(result, np.float64, copy=False)


def test_dlpack_results_of_types_that_numpy_lacks() -> None:
    program = """
import numpy as np, mscclpp_ep as ep
from mscclpp_ep import _core, _frameworks
class Foreign:
    def __dlpack__(self): pass
with ep.Buffer(ep.Group.local(1)[0]) as b:
    tensor = b._core.empty([2, 3], _core.DataType.bfloat16, True)
    result = _frameworks.framework_of(Foreign()).export(tensor)
    assert result.dtype == "bfloat16"
    try:
        np.asarray(result)
    except TypeError as error:
        assert "import ml_dtypes" in str(error)
    import ml_dtypes
    assert np.asarray(result).dtype == ml_dtypes.bfloat16
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_outputs_must_be_writable() -> None:
    array = np.zeros(3)
    assert _arguments.output_view("out", array).shape == [3]
    assert _arguments.output_view("out", None) is None
    array.flags.writeable = False
    with pytest.raises(ep.InvalidArgument, match="out cannot be used: the array is read-only"):
        _arguments.output_view("out", array)


def test_empty_takes_dtypes_by_name_and_refuses_others(buffer: ep.Buffer) -> None:
    assert buffer.empty((2, 3), "float32").dtype == np.float32
    assert buffer.empty([2], ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
    assert buffer.empty((0, 3), np.int32).shape == (0, 3)
    with pytest.raises(ep.InvalidArgument, match="dtype is complex64; it must be one of: bool"):
        buffer.empty((2,), np.complex64)
    with pytest.raises(ep.InvalidArgument, match=r"shape\[0\] is -1"):
        buffer.empty((-1,), np.int32)
    with pytest.raises(ep.InvalidArgument, match="5 dimensions"):
        buffer.empty((1, 1, 1, 1, 1), np.int32)


def test_nothing_imports_a_framework_that_the_caller_has_not() -> None:
    program = """
import sys, numpy as np, mscclpp_ep as ep
with ep.Buffer(ep.Group.local(1)[0]) as b:
    idx = np.zeros((3, 1), np.int64)
    per_rank, _, per_expert, in_rank, _ = b.get_dispatch_layout(idx, 2)
    out = b.dispatch(np.ones((3, 2), np.float32), num_tokens_per_rank=per_rank,
                     is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
    b.combine(out[0], out[4])
loaded = {"torch", "jax", "cupy", "ml_dtypes", "mpi4py", "tensorflow"} & set(sys.modules)
sys.exit(", ".join(loaded) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
