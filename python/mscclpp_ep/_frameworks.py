"""Tensors of the caller's framework, in and out. Imports none that the caller has not imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mscclpp_ep import _core
from mscclpp_ep._devices import CPU, cupy_stream, gpu_of, torch_stream
from mscclpp_ep._dlpack_array import DLPackArray, as_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

# A tensor of any framework: what it has in common with others is __dlpack__ only.
Array: TypeAlias = Any

_DTYPES: dict[str, _core.DataType] = {dtype.name: dtype for dtype in _core.DataType}
# NumPy's __dlpack__ refuses the types that ml_dtypes adds; they pass as integers of their size.
_INTEGERS = {1: np.uint8, 2: np.uint16}
_FIRST_USER_TYPE = 256  # of NumPy's numbers of dtypes: those that it has not itself
_JAX_PLATFORMS = {"cpu", "cuda", "gpu"}
_DLPACK_CPU = 1


class Framework:
    """How one framework's tensors are imported, exported and described."""

    name = "array API"
    has_streams = True  # if not, its arrays are complete, and so must be those it is given

    def __init__(self, namespace: Any) -> None:
        """Of a module."""
        self._namespace = namespace

    def current_stream(self, gpu: int) -> Any:
        """The framework's current stream on a GPU: a cudaStream_t, or an object that keeps it.

        The legacy default stream, if the framework does not tell.
        """
        del gpu
        return 0

    def record_use(self, arrays: Sequence[Array | None], stream: int, gpu: int) -> bool:
        """Lets the framework's allocator know that a stream uses tensors; False if it cannot."""
        del arrays, stream, gpu
        return False

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

    def small_arrays(self, values: Sequence[np.ndarray]) -> list[Array]:
        """Makes arrays of the framework with the given values, on the CPU."""
        return [self._namespace.asarray(array) for array in values]

    def zeros(self, num_bytes: int, dtype: Any, device: str) -> Array:
        """Makes an array of so many bytes, which are 0, of the framework's dtype, on a device."""
        del device
        # As bytes at first, since NumPy lacks dtypes that others have.
        (zeros,) = self.small_arrays([np.zeros(num_bytes, np.uint8)])
        return zeros.view(dtype)

    def copy_to_host(self, array: Array) -> np.ndarray:
        """Copies a tensor of integers."""
        if hasattr(array, "__array__"):
            return np.array(array)
        if array.__dlpack_device__()[0] == _DLPACK_CPU:
            return np.array(np.from_dlpack(array))
        return np.from_dlpack(array, device="cpu", copy=True)


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

    def small_arrays(self, values: Sequence[np.ndarray]) -> list[Array]:
        return list(values)


class _Torch(Framework):
    name = "torch"

    def current_stream(self, gpu: int) -> Any:
        return torch_stream(self._namespace, gpu)  # which is never destroyed

    def record_use(self, arrays: Sequence[Array | None], stream: int, gpu: int) -> bool:
        user = self._namespace.cuda.ExternalStream(stream, device=gpu)
        for array in arrays:
            if isinstance(array, self._namespace.Tensor):
                array.record_stream(user)
        return True

    def view(self, array: Array) -> _core.View:
        return _core.View(array.detach() if array.requires_grad else array)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        del dtype
        exported = tensor.export_as(self._namespace.Tensor)
        return tensor.export("torch") if exported is None else exported

    def small_arrays(self, values: Sequence[np.ndarray]) -> list[Array]:
        return [self._namespace.from_numpy(array) for array in values]

    def zeros(self, num_bytes: int, dtype: Any, device: str) -> Array:
        zeros = self._namespace.zeros(num_bytes, dtype=self._namespace.uint8, device=device)
        return zeros.view(dtype)

    def copy_to_host(self, array: Array) -> np.ndarray:
        return np.array(array.detach().cpu())


