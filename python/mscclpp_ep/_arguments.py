"""Arguments of Python calls: what the C++ library cannot check, as it cannot be told it."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NoReturn

from mscclpp_ep import _core, _frameworks
from mscclpp_ep._core import Config, InvalidArgument, NotBuilt, Quantization
from mscclpp_ep._devices import CPU, gpu_of, stream_handle
from mscclpp_ep.event import EventHandle, EventOverlap
from mscclpp_ep.handle import DispatchHandle, LowLatencyHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mscclpp_ep._frameworks import Array, Framework


def not_built(feature: str) -> NoReturn:
    """Raises NotBuilt."""
    msg = f"{feature} is not in this version of mscclpp_ep"
    raise NotBuilt(msg)


def unbuilt(name: str) -> Callable[..., NoReturn]:
    """A method of DeepEP's that is not there yet: it can be found, and says so when called."""

    def method(*args: object, **kwargs: object) -> NoReturn:
        del args, kwargs
        not_built(name)

    method.__name__ = name
    method.__doc__ = "Not in this version: raises `NotBuilt`."
    return method


def integer(name: str, value: Any, bits: int = 63) -> int:
    """An integer of the C++ library, of so many bits beside the sign."""
    try:
        result = operator.index(value)
    except TypeError as error:
        msg = f"{name} is {value!r}; it must be an integer"
        raise InvalidArgument(msg) from error
    if not -(2**bits) <= result < 2**bits:
        msg = f"{name} is {result}; it must be between -2^{bits} and 2^{bits}"
        raise InvalidArgument(msg)
    return result


def file_name(name: str, value: Any) -> str:
    """The name of a file; empty for None."""
    if value is None:
        return ""
    try:
        result = os.fspath(value)
        usable = isinstance(result, str) and result.encode() != b""
    except (TypeError, ValueError):
        usable = False
    if not usable:
        msg = f"{name} is {value!r}; it must be the path of a file, in UTF-8"
        raise InvalidArgument(msg)
    return str(result)


def number(name: str, value: Any) -> float:
    """A float."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        msg = f"{name} is {value!r}; it must be a number"
        raise InvalidArgument(msg) from error


def check_stream(device: str, stream: object) -> None:
    """A stream of a buffer's device, or None."""
    if stream is None:
        return
    if device == CPU:
        msg = f"stream is {stream!r}; a buffer on the CPU takes None"
        raise InvalidArgument(msg)
    stream_handle(stream)


def check_call(
    previous_event: EventOverlap | EventHandle | None,
    async_finish: bool,
    allocate_on_comm_stream: bool,
    stream: object,
    device: str,
) -> None:
    """What orders a call with other work."""
    check_stream(device, stream)
    event = _event_of(previous_event)
    if device != CPU and not (event is None or isinstance(event, EventHandle)):
        msg = (
            f"previous_event is a {type(event).__name__}; it must be an EventOverlap, an "
            "EventHandle or None"
        )
        raise InvalidArgument(msg)
    if allocate_on_comm_stream and not (async_finish and previous_event is not None):
        msg = "allocate_on_comm_stream=True needs async_finish=True and a previous_event"
        raise InvalidArgument(msg)


class Streams:
    """The streams that a buffer was given, which it keeps, as it looks at them later."""

    _MOST = 32

    def __init__(self) -> None:
        """Of a new buffer."""
        self._kept: OrderedDict[int, object] = OrderedDict()

    def keep(self, core: _core.Buffer, stream: Any) -> int:
        """Notes a stream, and returns its handle. Of many, the one used least recently goes."""
        handle = stream_handle(stream)
        self._kept[handle] = stream
        self._kept.move_to_end(handle)
        if len(self._kept) > self._MOST:
            oldest, owner = self._kept.popitem(last=False)
            core.forget_stream(oldest)
            del owner
        return handle


def order_call(
    framework: Framework,
    previous_event: EventOverlap | EventHandle | None,
    async_finish: bool,
    stream: Any,
    device: str,
    core: _core.Buffer,
    streams: Streams,
    num_sms: int = 0,
) -> _core.Ordering:
    """How a call is ordered with the caller's other work."""
    event = _event_of(previous_event)
    if device == CPU:
        if isinstance(event, EventHandle):
            event.synchronize()
        return _core.Ordering()
    return _core.Ordering(
        stream=streams.keep(
            core, framework.current_stream(gpu_of(device)) if stream is None else stream
        ),
        previous=event.core if isinstance(event, EventHandle) else None,
        asynchronous=async_finish,
        num_sms=num_sms,
    )


def _event_of(event: object) -> object:
    return event.event if isinstance(event, EventOverlap) else event


