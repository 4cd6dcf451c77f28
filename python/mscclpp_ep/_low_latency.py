"""The low-latency methods of `Buffer`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from mscclpp_ep._arguments import (
    check_deferred,
    check_given,
    check_low_latency_handle,
    check_stream,
    integer,
    output_view,
    unpack_quantization,
    view,
)
from mscclpp_ep._core import Buffer as CoreBuffer
from mscclpp_ep._core import (
    DataType,
    InvalidArgument,
    Operation,
    PeerFailure,
    Quantization,
    View,
)
from mscclpp_ep._devices import CPU, gpu_of, stream_handle
from mscclpp_ep._frameworks import Array, Framework, framework_of
from mscclpp_ep.event import EventHandle, EventOverlap
from mscclpp_ep.handle import LowLatencyHandle
from mscclpp_ep.recording import note_choices

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep._core import PendingReceive


class LowLatencyMethods:
    """Dispatch and combine of few tokens, received by expert. On the CPU only, in this version.

    Below, M is the most tokens of any rank, S = ceil(H / 128), and T, H, K, R, E and L are as in
    `Buffer`. Operations come in one order on every rank; two may be sent and not yet received, and
    a further one is sent after the older of them is received.
    """

    _core: CoreBuffer
    device: str
    rank: int
    group_size: int
    _or_refuse: Callable[[Operation, Callable[[], Any]], Any]
    _combine_input: Any = None

    def low_latency_dispatch(  # noqa: PLR0917 - DeepEP's arguments, in its order
        self,
        x: Array,
        topk_idx: Array,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Array | None = None,
        dispatch_wait_recv_cost_stats: Array | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: Array | None = None,
        stream: object = None,
    ) -> tuple[Any, Array, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """Sends each token to its experts; a token has one row for each. Collective.

        Rows of expert e are `recv_x[e, :recv_count[e]]`, in order of (source rank, source token);
        what lies beyond is not initialised.

        Args:
            x: [T, H] with T at most M; bfloat16 if `use_fp8`, else any dtype.
            topk_idx: int32 or int64 [T, K], ids of experts, -1 for none.
            num_max_dispatch_tokens_per_rank: M, the same on every rank.
            num_experts: E.
            cumulative_local_expert_recv_stats: int32 [L], to which the counts are added.
            dispatch_wait_recv_cost_stats: int64 [R], to which the nanoseconds are added that each
                rank was waited for.
            use_fp8: Send float8_e4m3fn, with a scale for each 128 elements: the largest magnitude,
                or 1e-4 if that is more, divided by 448.
            round_scale: Scales are powers of two, rounded up.
            use_ue8m0: Of such scales only the exponents are returned, four bytes to an int32.
            async_finish: Return an event instead of waiting.
            return_recv_hook: Only send; the hook that is returned receives. Excludes async_finish.
            topk_weights: float32 [T, K], ours: sent along, which spares `low_latency_combine` a
                step; that must then be given the same ones. All ranks give them, or none.
            stream: None on the CPU.

        Returns:
            `recv_x` [L, R * M, H], or a pair of it and the scales, float32 [L, R * M, S] or int32
            [L, R * M, ceil(S / 4)], the last two dimensions in column-major order; `recv_count`
            int32 [L]; the handle; an event; the hook, or None. All are filled when the call, or the
            hook, returns.

        Raises:
            InvalidArgument: An argument is wrong, or the ranks disagree; the operation before the
                last is waiting for its hook.
            PeerFailure: Another rank refused its arguments, gave up, or died.
            Timeout: A wait lasted longer than the buffer's `timeout`.
        """

        def convert() -> tuple[Framework, list[Any], int, int, Quantization]:
            _check_order(async_finish, return_recv_hook, stream, self.device)
            check_given("x", x, "[T, H]")
            views = [
                view("x", x),
                view("topk_idx", topk_idx),
                view("topk_weights", topk_weights),
                output_view(
                    "cumulative_local_expert_recv_stats", cumulative_local_expert_recv_stats
                ),
                output_view("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats),
            ]
            most = integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
            experts = integer("num_experts", num_experts)
            quantization = unpack_quantization(use_fp8, round_scale, use_ue8m0)
            framework = framework_of(x)
            check_deferred(framework, return_recv_hook)
            return framework, views, most, experts, quantization

        framework, views, most, experts, quantization = self._or_refuse(
            Operation.low_latency_dispatch, convert
        )
        x_view, idx_view, weights_view, recv_stats, wait_stats = views
        note_choices(self.rank, self.group_size, experts, topk_idx)
        sent = self._core.low_latency_dispatch(
            x_view, idx_view, weights_view, most, experts, quantization, recv_stats, wait_stats
        )
        hook = self._hook(sent.pending, (x, topk_idx, topk_weights, views))
        if not return_recv_hook:
            hook()
        recv_x = framework.export(sent.x, x.dtype)
        if quantization != Quantization.none:
            recv_x = (recv_x, framework.export(sent.scales))
        handle = LowLatencyHandle.wrap(sent, framework, most, x_view.shape[1], experts)
        count = framework.export(sent.recv_count)
        event = EventOverlap(EventHandle.on(None, 0) if async_finish else None)
        return recv_x, count, handle, event, hook if return_recv_hook else None

    def low_latency_combine(  # noqa: PLR0917 - DeepEP's arguments, in its order
        self,
        x: Array,
        topk_idx: Array,
        topk_weights: Array,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Array | None = None,
        combine_wait_recv_cost_stats: Array | None = None,
        *,
        exact: bool = False,
        stream: object = None,
    ) -> tuple[Array, EventOverlap, Callable[[], None] | None]:
        """Sums, per token, the rows of its experts, by weight. Collective.

        Each rank sums the rows of its own experts in float32, by fused multiply-adds in order of
        the token's choices, and rounds the sum to x's dtype; the token's rank adds these sums in
        float32, in ascending order of rank, and rounds once more.

        Args:
            x: bfloat16, float16 or float32 [L, R * M, H]: of each row that the dispatch returned,
                what its expert made of it.
            topk_idx: int32 or int64 [T, K], as the dispatch was given it.
            topk_weights: float32 [T, K].
            handle: What the dispatch returned.
            use_logfmt: Rows travel in 10 bits an element, a sign and a logarithm, where each group
                of 128 elements allows: magnitudes below 1, not all the same.
            zero_copy: The rows are in the memory of `get_next_low_latency_combine_buffer`; `x`
                only tells dtype and shape.
            async_finish: Return an event instead of waiting.
            return_recv_hook: Only send; the hook that is returned receives. Excludes async_finish.
            out: [T, H] of x's dtype, contiguous, to be filled instead of a new tensor.
            combine_wait_recv_cost_stats: int64 [R], as in the dispatch.
            exact: Send each expert's row, and sum all K at once: DeepEP's result to the bit, at the
                price of more traffic. The same on every rank.
            stream: None on the CPU.

        Returns:
            The sums [T, H], an event, and the hook, or None.

        Raises:
            InvalidArgument: An argument is wrong, or the ranks disagree; the operation before the
                last is waiting for its hook.
            PeerFailure: Another rank refused its arguments, gave up, or died.
            Timeout: A wait lasted longer than the buffer's `timeout`.
        """

        def convert() -> tuple[Framework, list[Any], Any]:
            _check_order(async_finish, return_recv_hook, stream, self.device)
            check_low_latency_handle(handle)
            check_given("x", x, "[L, R * M, H]")
            check_given("topk_idx", topk_idx, "[T, K], as the dispatch was given it")
            rows = self._zero_copy_rows(x, use_logfmt) if zero_copy else view("x", x)
            views = [rows, view("topk_idx", topk_idx), view("topk_weights", topk_weights)]
            views.append(output_view("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats))
            framework = framework_of(x)
            check_deferred(framework, return_recv_hook)
            if out is not None:
                return framework, [*views, output_view("out", out)], None
            shape = [views[1].shape[0], views[0].shape[-1]]
            tensor = self._core.empty(shape, views[0].dtype, False)
            return framework, [*views, View.of(tensor)], tensor

        framework, views, tensor = self._or_refuse(Operation.low_latency_combine, convert)
        rows, idx_view, weights_view, stats, out_view = views
        pending = self._core.low_latency_combine(
            rows, idx_view, weights_view, handle.core, exact, use_logfmt, out_view, stats
        )
        if zero_copy:
            self._combine_input = None
        hook = self._hook(pending, (x, topk_idx, topk_weights, handle, views))
        if not return_recv_hook:
            hook()
        result = out if tensor is None else framework.export(tensor, x.dtype)
        event = EventOverlap(EventHandle.on(None, 0) if async_finish else None)
        return result, event, hook if return_recv_hook else None

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Array:
        """Memory for the input of the next `low_latency_combine(zero_copy=True)`.

        The same until that combine.

        Args:
            handle: What the dispatch returned.

        Returns:
            bfloat16 [L, R * M, H], contiguous, not initialised.

        Raises:
            InvalidArgument: `handle` is no handle of a low-latency dispatch.
        """
        check_low_latency_handle(handle)
        shape = [*handle[0].shape, handle[3]]
        if self._combine_input is None or self._combine_input[0] != shape:
            tensor = self._core.empty(shape, DataType.bfloat16, True)
            self._combine_input = (shape, tensor)
        return handle.framework.export(self._combine_input[1])

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Does nothing: high-throughput operations leave nothing that disturbs low-latency ones.

        Args:
            num_max_dispatch_tokens_per_rank: M.
            hidden: H.
            num_experts: E.
        """
        for name, value in (
            ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank),
            ("hidden", hidden),
            ("num_experts", num_experts),
        ):
            integer(name, value)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks a rank, or takes it in again: on this rank only, for both modes.

        A masked rank is sent nothing, and its rows are missing from results; it is told, and fails
        when it waits for this rank, unless it masks this rank in turn. To take a rank in again,
        both sides unmask each other between the same two operations, after equally many calls. On
        a GPU it waits for the calls before.

        Args:
            rank_to_mask: The other rank.
            mask: Whether to mask it.

        Raises:
            InvalidArgument: The buffer was made without `enable_shrink`; there is no such rank; or
                one is to be taken in while an operation waits for its hook.
            PeerFailure: The rank is gone, and cannot be taken in again.
        """
        self._core.set_mask(integer("rank_to_mask", rank_to_mask, bits=31), bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: Array) -> None:
        """Writes which ranks are masked. On a GPU it waits for the calls before.

        Args:
            mask_status: int32 [R], to be filled with 1 for a masked rank and 0 for another: on the
                CPU, or the GPU of the buffer.

        Raises:
            InvalidArgument: `mask_status` is no such tensor, or cannot be written to.
        """
        status = output_view("mask_status", mask_status)
        check_given("mask_status", status, "int32 [R]")
        stream = None
        if self.device != CPU:
            stream = stream_handle(framework_of(mask_status).current_stream(gpu_of(self.device)))
        self._core.query_masks(status, stream)

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes in again every masked rank that is not gone.

        Raises:
            InvalidArgument: The buffer was made without `enable_shrink`, or an operation waits for
                its hook.
        """
        for rank in range(self._core.size):
            if rank != self._core.rank:
                with contextlib.suppress(PeerFailure):
                    self._core.set_mask(rank, False)

    def _zero_copy_rows(self, x: Array, use_logfmt: bool) -> View:
        if use_logfmt:
            msg = "zero_copy and use_logfmt exclude each other"
            raise InvalidArgument(msg)
        if self._combine_input is None:
            msg = "zero_copy needs the rows in get_next_low_latency_combine_buffer(handle)"
            raise InvalidArgument(msg)
        shape, tensor = self._combine_input
        given = view("x", x).shape
        if list(given) != shape:
            msg = f"x is of shape {list(given)}, but the combine buffer is {shape}"
            raise InvalidArgument(msg)
        return View.of(tensor)

    def _hook(self, pending: PendingReceive, inputs: Any) -> Callable[[], None]:
        """What receives an operation that was sent; keeps its tensors alive until then."""
        kept = [inputs]

        def hook() -> None:
            self._core.receive(pending)
            kept.clear()

        return hook


def _check_order(async_finish: bool, return_recv_hook: bool, stream: object, device: str) -> None:
    check_stream(device, stream)
    if async_finish and return_recv_hook:
        msg = "async_finish and return_recv_hook exclude each other"
        raise InvalidArgument(msg)