class _Cupy(Framework):
    """Arrays of CuPy, of the types that it can export and import."""

    name = "cupy"

    def current_stream(self, gpu: int) -> Any:
        return cupy_stream(self._namespace, gpu)

    def small_arrays(self, values: Sequence[np.ndarray]) -> list[Array]:
        return list(values)

    def zeros(self, num_bytes: int, dtype: Any, device: str) -> Array:
        with self._namespace.cuda.Device(gpu_of(device)):
            return self._namespace.zeros(num_bytes, np.uint8).view(dtype)

    def copy_to_host(self, array: Array) -> np.ndarray:
        host: np.ndarray = self._namespace.asnumpy(array)
        return host


class _Jax(Framework):
    """Arrays of one device, outside of any trace; results go to that device.

    There is no current stream: arrays are waited for, and results are complete.
    """

    name = "jax"
    has_streams = False

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
        if self._devices[0].platform not in _JAX_PLATFORMS:
            msg = (
                f"it is on {self._devices[0]}; this version takes arrays of the CPU or of a CUDA "
                'GPU: jax.device_put(x, jax.devices("cpu")[0])'
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

    def small_arrays(self, values: Sequence[np.ndarray]) -> list[Array]:
        target = self._devices[0]
        if target.platform != "cpu":
            target = self._namespace.devices("cpu")[0]
        return [self._namespace.device_put(array, target) for array in values]


class _Dlpack(Framework):
    """Objects with `__dlpack__` of no framework that can be found out."""

    name = "dlpack"

    def __init__(self) -> None:
        super().__init__(None)

    def export(self, tensor: _core.Tensor, dtype: Any = None) -> Array:
        del dtype
        exporter = tensor.export("dlpack")
        on_cpu = exporter.__dlpack_device__()[0] == _DLPACK_CPU
        raw = tensor.export("numpy") if on_cpu else None
        return DLPackArray(exporter, raw, tensor.dtype.name, tuple(tensor.shape))

    def small_arrays(self, values: Sequence[np.ndarray]) -> list[Array]:
        return [DLPackArray(array, array, array.dtype.name, array.shape) for array in values]

    def zeros(self, num_bytes: int, dtype: Any, device: str) -> Array:
        del num_bytes
        msg = f"dtype is {dtype!r}; on {device} it must be one of Torch, or CuPy must be imported"
        raise _core.InvalidArgument(msg)


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
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return _Cupy(cupy)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        return _Jax(jax, array)
    if hasattr(array, "__dlpack__"):
        if hasattr(array, "__array_namespace__"):
            return Framework(array.__array_namespace__())
        return _DLPACK
    msg = (
        f"a {type(array).__name__} was given; a tensor with DLPack is needed: "
        "NumPy, Torch, CuPy, JAX, or any object with __dlpack__"
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


def resolve_dtype(dtype: Any, device: str) -> tuple[Framework, _core.DataType]:
    """The framework that makes tensors of a dtype on a device, and what the dtype is here.

    On a GPU dtypes of NumPy are CuPy's, if that is imported; others are of no framework.

    Raises:
        InvalidArgument: It is unknown or not supported.
    """
    torch = _torch_framework()
    if torch is not None and isinstance(dtype, torch._namespace.dtype):
        framework: Framework = torch
        name = str(dtype).removeprefix("torch.")
    else:
        try:
            wanted = np.dtype(dtype)
        except TypeError as error:
            msg = f"dtype is {dtype!r}; it must be a dtype of NumPy, ml_dtypes or Torch"
            raise _core.InvalidArgument(msg) from error
        # For JAX's types too, as its arrays cannot be written to.
        framework = _NUMPY if device == CPU else _on_gpu(wanted)
        name = wanted.name
    if name not in _DTYPES:
        msg = f"dtype is {name}; it must be one of: {', '.join(_DTYPES)}"
        raise _core.InvalidArgument(msg)
    return framework, _DTYPES[name]


def _on_gpu(dtype: np.dtype) -> Framework:
    cupy = sys.modules.get("cupy")
    return _DLPACK if cupy is None or dtype.num >= _FIRST_USER_TYPE else _Cupy(cupy)


def dtype_of(array: Array) -> Any:
    """What the caller's framework calls the type of the elements, if it says."""
    return getattr(array, "dtype", None)