def unpack_config(config: object, default: int) -> int:
    """The multiprocessors that a call may use: of a Config that tells, or else by default."""
    if config is None:
        return default
    if not isinstance(config, Config):
        msg = f"config is a {type(config).__name__}; it must be a Config or None"
        raise InvalidArgument(msg)
    return config.num_sms if config.num_sms > 0 else default


def unpack_x(x: Array | tuple[Array, Array]) -> tuple[Array, Array | None]:
    """The rows and their scales, if there are any."""
    if not isinstance(x, tuple):
        return x, None
    if len(x) != 2:
        msg = f"x is a tuple of {len(x)}; it must be a tensor, or a pair of one and its scales"
        raise InvalidArgument(msg)
    return x


def check_given(name: str, array: object, shape: str) -> None:
    """An argument without which there is no call."""
    if array is None:
        msg = f"{name} is missing; it must be {shape}"
        raise InvalidArgument(msg)


def check_handle(handle: object) -> None:
    """A handle that dispatch made."""
    if not isinstance(handle, DispatchHandle) or not hasattr(handle, "core"):
        msg = f"handle is a {type(handle).__name__}; it must be what dispatch returned"
        raise InvalidArgument(msg)


def check_low_latency_handle(handle: object) -> None:
    """A handle that low_latency_dispatch made."""
    if not isinstance(handle, LowLatencyHandle):
        msg = f"handle is a {type(handle).__name__}; it must be what low_latency_dispatch returned"
        raise InvalidArgument(msg)


def check_deferred(framework: Framework, return_recv_hook: bool) -> None:
    """A framework whose tensors may be filled after they were returned."""
    if return_recv_hook and framework.name == "jax":
        msg = "return_recv_hook needs tensors that are filled later; a JAX array never changes"
        raise InvalidArgument(msg)


def unpack_quantization(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Quantization:
    """How rows are sent."""
    if use_ue8m0 and not round_scale:
        msg = "use_ue8m0=True needs round_scale=True: an exponent can only say a power of two"
        raise InvalidArgument(msg)
    if not use_fp8:
        return Quantization.none
    if use_ue8m0:
        return Quantization.float8_ue8m0
    return Quantization.float8_rounded if round_scale else Quantization.float8


def check_cached(num_worst_tokens: int, **routing: object) -> None:
    """What must be left out when routing is repeated."""
    given = [name for name, value in routing.items() if value is not None]
    if num_worst_tokens != 0:
        given.append("num_worst_tokens")
    if given:
        msg = f"{' and '.join(given)} must be left out when a handle is given"
        raise InvalidArgument(msg)


def scratch_array(
    dtype: Any, size: Sequence[int] | None, offset: int, num_bytes: int, device: str
) -> Array:
    """Zeros of a dtype and shape on a device, in the place of a part of so many bytes."""
    framework, kind = _frameworks.resolve_dtype(dtype, device)
    left = num_bytes - integer("offset", offset)
    if not 0 <= left <= num_bytes:
        msg = f"offset is {offset}; it must be from 0 to the size of the buffer, {num_bytes} bytes"
        raise InvalidArgument(msg)
    itemsize = _core.item_size(kind)
    shape = [left // itemsize] if size is None else [integer("size", extent) for extent in size]
    wanted = math.prod(shape) * itemsize
    if min(shape, default=0) < 0 or wanted > left:
        msg = f"size is {shape}, {wanted} bytes; {left} of the buffer's {num_bytes} bytes are left"
        raise InvalidArgument(msg)
    return framework.zeros(wanted, dtype, device).reshape(shape)


def view(name: str, array: Array | None) -> Any:
    """Imports a tensor; errors name the argument."""
    return _imported(_frameworks.view, name, array)


def views_of(arrays: dict[str, Array | None]) -> _core.Views:
    """Imports tensors; errors name the argument. Those of Torch without a detour."""
    torch = sys.modules.get("torch")
    tensor: Any = None if torch is None else torch.Tensor
    try:
        return _core.Views(
            [
                array
                if array is None or (type(array) is tensor and not array.requires_grad)
                else view(name, array)
                for name, array in arrays.items()
            ]
        )
    except _core.InvalidArgument:
        return _core.Views([view(name, array) for name, array in arrays.items()])


def output_view(name: str, array: Array | None) -> Any:
    """Imports a tensor that will be written to; errors name the argument."""
    return _imported(_frameworks.output_view, name, array)


def _imported(convert: Callable[[Array], Any], name: str, array: Array | None) -> Any:
    if array is None:
        return None
    try:
        return convert(array)
    except Exception as error:
        msg = f"{name} cannot be used: {error}"
        raise InvalidArgument(msg) from error
