# SPDX-License-Identifier: MIT
"""Copies between NumPy and memory of a GPU, without a framework: by the driver, through ctypes."""

import ctypes
from typing import Any

import numpy as np

_LIBRARY = "libcuda.so.1"
_DLPACK_NAME = b"dltensor"


class _DLTensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


def address_of(array: Any) -> int:
    """The address of the elements of an object with `__dlpack__`."""
    capsule = array.__dlpack__()
    unpack = ctypes.pythonapi.PyCapsule_GetPointer
    unpack.restype = ctypes.c_void_p
    unpack.argtypes = (ctypes.py_object, ctypes.c_char_p)
    # A DLManagedTensor begins with its DLTensor.
    tensor = _DLTensor.from_address(unpack(capsule, _DLPACK_NAME))
    return int(tensor.data or 0) + int(tensor.byte_offset)


class GpuMemory:
    """Copies of one GPU, in the context that the CUDA runtime uses."""

    def __init__(self, gpu: int) -> None:
        self._driver = ctypes.CDLL(_LIBRARY)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(gpu))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} of {_LIBRARY} failed with CUresult {code}")

    def put(self, out: Any, values: np.ndarray) -> None:
        """Copy an array to an object with `__dlpack__`, of as many bytes."""
        host = np.ascontiguousarray(values)
        if host.nbytes:
            self._call(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(address_of(out)),
                ctypes.c_void_p(host.ctypes.data),
                ctypes.c_size_t(host.nbytes),
            )

    def get(self, array: Any, dtype: np.dtype) -> np.ndarray:
        """Return a copy of an object with `__dlpack__` and `shape`."""
        host = np.empty(array.shape, dtype)
        if host.nbytes:
            self._call(
                "cuMemcpyDtoH_v2",
                ctypes.c_void_p(host.ctypes.data),
                ctypes.c_uint64(address_of(array)),
                ctypes.c_size_t(host.nbytes),
            )
        return host
