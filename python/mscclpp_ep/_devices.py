# SPDX-License-Identifier: MIT
"""Devices and streams, as the caller's framework has them. Imports none that it has not."""

from __future__ import annotations

import functools
import operator
import os
import re
import sys
from typing import Any

from mscclpp_ep import _core
from mscclpp_ep._core import InvalidArgument

CPU = "cpu"
DEVICE_VARIABLE = "MSCCLPP_EP_DEVICE"
_CHOICES = '"cpu", "cuda" or "cuda:N"'


def device_name(device: Any) -> str:
    """The device of a buffer: "cpu" or "cuda:N".

    None is what the environment variable MSCCLPP_EP_DEVICE says, or else the current GPU, or the
    CPU if there is no GPU or the build has no CUDA.

    Raises:
        InvalidArgument: It is no device.
    """
    said = os.environ.get(DEVICE_VARIABLE, "") if device is None else str(device)
    if device is None and not said:
        return f"cuda:{_current_gpu()}" if _core.cuda_device_count() > 0 else CPU
    if said == CPU or re.fullmatch(r"cuda:\d+", said, re.ASCII):
        return said
    if said == "cuda":
        return f"cuda:{_current_gpu()}"
    given = f"{DEVICE_VARIABLE} is {said!r}" if device is None else f"device is {device!r}"
    msg = f"{given}; it must be {_CHOICES}"
    raise InvalidArgument(msg)


@functools.cache
def gpu_of(device: str) -> int:
    """The number of a buffer's GPU; 0 on the CPU."""
    return int(device.partition(":")[2] or 0)


def _current_gpu() -> int:
    """The GPU that this process, or thread, uses so far, or should: of those of its host."""
    torch = torch_with_cuda()
    if torch is not None:
        return int(torch.cuda.current_device())
    local_rank = os.environ.get("LOCAL_RANK", "")
    if local_rank.isdecimal():
        return int(local_rank) % max(_core.cuda_device_count(), 1)
    cupy = cupy_with_cuda()
    return 0 if cupy is None else int(cupy.cuda.runtime.getDevice())


def torch_with_cuda() -> Any:
    """The module of Torch, if the process uses it on a GPU; else None."""
    torch = sys.modules.get("torch")
    # Whether there could be one is not asked: that takes long, and begins to use it.
    return torch if torch is not None and torch.cuda.is_initialized() else None


def cupy_with_cuda() -> Any:
    """The module of CuPy, if it is imported and there is a GPU; else None."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and cupy.cuda.is_available() else None


def torch_stream(torch: Any, gpu: int) -> int:
    """Torch's current stream on a GPU, as a cudaStream_t."""
    if not torch.cuda.is_initialized():
        return 0
    stream = _core.current_stream(torch.Tensor, gpu)
    return int(torch.cuda.current_stream(gpu).cuda_stream) if stream is None else stream


def cupy_stream(cupy: Any, gpu: int) -> Any:
    """CuPy's current stream on a GPU, an object that keeps it."""
    with cupy.cuda.Device(gpu):
        return cupy.cuda.get_current_stream()


def current_stream() -> tuple[int, int] | None:
    """The current stream of Torch, or else of CuPy, and its GPU; None if neither uses one."""
    torch = torch_with_cuda()
    if torch is not None:
        gpu = int(torch.cuda.current_device())
        return torch_stream(torch, gpu), gpu
    cupy = cupy_with_cuda()
    if cupy is not None:
        gpu = int(cupy.cuda.runtime.getDevice())
        return stream_handle(cupy_stream(cupy, gpu)), gpu
    return None


def current_stream_on(gpu: int) -> Any:
    """The current stream on a GPU, of Torch, or else of CuPy, or the default stream.

    A cudaStream_t that is never destroyed, or an object that keeps it.
    """
    torch = torch_with_cuda()
    if torch is not None:
        return torch_stream(torch, gpu)
    cupy = cupy_with_cuda()
    return 0 if cupy is None else cupy_stream(cupy, gpu)


def stream_handle(stream: Any) -> int:
    """The cudaStream_t of a stream of any framework.

    Raises:
        InvalidArgument: It is no stream.
    """
    try:
        handle = _handle_in(stream)
    except (TypeError, ValueError, IndexError):
        handle = None
    if handle is None or not 0 <= handle < 2**64:
        msg = (
            f"stream is {stream!r}; it must be a cudaStream_t as an integer, a stream of Torch or "
            "CuPy, or an object with __cuda_stream__"
        )
        raise InvalidArgument(msg)
    return handle


def _handle_in(stream: Any) -> int | None:
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        # (version, handle): what a method returns, or at first what an attribute was.
        return operator.index((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if handle is not None:
            return operator.index(handle)
    return None if isinstance(stream, bool) else operator.index(stream)


class CommStream:
    """A stream of the library, for any framework that takes an object with `__cuda_stream__`."""

    def __init__(self, handle: int) -> None:
        """Made by the library."""
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol, and the cudaStream_t."""
        return 0, self._handle

    def __repr__(self) -> str:
        """Return the handle."""
        return f"<mscclpp_ep.CommStream {self._handle:#x}>"


def comm_stream(handle: int, gpu: int) -> Any:
    """A stream of the library, as Torch's if that uses a GPU."""
    torch = torch_with_cuda()
    if torch is None:
        return CommStream(handle)
    return torch.cuda.ExternalStream(handle, device=gpu)
