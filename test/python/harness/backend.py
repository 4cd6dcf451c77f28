# SPDX-License-Identifier: MIT
"""Where a suite runs: how a backend's buffers and arrays are made and read back.

A further backend is one more class here; cases, programs and the oracle stay as they are.
"""

from __future__ import annotations

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


BACKENDS = {backend.name: backend for backend in (Cpu,)}
