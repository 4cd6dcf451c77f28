"""The `Buffer`: DeepEP's methods, for tensors of any framework."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from mscclpp_ep import _core
from mscclpp_ep._arguments import (
    Streams,
    check_cached,
    check_call,
    check_given,
    check_handle,
    check_stream,
    file_name,
    integer,
    not_built,
    number,
    order_call,
    scratch_array,
    unbuilt,
    unpack_config,
    unpack_x,
    view,
    views_of,
)
from mscclpp_ep._core import Config, DataType, InvalidArgument
from mscclpp_ep._devices import (
    CPU,
    comm_stream,
    device_name,
    gpu_of,
    torch_stream,
    torch_with_cuda,
)
from mscclpp_ep._frameworks import Array, Framework, dtype_of, framework_of, resolve_dtype
from mscclpp_ep._low_latency import LowLatencyMethods
from mscclpp_ep._paths import library
from mscclpp_ep._tuning import COMBINE_CHUNKS, DISPATCH_CHUNKS
from mscclpp_ep.event import EventHandle, EventOverlap
from mscclpp_ep.group import as_group
from mscclpp_ep.handle import DispatchHandle
from mscclpp_ep.recording import note_choices
from mscclpp_ep.runtime import Runtime

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from mscclpp_ep.group import GroupLike

Operation = _core.Operation
_POOL_BYTES = 256 << 20


class Buffer(LowLatencyMethods):
    """Dispatch and combine of the tokens of a mixture-of-experts layer over the ranks of a group.

    Below, T is the number of tokens of this rank, H of elements a token, K of choices a token,
    R of ranks, E of experts, L of experts of this rank, and N of rows received.

    `dispatch`, `combine` and `destroy` are collective: every rank calls them in the same order.
    One thread at a time uses a buffer. Tensors come back in the framework of those given (of `x`,
    where there are several; a `DLPackArray` for objects that have `__dlpack__` only); what a call
    returns stays valid, whatever is called later, until it is dropped. JAX arrays are taken outside
    of traces, from one device, and never written to.

    A buffer is on the CPU or on a GPU, as are the tensors that it takes and returns. On a GPU a
    call is enqueued: it comes after what is on its stream, or with `previous_event` after that
    only; and what is put on the stream afterwards comes after the call, unless `async_finish` says
    otherwise. The host waits for the counts of a dispatch that has neither `num_worst_tokens` nor a
    handle, without the GIL, and for results of frameworks without streams (JAX). The stream is
    `stream`, or else the current one of the framework of the tensors; the legacy default stream, if
    that has none. One that is given as an integer must live as long as the buffer. What fails on
    the GPU is raised by a later call or `check`. Calls can be captured into CUDA graphs, a dispatch
    with `num_worst_tokens` or a handle: every rank replays its graph as often as the others, and
    none once its buffer is gone. The low-latency methods are on the CPU only.

    Attributes:
        device: "cpu" or "cuda:N".
        rank: This rank.
        group_size: R.
        group: What the buffer was made with.
        num_sms: Streaming multiprocessors that a call may use on a GPU; class-wide. 0: the
            library's choice.
    """

    num_sms: ClassVar[int] = 20

    def __init__(  # noqa: PLR0917 - DeepEP's arguments, in its order
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
        device: Any = None,
        ranks_per_domain: int = 0,
        timeout: float = 100.0,
        max_arena_bytes: int = 0,
        num_threads: int = 0,
        sm_margin: int = 0,
        integrity_check: bool = False,
        expert_map: Sequence[int] | None = None,
        first_epoch: int = 1,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        """Connects the ranks of the group; collective.

        Args:
            group: An `mscclpp_ep.Group`, a `torch.distributed` process group, or an mpi4py
                communicator; it is used here only.
            num_nvl_bytes: Arena to begin with, in bytes. A hint on the CPU, where the arena starts
                at 64 MiB at most and grows as results need it.
            num_rdma_bytes: Accepted; means nothing within one host.
            low_latency_mode: Accepted: every buffer has both modes.
            num_qps_per_rank: Accepted; means nothing here.
            allow_nvlink_for_low_latency_mode: Accepted; means nothing here.
            allow_mnnvl: Accepted; means nothing here.
            explicitly_destroy: Accepted: `destroy` may be called in any case.
            enable_shrink: Go on without a rank that dies, fails or is waited for longer than
                `timeout`: it is masked, and its rows are missing from results.
            comm: An mpi4py communicator, if no group is given.
            use_fabric: Accepted; means nothing here.
            device: "cpu", "cuda:N", or "cuda" for the current GPU; a `torch.device` will do. None:
                the environment variable MSCCLPP_EP_DEVICE, if set; else the current GPU; or the CPU
                if there is no GPU, or the build has no CUDA. The current GPU is Torch's, if that
                uses one; else number LOCAL_RANK, modulo their number, if that variable is set; else
                CuPy's, or the first.
            ranks_per_domain: Ranks that share memory; 0: found at run time.
            timeout: Longest that any wait lasts, in seconds, before it ends in an error.
            max_arena_bytes: Most that results held by the caller may take of the arena, and most
                that one operation may receive. 0: half of the memory that is free, over the ranks
                of this host.
            num_threads: Threads that move data for this rank; 0: cores over ranks of this host.
            sm_margin: Multiprocessors of a GPU that are left to others, whatever `num_sms` calls
                ask for. Ranks of one process that share a GPU share the rest.
            integrity_check: Send a checksum and a tag (source rank, token, epoch) with each row,
                and compare them where it arrives. Damage is a `PeerFailure` that names the row, and
                ends the buffer. The same on every rank.
            expert_map: The rank of each expert, int [E]; None: contiguous blocks of ceil(E / R).
            first_epoch: Number of the first operation; for tests of its wrapping around.
            trace: File to which this rank appends the phases of each operation, for
                ui.perfetto.dev or chrome://tracing; ranks may share it. None: the environment
                variable MSCCLPP_EP_TRACE, if set.

        Raises:
            InvalidArgument: An argument is wrong, or the ranks disagree on one.
            PeerFailure: Another rank refused its arguments or died.
            NotBuilt: The feature is not in this build or version.
            Timeout: A rank did not come.
        """
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric
        self.group = group if group is not None else comm
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        bootstrap: GroupLike = as_group(self.group)

        def convert() -> _core.BufferOptions:
            ranks = [] if expert_map is None else list(expert_map)
            options = _core.BufferOptions()
            values = {
                "device": device_name(device),
                "arena_bytes": integer("num_nvl_bytes", num_nvl_bytes),
                "max_arena_bytes": integer("max_arena_bytes", max_arena_bytes),
                "timeout": number("timeout", timeout),
                "num_threads": integer("num_threads", num_threads, bits=31),
                "sm_margin": integer("sm_margin", sm_margin, bits=31),
                "ranks_per_domain": integer("ranks_per_domain", ranks_per_domain, bits=31),
                "expert_map": [integer("expert_map", rank, bits=31) for rank in ranks],
                "integrity_check": bool(integrity_check),
                "first_epoch": integer("first_epoch", first_epoch),
                "enable_shrink": bool(enable_shrink),
                "trace": file_name("trace", trace),
            }
            for name, value in values.items():
                setattr(options, name, value)
            return options

        try:
            options = convert()
        except Exception as error:
            # The other ranks are connecting, or will: they must not wait for this one.
            _core.Buffer.decline(bootstrap, str(error))
            raise
        self._core = _core.Buffer(bootstrap, options)
        self.device: str = self._core.device
        self.rank: int = self._core.rank
        self.group_size: int = self._core.size
        self._streams = Streams()
        # What calls still use, of frameworks that cannot be told.
        self._in_use: list[tuple[EventHandle, Sequence[Array | None]]] = []

    # Lifetime

    def destroy(self) -> None:
        """Leaves the group, once no rank uses this one's memory; results stay valid.

        Collective. Calling it again does nothing.

        Raises:
            Timeout: A rank did not come; the buffer is destroyed all the same.
        """
        self._core.destroy()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.destroy()
        else:
            # The others may never come to destroy; an error that leads here must not wait for them.
            self._core.leave()

    def is_available(self) -> bool:
        """Whether the buffer is connected."""
        return not self._core.destroyed

    @property
    def runtime(self) -> Runtime | None:
        """What DeepEP's callers ask about the connection; None once destroyed."""
        return None if self._core.destroyed else Runtime(self)

    # Routing

    def get_dispatch_layout(
        self,
        topk_idx: Array,
        num_experts: int,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        stream: object = None,
    ) -> tuple[Array, Array | None, Array, Array, EventOverlap]:
        """Counts the tokens that go to each rank and expert. Local: no other rank takes part.

        Args:
            topk_idx: int32 or int64 [T, K], ids of experts, -1 for none.
            num_experts: E.
            previous_event: What to come after, in place of what is on the stream: an
                `EventOverlap` or `EventHandle`.
            async_finish: Return an event, and do not let the stream wait for the call.
            allocate_on_comm_stream: Needs the two before.
            stream: What the call is ordered by on a GPU: a `cudaStream_t` as an integer, a stream
                of Torch or CuPy, or an object with `__cuda_stream__`. None on the CPU.

        Returns:
            `num_tokens_per_rank` int32 [R] (a token counts once a rank), None (tokens per node, of
            which there is one), `num_tokens_per_expert` int32 [E] (every choice counts),
            `is_token_in_rank` bool [T, R], and an event.

        Raises:
            InvalidArgument: An id is out of range, or the dtype or shape is wrong.
        """
        check_call(previous_event, async_finish, allocate_on_comm_stream, stream, self.device)
        check_given("topk_idx", topk_idx, "[T, K]")
        imported = view("topk_idx", topk_idx)
        framework = framework_of(topk_idx)
        experts = integer("num_experts", num_experts)
        ordering = self._order(framework, previous_event, async_finish, stream)
        counted = self._core.get_dispatch_layout(imported, experts, ordering)
        per_rank, per_expert, in_rank = counted
        export = framework.export
        event = self._finished(framework, async_finish, [topk_idx])
        return export(per_rank), None, export(per_expert), export(in_rank), event

    # Dispatch

    def dispatch(  # noqa: PLR0917 - DeepEP's arguments, in its order
        self,
        x: Array | tuple[Array, Array],
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: Array | None = None,
        num_tokens_per_rdma_rank: Array | None = None,
        is_token_in_rank: Array | None = None,
        num_tokens_per_expert: Array | None = None,
        topk_idx: Array | None = None,
        topk_weights: Array | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        stream: object = None,
    ) -> tuple[Array, Array, Array, Any, Any, EventOverlap]:
        """Sends each token to the ranks that hold its experts, once a rank. Collective.

        Rows arrive in order of (source rank, source token).

        Args:
            x: [T, H] of any dtype, or a pair of it and scales [T, S] of 1, 2 or 4 bytes each.
            handle: Of an earlier dispatch, whose routing is repeated; excludes the next six.
            num_tokens_per_rank: From `get_dispatch_layout`, as the next ones.
            num_tokens_per_rdma_rank: Not used within one host.
            is_token_in_rank: bool [T, R]: which ranks each token goes to.
            num_tokens_per_expert: int32 [E].
            topk_idx: int32 or int64 [T, K].
            topk_weights: float32 [T, K].
            expert_alignment: Counts per expert are rounded up to a multiple of this.
            num_worst_tokens: If not 0, outputs have this many rows whatever arrives: rows not
                received have indices -1, and what does not fit is dropped from the highest (source
                rank, token) and reported by `check`.
            config: Its `num_sms`, if not 0, comes before the buffer's; means nothing on the CPU.
            previous_event: What to come after, in place of what is on the stream: an
                `EventOverlap` or `EventHandle`.
            async_finish: Return an event, and do not let the stream wait for the call.
            allocate_on_comm_stream: Needs the two before.
            stream: What the call is ordered by on a GPU: a `cudaStream_t` as an integer, a stream
                of Torch or CuPy, or an object with `__cuda_stream__`. None on the CPU.

        Returns:
            `recv_x` [N, H], or a pair of it and the scales [N, S]; `recv_topk_idx` [N, K] with
            local ids, -1 for choices held elsewhere; `recv_topk_weights` [N, K], 0 there; rows per
            local expert, rounded up, as a list (empty with `num_worst_tokens`); the handle; an
            event. With `handle`, all but the first and the last are None.

        Raises:
            InvalidArgument: An argument is wrong, or the ranks disagree; nothing was sent.
            PeerFailure: Another rank refused its arguments, gave up, or died.
            Timeout: A wait lasted longer than the buffer's `timeout`.
        """
        del num_tokens_per_rdma_rank
        operation = Operation.dispatch if handle is None else Operation.cached_dispatch

        def convert() -> tuple[Framework, _core.Views, int, int, _core.Ordering]:
            check_call(previous_event, async_finish, allocate_on_comm_stream, stream, self.device)
            num_sms = unpack_config(config, Buffer.num_sms)
            rows, scales = unpack_x(x)
            check_given("x", rows, "[T, H]")
            named = {
                "x": rows,
                "the scales of x": scales,
                "topk_idx": topk_idx,
                "topk_weights": topk_weights,
                "is_token_in_rank": is_token_in_rank,
                "num_tokens_per_rank": num_tokens_per_rank,
                "num_tokens_per_expert": num_tokens_per_expert,
            }
            views = views_of(named)
            alignment = integer("expert_alignment", expert_alignment)
            worst = integer("num_worst_tokens", num_worst_tokens)
            if handle is not None:
                check_handle(handle)
                check_cached(num_worst_tokens=worst, topk_idx=topk_idx, topk_weights=topk_weights)
            framework = framework_of(rows)
            ordering = self._order(framework, previous_event, async_finish, stream, num_sms)
            return framework, views, alignment, worst, ordering

        framework, views, alignment, worst, ordering = self._or_refuse(operation, convert)
        outputs, finished, counts = (
            self._core.dispatch(views, alignment, worst, ordering)
            if handle is None
            else self._core.cached_dispatch(views, handle.core, ordering)
        )
        if topk_idx is not None and num_tokens_per_expert is not None:
            experts = int(num_tokens_per_expert.shape[0])
            note_choices(self.rank, self.group_size, experts, topk_idx)

        # Before the results are exported, which must be complete for some frameworks.
        arrays = x if isinstance(x, tuple) else (x,)
        sources = [*arrays, *([None] * (2 - len(arrays))), topk_idx, topk_weights]
        used = [*sources, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert]
        event = self._finished(framework, async_finish, used)
        exported = [
            None if tensor is None else framework.export(tensor, dtype_of(source))
            for tensor, source in zip(outputs, sources, strict=True)
        ]
        recv_x = (exported[0], exported[1]) if isinstance(x, tuple) else exported[0]
        if handle is not None:
            return recv_x, None, None, None, None, event
        wrapped = DispatchHandle.wrap(finished, self._core, framework)
        return recv_x, exported[2], exported[3], counts, wrapped, event

    # Combine

    def combine(
        self,
        x: Array,
        handle: DispatchHandle,
        topk_weights: Array | None = None,
        bias: Array | tuple[Array, Array] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        stream: object = None,
    ) -> tuple[Array, Array | None, EventOverlap]:
        """Sums, per token, the rows that the dispatch of `handle` made of it. Collective.

        The sum is taken in float32, the biases first, then ranks in ascending order, and rounded
        once. Rows in memory of `empty` are read where they are; others are copied for it.

        Args:
            x: bfloat16, float16 or float32 [N, H], a row for each that the dispatch received.
            handle: What the dispatch returned.
            topk_weights: float32 [N, K], summed likewise.
            bias: [T, H] of x's dtype, or two of them.
            config: Its `num_sms`, if not 0, comes before the buffer's; means nothing on the CPU.
            previous_event: What to come after, in place of what is on the stream: an
                `EventOverlap` or `EventHandle`.
            async_finish: Return an event, and do not let the stream wait for the call.
            allocate_on_comm_stream: Needs the two before.
            stream: What the call is ordered by on a GPU: a `cudaStream_t` as an integer, a stream
                of Torch or CuPy, or an object with `__cuda_stream__`. None on the CPU.

        Returns:
            The sums [T, H] of x's dtype, those of the weights float32 [T, K] or None, an event.

        Raises:
            InvalidArgument: An argument is wrong, or the ranks disagree; nothing was read.
            PeerFailure: Another rank refused its arguments, gave up, or died.
            Timeout: A wait lasted longer than the buffer's `timeout`.
        """

        def convert() -> tuple[Framework, _core.Views, _core.Ordering]:
            check_call(previous_event, async_finish, allocate_on_comm_stream, stream, self.device)
            num_sms = unpack_config(config, Buffer.num_sms)
            check_handle(handle)
            check_given("x", x, "[N, H]")
            bias0, bias1 = self._unpack_bias(bias)
            named = {"x": x, "topk_weights": topk_weights, "bias": bias0, "the second bias": bias1}
            views = views_of(named)
            framework = framework_of(x)
            ordering = self._order(framework, previous_event, async_finish, stream, num_sms)
            return framework, views, ordering

        framework, views, ordering = self._or_refuse(Operation.combine, convert)
        out, out_weights = self._core.combine(views, handle.core, ordering)
        used = [x, topk_weights, *self._unpack_bias(bias)]
        event = self._finished(framework, async_finish, used)
        combined = framework.export(out, dtype_of(x))
        weights = None if out_weights is None else framework.export(out_weights)
        return combined, weights, event

    # Memory

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """Memory for rows that other ranks may read or write in place; not initialised.

        An expert's output written here is combined without a copy. If the arena is full and may not
        grow, the memory is ordinary, and works as well, with a copy.

        Args:
            shape: Up to 4 extents.
            dtype: Of NumPy, ml_dtypes or JAX, for an array of NumPy, or of Torch, for one of Torch.
                On a GPU a dtype of NumPy is for an array of CuPy, if that is imported; others, but
                Torch's, are for a `DLPackArray`.

        Raises:
            InvalidArgument: The shape or dtype is wrong.
            SystemError: There is not enough memory.
        """
        framework, kind = resolve_dtype(dtype, self.device)
        extents = [integer("an extent of shape", extent) for extent in shape]
        current = None
        if self.device != CPU:
            stream = framework.current_stream(gpu_of(self.device))
            current = self._streams.keep(self._core, stream)
        tensor = self._core.empty(extents, kind, True, current)
        return framework.export(tensor, dtype)

    def mem_pool(self, num_bytes: int | None = None) -> Any:
        """A pool of Torch over arena memory: tensors made in it are combined without a copy.

        With `torch.cuda.use_mem_pool(pool)` the output of a GEMM, say, is where other ranks can
        read it. The memory is the pool's until it, and all tensors of it, are dropped.

        Args:
            num_bytes: Of the pool; Torch takes memory in pieces of 2 MiB and more. None: as many
                as the buffer's `num_nvl_bytes`, or 256 MiB.

        Returns:
            A `torch.cuda.MemPool`.

        Raises:
            NotBuilt: The buffer is on the CPU, or Torch uses no GPU.
            SystemError: The arena has no room for so many bytes.
            InvalidArgument: The process has 8 pools already.
        """
        torch = torch_with_cuda()
        if self.device == CPU or torch is None:
            not_built("mem_pool (without tensors of Torch on a GPU)")
        wanted = num_bytes if num_bytes is not None else self.num_nvl_bytes or _POOL_BYTES
        current = torch_stream(torch, gpu_of(self.device))
        memory = self._core.empty([integer("num_bytes", wanted)], DataType.uint8, True, current)
        if not memory.in_arena:
            msg = f"the arena has no room for a pool of {wanted} bytes; see max_arena_bytes"
            raise _core.SystemError(msg)
        part = _core.MemoryPool(memory)
        allocator = torch.cuda.memory.CUDAPluggableAllocator(
            str(library()), part.allocate_name, part.free_name
        )
        pool = torch.cuda.MemPool(allocator.allocator())
        pool.mscclpp_ep = (allocator, part)  # which live as long as it
        return pool

    def get_local_buffer_tensor(
        self,
        dtype: Any,
        size: Sequence[int] | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Array:
        """Memory in the place of DeepEP's staging buffer, for callers that clear or fill it.

        Nothing is staged in a buffer of that kind here: each call returns memory of its own, zeros,
        which no other call and no other rank reads.

        Args:
            dtype: Of NumPy or ml_dtypes, for an array of NumPy, or of Torch, for one of Torch. On a
                GPU of Torch, or of NumPy, for an array of CuPy, which must be imported.
            size: The shape; None: one dimension, of all that follows `offset`.
            offset: In bytes, of the `num_nvl_bytes` or `num_rdma_bytes` that the buffer was made
                with.
            use_rdma_buffer: In the place of the buffer of `num_rdma_bytes`.

        Raises:
            InvalidArgument: The dtype or size is wrong, or goes beyond those bytes.
        """
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        return scratch_array(dtype, size, offset, num_bytes, self.device)

    def record_stream(self, tensor: Array, stream: object) -> None:
        """Tells that a stream uses a tensor of this buffer.

        For streams other than those of calls: when the tensor has been dropped, its memory is used
        again only behind what is on the stream then. A stream that is given as an integer must live
        as long as the buffer.

        Args:
            tensor: What is used.
            stream: What uses it. None on the CPU.

        Raises:
            InvalidArgument: `stream` is no stream.
        """
        del tensor
        check_stream(self.device, stream)
        if stream is not None:
            self._core.record_stream(self._streams.keep(self._core, stream))

    def get_comm_stream(self) -> Any:
        """The stream on which the buffer moves rows.

        Returns:
            A `torch.cuda.ExternalStream`, if Torch uses a GPU; else an object that has
            `__cuda_stream__`. It lives as long as the buffer.

        Raises:
            NotBuilt: The buffer is on the CPU.
        """
        if self.device == CPU:
            not_built("get_comm_stream (a buffer on the CPU has no streams)")
        return comm_stream(self._core.comm_stream, gpu_of(self.device))

    def check(self) -> None:
        """Raises what was noticed since the last call without a call to raise it from.

        On a GPU it waits for the calls before.

        Raises:
            InvalidArgument: `num_worst_tokens` was too small and rows were dropped; or, on a GPU,
                ids of experts were out of range.
            PeerFailure: The buffer has failed and can only be destroyed.
            Timeout: A rank was waited for in vain on the GPU.
        """
        self._core.check()

    def freeze(self) -> None:
        """From now on the arena does not grow; results that find no room are copied out.

        An operation larger than all before is refused from then on, if it finds no room.

        Raises:
            SystemError: There is not enough memory to copy out the largest operation so far.
        """
        self._core.freeze()

    def stats(self) -> _core.BufferStats:
        """Where the buffer's memory is, and what moved in which way."""
        return self._core.stats()

    # Statics of DeepEP

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether kernels for Hopper can run here: in this build, and with a GPU."""
        return _core.cuda_device_count() > 0

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets the multiprocessors that calls may use on a GPU.

        Raises:
            InvalidArgument: The number is odd or negative.
        """
        if new_num_sms < 0 or new_num_sms % 2 != 0:
            msg = f"new_num_sms is {new_num_sms}; it must be even and not negative"
            raise InvalidArgument(msg)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event at this point of the current stream, as `EventHandle`."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """DeepEP's tuned numbers for dispatch.

        Of a number of ranks for which DeepEP has none, those of the next larger that it knows.

        Raises:
            InvalidArgument: There are no ranks.
        """
        return _tuned(DISPATCH_CHUNKS, num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """DeepEP's tuned numbers for combine, as `get_dispatch_config`."""
        return _tuned(COMBINE_CHUNKS, num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """DeepEP's size of its low-latency buffer, in bytes."""
        return _core.low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    @staticmethod
    def _unpack_bias(
        bias: Array | tuple[Array, Array] | None,
    ) -> tuple[Array | None, Array | None]:
        if not isinstance(bias, tuple):
            return bias, None
        if len(bias) != 2:
            msg = f"bias is a tuple of {len(bias)}; it must be one tensor or two"
            raise InvalidArgument(msg)
        return bias[0], bias[1]

    # What is not there yet

    internode_dispatch = unbuilt("internode_dispatch")
    internode_combine = unbuilt("internode_combine")

    # Helpers

    def _order(
        self,
        framework: Framework,
        previous_event: EventOverlap | EventHandle | None,
        async_finish: bool,
        stream: object,
        num_sms: int = 0,
    ) -> _core.Ordering:
        """How a call is ordered with the caller's other work."""
        return order_call(
            framework,
            previous_event,
            async_finish,
            stream,
            self.device,
            self._core,
            self._streams,
            num_sms,
        )

    def _finished(
        self, framework: Framework, async_finish: bool, used: Sequence[Array | None]
    ) -> EventOverlap:
        """What a call returns that used some tensors."""
        gpu = gpu_of(self.device)
        if self.device != CPU and not framework.has_streams:
            EventHandle.on(self._core.comm_stream, gpu).synchronize()
        if not async_finish:
            return EventOverlap()
        if self.device == CPU or not framework.has_streams:
            return EventOverlap(EventHandle.on(None, 0))
        event = EventHandle.on(self._core.comm_stream, gpu)
        event.tell_streams_to(_noting(self))
        if not framework.record_use(used, self._core.comm_stream, gpu):
            self._in_use = [(other, kept) for other, kept in self._in_use if not other.passed()]
            self._in_use.append((event, used))
        return EventOverlap(event)

    def _or_refuse(self, operation: _core.Operation, convert: Callable[[], Any]) -> Any:
        """Converts arguments; if that fails, refuses the operation, so that no rank waits."""
        try:
            return convert()
        except BaseException as error:
            self._refuse(operation, str(error))
            if isinstance(error, _core.Error) or not isinstance(error, Exception):
                raise
            raise InvalidArgument(str(error)) from error

    def _refuse(self, operation: _core.Operation, why: str) -> None:
        try:
            self._core.refuse(operation, why)
        except _core.Error:
            # The buffer has failed or is destroyed, which its next call says. The mistake that led
            # here comes first.
            if self._core.destroyed:
                raise


def _noting(buffer: Buffer) -> Callable[[object], None]:
    """Tells a buffer, if there still is one, of streams that use its results."""
    known = weakref.ref(buffer)

    def note(stream: object) -> None:
        alive = known()
        if alive is not None and alive.is_available():
            alive._core.record_stream(alive._streams.keep(alive._core, stream))

    return note


def _tuned(chunks: dict[int, tuple[int, int, int, int]], num_ranks: int) -> Config:
    if integer("num_ranks", num_ranks) < 1:
        msg = f"Unsupported number of EP ranks: {num_ranks}; it must be positive"
        raise InvalidArgument(msg)
    nearest = min((known for known in chunks if known >= num_ranks), default=max(chunks))
    return Config(Buffer.num_sms, *chunks[nearest])
