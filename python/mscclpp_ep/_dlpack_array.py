"""Results for callers whose tensors have `__dlpack__`, and nothing that names a framework."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


class DLPackArray:
    """A result, for any framework's `from_dlpack` or for `numpy.asarray`; neither copies.

    On a GPU it is for `from_dlpack` only. Comes back where the tensors given have `__dlpack__` but
    are of no framework known here, and may itself be given to every call.

    Attributes:
        shape: Extents.
        dtype: Name of the element type, such as "bfloat16".
    """

    def __init__(
        self, exporter: Any, raw: np.ndarray | None, dtype: str, shape: tuple[int, ...]
    ) -> None:
        """Made by the library: `raw` has the elements as NumPy can hold them; None: on a GPU."""
        self._exporter = exporter
        self._raw = raw
        self.shape = shape
        self.dtype = dtype

    def __dlpack__(self, **kwargs: Any) -> Any:
        """Return a DLPack capsule over the memory; arguments as in the array API standard."""
        return self._exporter.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's type and number of the device."""
        device: tuple[int, int] = self._exporter.__dlpack_device__()
        return device

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return a NumPy array over the memory.

        Raises:
            TypeError: The memory is on a GPU; or NumPy does not know the element type, and
                ml_dtypes is not imported.
        """
        if self._raw is None:
            msg = "it is on a GPU, where NumPy has no arrays; use from_dlpack of a framework"
            raise TypeError(msg)
        array = as_dtype(self._raw, self.dtype)
        if array.dtype.name != self.dtype:
            msg = f"NumPy has no {self.dtype}; import ml_dtypes, or use from_dlpack of a framework"
            raise TypeError(msg)
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                msg = f"elements of {self.dtype} become {np.dtype(dtype)} only by a copy"
                raise ValueError(msg)
            return array.astype(dtype)
        return array.copy() if copy else array

    def __len__(self) -> int:
        """Return the first extent."""
        return self.shape[0]

    def __repr__(self) -> str:
        """Return type and shape."""
        return f"<mscclpp_ep.DLPackArray {self.dtype}{list(self.shape)}>"


def as_dtype(raw: np.ndarray, name: str) -> np.ndarray:
    """View integers as the type of ml_dtypes that they stand for, if that is imported."""
    if raw.dtype.name == name or "ml_dtypes" not in sys.modules:
        return raw
    return raw.view(np.dtype(getattr(sys.modules["ml_dtypes"], name)))
