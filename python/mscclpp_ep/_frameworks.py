"""Tensors of the caller's framework, in and out. Imports none that the caller has not imported."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

from mscclpp_ep import _core
from mscclpp_ep._dlpack_array import DLPackArray, as_dtype

# A tensor of any framework: what it has in common with others is __dlpack__ only.
Array: TypeAlias = Any

_DTYPES: dict[str, _core.DataType] = {dtype.name: dtype for dtype in _core.DataType}
# NumPy's __dlpack__ refuses the types that ml_dtypes adds; they pass as integers of their size.
_INTEGERS = {1: np.uint8, 2: np.uint16}
_FIRST_USER_TYPE = 256  # of NumPy's numbers of dtypes: those that it has not itself


class Framework:
    """How one framework's tensors are imported, exported and described."""

    name = "array API"

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def view(self, array: Array) -> _core.View:
        """Imports a tensor without a copy."""
        return _core.View(array)

    def output_view(self, array: Array) -> _core.View:
        """Imports a tensor that will be written to.

        Raises:
            InvalidArgument: The framework forbids it.
        """
        return self.view(array)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        """Makes a tensor of the framework over the buffer's memory.

        `dtype` is the caller's own, for frameworks that cannot import it by DLPack.
        """
        del dtype
        return self._namespace.from_dlpack(tensor.export("dlpack"))

    def small_array(self, values: np.ndarray) -> Array:
        """Makes an array of the framework with the given values."""
        return self._namespace.asarray(values)


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

    def output_view(self, array: Array) -> _core.View:
        if not array.flags.writeable:
            msg = "the array is read-only, and would be written to"
            raise _core.InvalidArgument(msg)
        return self.view(array)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        array = tensor.export("numpy")
        if array.dtype.name == tensor.dtype.name:
            return array
        if isinstance(dtype, np.dtype) and dtype.name == tensor.dtype.name:
            return array.view(dtype)
        return as_dtype(array, tensor.dtype.name)

    def small_array(self, values: np.ndarray) -> Array:
        return values


class _Torch(Framework):
    name = "torch"

    def view(self, array: Array) -> _core.View:
        return _core.View(array.detach() if array.requires_grad else array)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        del dtype
        return tensor.export("torch")

    def small_array(self, values: np.ndarray) -> Array:
        return self._namespace.from_numpy(values)


class _Jax(Framework):
    """Arrays of one CPU device, outside of any trace; results go to that device."""

    name = "jax"

    def __init__(self, namespace: Any, array: Array) -> None:
        super().__init__(namespace)
        traced = isinstance(array, namespace.core.Tracer)
        self._devices = [] if traced else sorted(array.sharding.device_set, key=lambda d: d.id)

    def view(self, array: Array) -> _core.View:
        if not self._devices:
            msg = (
                "it is being traced by JAX, and has no values yet; call the buffer outside of "
                "jax.jit, jax.grad, jax.vmap and the like, between functions that are compiled"
            )
            raise _core.InvalidArgument(msg)
        if len(self._devices) > 1:
            msg = (
                f"it is sharded over {len(self._devices)} devices; a rank takes what one device "
                "holds: pass x.addressable_shards[i].data"
            )
            raise _core.InvalidArgument(msg)
        if self._devices[0].platform != "cpu":
            msg = (
                f"it is on {self._devices[0]}; this version takes arrays of the CPU: "
                'jax.device_put(x, jax.devices("cpu")[0])'
            )
            raise _core.InvalidArgument(msg)
        # JAX computes behind the caller's back; here it is waited for without the GIL.
        return _core.View(array.block_until_ready())

    def output_view(self, array: Array) -> _core.View:
        del array
        msg = "it is a JAX array, which is never written to; leave it out, a result is made anew"
        raise _core.InvalidArgument(msg)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        del dtype
        # No copy if the memory is aligned to 64 bytes and the device is the first.
        exported = tensor.export("dlpack")
        return self._namespace.numpy.from_dlpack(exported, device=self._devices[0])

    def small_array(self, values: np.ndarray) -> Array:
        return self._namespace.device_put(values, self._devices[0])


class _Dlpack(Framework):
    """Objects with `__dlpack__` of no framework that can be found out."""

    name = "dlpack"

    def __init__(self) -> None:
        super().__init__(None)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        del dtype
        return DLPackArray(tensor.export("dlpack"), tensor.export("numpy"), tensor.dtype.name)

    def small_array(self, values: np.ndarray) -> Array:
        return DLPackArray(values, values, values.dtype.name)


_NUMPY = _NumPy()
_DLPACK = _Dlpack()
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
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        return _Jax(jax, array)
    if hasattr(array, "__dlpack__"):
        if hasattr(array, "__array_namespace__"):
            return Framework(array.__array_namespace__())
        return _DLPACK
    msg = (
        f"a {type(array).__name__} was given; a tensor with DLPack is needed: "
        "NumPy, Torch, JAX, or any object with __dlpack__"
    )
    raise _core.InvalidArgument(msg)


def view(array: Array) -> _core.View:
    """Imports a tensor of any framework.

    Raises:
        InvalidArgument: It cannot be imported.
    """
    return framework_of(array).view(array)


def output_view(array: Array) -> _core.View:
    """Imports a tensor of any framework that will be written to.

    Raises:
        InvalidArgument: It cannot be imported, or may not be written to.
    """
    return framework_of(array).output_view(array)


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
        framework = _NUMPY  # for JAX's types too, as its arrays cannot be written to
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
    return framework.small_array(values)


def dtype_of(array: Array) -> Any:
    """What the caller's framework calls the type of the elements, if it says."""
    return getattr(array, "dtype", None)
