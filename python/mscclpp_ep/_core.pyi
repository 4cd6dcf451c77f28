"""
The C++ library, as mscclpp_ep's Python code calls it. Not a public interface.
"""

from collections.abc import Sequence
import enum
from typing import Any, Protocol



class DLPackCompatible(Protocol):
    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def build_info() -> dict[str, str]:
    """What this build has; "no" for what it lacks."""

def is_cuda_built() -> bool:
    """Whether this build has the CUDA backend."""

def cuda_devices() -> list[dict[str, Any]]:
    """What the GPUs of this process are."""

def cuda_versions() -> tuple[int, int]:
    """Of the runtime and the driver, as CUDA numbers them; 0: there is none."""

def cuda_device_count() -> int:
    """GPUs that this process can use."""

def stream_copy(out: DLPackCompatible, src: DLPackCompatible) -> None:
    """Copies bytes as rows are: for measuring what the memory allows."""

class Error(RuntimeError):
    """Base of every error of mscclpp_ep."""

class InvalidArgument(Error, ValueError):
    """An argument was refused. Nothing was sent; the buffer is still usable."""

class Timeout(Error, TimeoutError):
    """A wait lasted longer than `timeout`. The buffer can only be destroyed."""

class PeerFailure(Error):
    """Another rank refused its arguments, gave up, or died."""

class CudaError(Error):
    """A call of the CUDA runtime or driver failed."""

class SystemError(Error):
    """The operating system refused memory, a descriptor or a socket."""

class NotBuilt(Error):
    """The feature is not in this build or version."""

class DataType(enum.Enum):
    """Element types."""

    bool = 0

    uint8 = 1

    int8 = 2

    uint16 = 3

    int16 = 4

    uint32 = 5

    int32 = 6

    uint64 = 7

    int64 = 8

    float16 = 9

    bfloat16 = 10

    float32 = 11

    float64 = 12

    float8_e4m3fn = 13

    float8_e5m2 = 14

    float8_e8m0fnu = 15

    float8_e4m3fnuz = 16

    float8_e5m2fnuz = 17

class View:
    """A tensor of the caller's, imported by DLPack."""

    def __init__(self, array: DLPackCompatible, dtype: DataType | None = None) -> None: ...

    @staticmethod
    def of(tensor: Tensor) -> View:
        """A view of memory of a buffer."""

    @property
    def dtype(self) -> DataType: ...

    @property
    def shape(self) -> list[int]: ...

    def __repr__(self) -> str: ...

class Views:
    """The tensors of a call."""

    def __init__(self, arrays: list[Any]) -> None: ...

class Tensor:
    """Memory of a buffer."""

    def export(self, framework: str) -> Any:
        """To "numpy", "torch" or "dlpack"."""

    def export_as(self, type: object) -> object:
        """As a type with __dlpack_c_exchange_api__; None if it has none."""

    @property
    def dtype(self) -> DataType: ...

    @property
    def shape(self) -> list[int]: ...

    @property
    def in_arena(self) -> bool: ...

    def __repr__(self) -> str: ...

class MemoryPool:
    """Gives out parts of a tensor by functions of C."""

    def __init__(self, memory: Tensor) -> None: ...

    @property
    def allocate_name(self) -> str: ...

    @property
    def free_name(self) -> str: ...

    @property
    def used_bytes(self) -> int: ...

class HandleFields:
    """Counts of a handle in the memory of the GPU."""

    @property
    def num_recv_tokens(self) -> Tensor: ...

    @property
    def num_recv_tokens_per_expert(self) -> Tensor: ...

    @property
    def rank_prefix_matrix(self) -> Tensor: ...

    @property
    def num_send_tokens(self) -> Tensor: ...

    @property
    def channel_prefix(self) -> Tensor: ...

class DispatchHandle:
    """What a dispatch leaves for combine."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_recv_tokens(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @property
    def num_recv_tokens_per_expert(self) -> list[int]: ...

    @property
    def num_send_tokens(self) -> list[int]: ...

    @property
    def recv_rank_prefix_sum(self) -> list[int]: ...

    @property
    def fields(self) -> HandleFields: ...

    @property
    def recv_source_index(self) -> Tensor: ...

    @property
    def send_head(self) -> Tensor: ...

    @property
    def is_token_in_rank(self) -> Tensor: ...

def item_size(dtype: DataType) -> int:
    """Bytes of one element."""

class Config:
    """Tuned numbers of DeepEP's kernels; here they only size hints."""

    def __init__(self, num_sms: int = 20, num_max_nvl_chunked_send_tokens: int = 6, num_max_nvl_chunked_recv_tokens: int = 256, num_max_rdma_chunked_send_tokens: int = 6, num_max_rdma_chunked_recv_tokens: int = 256) -> None: ...

    @property
    def num_sms(self) -> int: ...

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...

def low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int: ...

def num_local_experts(num_experts: int, num_ranks: int, rank: int) -> int: ...

