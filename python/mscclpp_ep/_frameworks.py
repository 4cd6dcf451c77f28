"""Tensors of the caller's framework, in and out. Imports none that the caller has not imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mscclpp_ep import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

# A tensor of any framework: what it has in common with others is __dlpack__ only.
Array: TypeAlias = Any

_DTYPES: dict[str, _core.DataType] = {dtype.name: dtype for dtype in _core.DataType}
# NumPy's __dlpack__ refuses the types that ml_dtypes adds; they pass as integers of their size.
_INTEGERS = {1: np.uint8, 2: np.uint16}
_FIRST_USER_TYPE = 256  # of NumPy's numbers of dtypes: those that it has not itself


class Framework:
    """How one framework's tensors are imported, exported and described."""

    name = "dlpack"

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def view(self, array: Array) -> _core.View:
        """Imports a tensor without a copy."""
        return _core.View(array)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        """Makes a tensor of the framework over the buffer's memory.

        `dtype` is the framework's own, for those that it cannot import by DLPack.
        """
        del dtype
        return self._namespace.from_dlpack(tensor.export("dlpack"))


class _NumPy(Framework):
    name = "numpy"

    def __init__(self) -> None:
        super().__init__(np)

    def view(self, array: Array) -> _core.View:
        # By its number, as `isbuiltin` is 0 for dtypes that came through pickle.
        if array.dtype.num >= _FIRST_USER_TYPE or not array.dtype.isnative:
            known = _DTYPES.get(array.dtype.name) if array.dtype.isnative else None
            if known is None:
                msg = f"an array of dtype {array.dtype} was given, which is not supported"
                raise _core.InvalidArgument(msg)
            return _core.View(array.view(_INTEGERS[array.dtype.itemsize]), known)
        return _core.View(array)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        array = tensor.export("numpy")
        return array if dtype is None or array.dtype == dtype else array.view(dtype)


class _Torch(Framework):
    name = "torch"

    def view(self, array: Array) -> _core.View:
        return _core.View(array.detach() if array.requires_grad else array)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        del dtype
        return tensor.export("torch")


_NUMPY = _NumPy()
_torch: _Torch | None = None


def _torch_framework() -> _Torch | None:
    global _torch  # noqa: PLW0603 - found once; torch cannot be unloaded
    if _torch is None and "torch" in sys.modules:
        _torch = _Torch(sys.modules["torch"])
    return _torch


def framework_of(array: Array) -> Framework:
    """The framework to which a tensor belongs.

    Raises:
        InvalidArgument: It is no tensor.
    """
    if isinstance(array, np.ndarray):
        return _NUMPY
    torch = _torch_framework()
    if torch is not None and isinstance(array, torch._namespace.Tensor):
        return torch
    if hasattr(array, "__dlpack__") and hasattr(array, "__array_namespace__"):
        return Framework(array.__array_namespace__())
    msg = (
        f"a {type(array).__name__} was given; a tensor with DLPack is needed: "
        "NumPy, Torch, or any framework of the array API standard"
    )
    raise _core.InvalidArgument(msg)


def view(array: Array) -> _core.View:
    """Imports a tensor of any framework.

    Raises:
        InvalidArgument: It cannot be imported.
    """
    return framework_of(array).view(array)


def resolve_dtype(dtype: Any) -> tuple[Framework, _core.DataType]:
    """The framework to which a dtype belongs, and what it is here.

    Raises:
        InvalidArgument: It is unknown or not supported.
    """
    torch = _torch_framework()
    if torch is not None and isinstance(dtype, torch._namespace.dtype):
        framework: Framework = torch
        name = str(dtype).removeprefix("torch.")
    else:
        framework = _NUMPY
        try:
            name = np.dtype(dtype).name
        except TypeError as error:
            msg = f"dtype is {dtype!r}; it must be a dtype of NumPy, ml_dtypes or Torch"
            raise _core.InvalidArgument(msg) from error
    if name not in _DTYPES:
        msg = f"dtype is {name}; it must be one of: {', '.join(_DTYPES)}"
        raise _core.InvalidArgument(msg)
    return framework, _DTYPES[name]


def small_array(framework: Framework, values: np.ndarray) -> Array:
    """An array of the framework with the given values."""
    if isinstance(framework, _Torch):
        return framework._namespace.from_numpy(values)
    if isinstance(framework, _NumPy):
        return values
    return framework._namespace.asarray(values)


def shape_of(array: Array) -> Sequence[int]:
    """The extents of a tensor."""
    return tuple(array.shape)
