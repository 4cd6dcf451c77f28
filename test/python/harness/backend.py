# SPDX-License-Identifier: MIT
"""Where a suite runs: how a backend's buffers and arrays are made and read back.

A further backend is one more class here; cases, programs and the oracle stay as they are.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np


class Cpu:
    """Buffers in shared memory, tensors as NumPy arrays."""

    name = "cpu"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def options(self) -> dict:
        """Arguments that a Buffer of this backend needs."""
        return {"device": "cpu"}

    def array(self, host: np.ndarray | None):
        """A tensor of the backend with the shape, strides and bytes of `host`."""
        return host

    def host(self, tensor) -> np.ndarray:
        """The bytes of `tensor` as they are now."""
        return np.asarray(tensor)

    def copy(self, tensor):
        """A copy that is made without a wait of the host for what this rank has been given."""
        return np.array(tensor)

    def synchronize(self) -> None:
        """Waits for all work that this rank has been given."""

    def delay(self) -> None:
        """Makes what comes next on this rank's stream, if there is one, come late."""

    def write(self, tensor, values) -> None:
        """Writes to a tensor of the library's."""
        np.asarray(tensor)[...] = values

    def dtype(self, dtype: np.dtype | type):
        """What the framework of the tensors calls a dtype."""
        return dtype

    def read_only(self, tensor):
        """A copy that the framework lets nobody write to, if it can."""
        copy = self.copy(tensor)
        copy.setflags(write=False)
        return copy


# Types that every framework copies bit by bit, by their size.
INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
DELAY, LONG_DELAY = 200_000, 500_000_000  # cycles of a GPU


class Cuda:
    """Buffers on a GPU, tensors of Torch; ranks beyond the number of GPUs share them.

    Made in the thread of its rank, whose current GPU and stream, not the default one, it sets.
    """

    name = "cuda"

    def __init__(self, rank: int) -> None:
        import torch

        self.rank, self.torch = rank, torch
        self.device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def options(self) -> dict:
        return {"device": str(self.device)}

    def array(self, host: np.ndarray | None):
        # Written by the stream, a little later: a call that does not wait for it reads garbage.
        if host is None:
            return None
        raw = self._raw(host)
        strides = [stride // host.itemsize for stride in host.strides]
        tensor = self.torch.empty_strided(host.shape, strides, dtype=raw.dtype, device=self.device)
        self._write_late(tensor, raw)
        return tensor.view(self.dtype(host.dtype))

    def host(self, tensor) -> np.ndarray:
        if not isinstance(tensor, self.torch.Tensor):
            return np.asarray(tensor)
        assert tensor.device == self.device, f"a tensor on {tensor.device}, not {self.device}"
        name = str(tensor.dtype).removeprefix("torch.")
        raw = tensor.detach().view(self._integer(tensor.itemsize)).cpu().numpy()
        return raw.view(np.dtype(getattr(ml_dtypes, name, name)))

    def copy(self, tensor):
        return tensor.clone()

    def synchronize(self) -> None:
        self.torch.cuda.current_stream().synchronize()

    def delay(self) -> None:
        self.torch.cuda._sleep(LONG_DELAY)

    def write(self, tensor, values) -> None:
        name = str(tensor.dtype).removeprefix("torch.")
        host = np.empty(tensor.shape, np.dtype(getattr(ml_dtypes, name, name)))
        host[...] = values
        self._write_late(tensor.view(self._integer(tensor.itemsize)), self._raw(host))

    def dtype(self, dtype: np.dtype | type):
        return getattr(self.torch, np.dtype(dtype).name)

    def read_only(self, tensor):
        return tensor

    def _integer(self, itemsize: int):
        return getattr(self.torch, INTEGERS[itemsize])

    def _raw(self, host: np.ndarray):
        """A copy on the GPU of the bytes, contiguous."""
        raw = np.array(host, order="C").view(INTEGERS[host.itemsize])
        return self.torch.from_numpy(raw).to(self.device)

    def _write_late(self, tensor, raw) -> None:
        self.torch.cuda._sleep(DELAY)
        tensor.copy_(raw)


BACKENDS = {backend.name: backend for backend in (Cpu, Cuda)}