class BufferOptions:
    """How a buffer is made."""

    def __init__(self) -> None: ...

    @property
    def device(self) -> str: ...

    @device.setter
    def device(self, arg: str, /) -> None: ...

    @property
    def timeout(self) -> float: ...

    @timeout.setter
    def timeout(self, arg: float, /) -> None: ...

    @property
    def arena_bytes(self) -> int: ...

    @arena_bytes.setter
    def arena_bytes(self, arg: int, /) -> None: ...

    @property
    def max_arena_bytes(self) -> int: ...

    @max_arena_bytes.setter
    def max_arena_bytes(self, arg: int, /) -> None: ...

    @property
    def num_threads(self) -> int: ...

    @num_threads.setter
    def num_threads(self, arg: int, /) -> None: ...

    @property
    def sm_margin(self) -> int: ...

    @sm_margin.setter
    def sm_margin(self, arg: int, /) -> None: ...

    @property
    def ranks_per_domain(self) -> int: ...

    @ranks_per_domain.setter
    def ranks_per_domain(self, arg: int, /) -> None: ...

    @property
    def expert_map(self) -> list[int]: ...

    @expert_map.setter
    def expert_map(self, arg: Sequence[int], /) -> None: ...

    @property
    def integrity_check(self) -> bool: ...

    @integrity_check.setter
    def integrity_check(self, arg: bool, /) -> None: ...

    @property
    def first_epoch(self) -> int: ...

    @first_epoch.setter
    def first_epoch(self, arg: int, /) -> None: ...

    @property
    def enable_shrink(self) -> bool: ...

    @enable_shrink.setter
    def enable_shrink(self, arg: bool, /) -> None: ...

    @property
    def trace(self) -> str: ...

    @trace.setter
    def trace(self, arg: str, /) -> None: ...

class BufferStats:
    """Where the memory of a buffer is, and what moved."""

    @property
    def arena_bytes(self) -> int: ...

    @property
    def held_bytes(self) -> int: ...

    @property
    def landing_bytes(self) -> int: ...

    @property
    def pooled_bytes(self) -> int: ...

    @property
    def straight_rows(self) -> int: ...

    @property
    def landed_rows(self) -> int: ...

    @property
    def pulled_rows(self) -> int: ...

    @property
    def staged_rows(self) -> int: ...

class Ordering:
    """How a call is ordered with other work on a GPU."""

    def __init__(self, stream: int | None = None, previous: Event | None = None, asynchronous: bool = False, num_sms: int = 0) -> None: ...

    @property
    def stream(self) -> int | None: ...

class Operation(enum.Enum):
    """The collective operations."""

    dispatch = 1

    cached_dispatch = 2

    combine = 3

    low_latency_dispatch = 4

    low_latency_combine = 5

class Buffer:
    """The C++ Buffer; mscclpp_ep.Buffer is the public one."""

    def __init__(self, group: object, options: BufferOptions) -> None: ...

    @staticmethod
    def decline(group: object, why: str) -> None: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def comm_stream(self) -> int: ...

    @property
    def num_threads(self) -> int: ...

    @property
    def max_arena_bytes(self) -> int: ...

    @property
    def ranks_per_domain(self) -> int: ...

    def empty(self, shape: Sequence[int], dtype: DataType, arena: bool, stream: int | None = None) -> Tensor: ...

    def read_counts(self, handle: DispatchHandle) -> list[int]: ...

    def record_stream(self, stream: int) -> None: ...

    def forget_stream(self, stream: int) -> None: ...

    def time_push(self, num_bytes: int, num_sms: int, repeats: int) -> list[float]:
        """
        Seconds in which each rank writes so many bytes to the next one; collective.
        """

    def check(self) -> None: ...

    def freeze(self) -> None: ...

    def masked(self, rank: int) -> bool: ...

    def set_mask(self, rank: int, masked: bool) -> None: ...

    def stats(self) -> BufferStats: ...

    def destroy(self) -> None: ...

    def leave(self) -> None: ...

    @property
    def destroyed(self) -> bool: ...

    def get_dispatch_layout(self, topk_idx: View, num_experts: int, ordering: Ordering) -> tuple[Tensor, Tensor, Tensor]: ...

    def dispatch(self, given: Views, expert_alignment: int, num_worst_tokens: int, ordering: Ordering) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], DispatchHandle, list[int]]: ...

    def cached_dispatch(self, given: Views, handle: DispatchHandle, ordering: Ordering) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], DispatchHandle, list[int]]: ...

    def combine(self, given: Views, handle: DispatchHandle, ordering: Ordering) -> tuple[Tensor, Tensor | None]: ...

    def refuse(self, operation: Operation, why: str) -> None: ...

    def low_latency_dispatch(self, x: View | None, topk_idx: View | None, topk_weights: View | None, max_tokens_per_rank: int, num_experts: int, quantization: Quantization, recv_stats: View | None, wait_stats: View | None) -> DispatchSent: ...

    def low_latency_combine(self, x: View | None, topk_idx: View | None, topk_weights: View | None, handle: LowLatencyHandle, exact: bool, logfmt: bool, out: View | None, wait_stats: View | None) -> PendingReceive: ...

    def receive(self, pending: PendingReceive) -> None: ...

    def query_masks(self, mask_status: View, stream: int | None = None) -> None: ...

class Quantization(enum.Enum):
    """How a low-latency dispatch sends rows."""

    none = 0

    float8 = 1

    float8_rounded = 2

    float8_ue8m0 = 3

class LowLatencyHandle:
    """What a low-latency dispatch leaves."""

    @property
    def epoch(self) -> int: ...

class PendingReceive:
    """An operation sent and not received."""

    @property
    def handle(self) -> LowLatencyHandle: ...

class DispatchSent:
    """A low-latency dispatch, and where it receives."""

    @property
    def pending(self) -> PendingReceive: ...

    @property
    def x(self) -> Tensor: ...

    @property
    def scales(self) -> Tensor: ...

    @property
    def recv_count(self) -> Tensor: ...

    @property
    def source_index(self) -> Tensor: ...

    @property
    def layout_range(self) -> Tensor: ...

def current_stream(type: object, gpu: int) -> int | None:
    """
    Of the framework with this type of tensors; None without __dlpack_c_exchange_api__.
    """

class Event:
    """A point in a stream of a GPU."""

    def __init__(self, stream: int, device: int) -> None: ...

    def wait(self, stream: int) -> None:
        """Makes a stream wait for the event."""

    def passed(self) -> bool: ...

    def synchronize(self) -> None: ...
