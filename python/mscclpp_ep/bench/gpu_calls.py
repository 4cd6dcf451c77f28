# SPDX-License-Identifier: MIT
"""The calls of one layer, for buffers with the methods of DeepEP's `Buffer`: timed and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mscclpp_ep.bench.gpu_checks import (
    require_close,
    require_same,
    require_same_rows,
    spoil,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.gpu_clock import GpuClock
    from mscclpp_ep.bench.gpu_inputs import Inputs


class Meter:
    """Times calls of one system with one number of multiprocessors, on one set of inputs."""

    def __init__(
        self, clock: GpuClock, inputs: Inputs, system: str, sms: int, iterations: int
    ) -> None:
        self.inputs = inputs
        self.system = system
        self.sms = sms
        self._clock = clock
        self._iterations = iterations

    def time(
        self, op: str, call: Callable[[], Any], before: Callable[[], object] = lambda: None
    ) -> Any:
        """Times calls, and returns the result of the last."""
        key = (self.system, op, self.sms)
        return self._clock.measure(key, call, self._iterations, before=before)

    def time_chain(self, op: str, pair: Callable[[], Any]) -> Any:
        """Times calls that follow each other at once."""
        settings = self.inputs.case.settings
        skipped = settings.chain_warmup
        pairs = settings.chain - skipped
        key = (self.system, op, self.sms)
        return self._clock.measure(key, pair, self._iterations, pairs=pairs, skipped=skipped)


class Layer:
    """Dispatches and combines of a buffer.

    Rows come in an order that is known (`ordered`), or else are compared whatever it is.
    """

    def __init__(
        self, torch: Any, buffer: Any, config: Any, meter: Meter, *, ordered: bool
    ) -> None:
        self.meter = meter
        self._torch = torch
        self._buffer = buffer
        self._config = config
        self._ordered = ordered
        inputs = meter.inputs
        self._layout = buffer.get_dispatch_layout(inputs.topk_idx, inputs.case.settings.experts)

    # Calls

    def send(self, x: Any, num_worst_tokens: int = 0) -> Any:
        """A dispatch that asks for counts, or knows the most that they can be."""
        per_rank, _, per_expert, in_rank, _ = self._layout
        return self._buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.meter.inputs.topk_idx,
            topk_weights=self.meter.inputs.topk_weights,
            num_worst_tokens=num_worst_tokens,
            config=self._config,
        )

    def send_again(self, x: Any, handle: Any) -> Any:
        """A dispatch whose routing is known."""
        return self._buffer.dispatch(x, handle=handle, config=self._config)

    def sum(self, rows: Any, handle: Any, weights: Any = None) -> Any:
        """A combine."""
        return self._buffer.combine(rows, handle, topk_weights=weights, config=self._config)

    # Measurements

    def dispatch(self, op: str, *, fp8: bool = False) -> None:
        """Times and checks a dispatch that asks for counts."""
        x = self._tokens(fp8)
        result = self.meter.time(op, lambda: self.send(x))
        self._check_rows(op, result[0], fp8)
        self._check_choices(op, result)

    def cached_dispatch(self, op: str, *, fp8: bool = False) -> None:
        """Times and checks a dispatch with the handle of an earlier one."""
        x = self._tokens(fp8)
        handle = self.send(self.meter.inputs.x)[4]
        result = self.meter.time(op, lambda: self.send_again(x, handle))
        self._check_rows(op, result[0], fp8)

    def worst_dispatch(self, op: str) -> None:
        """Times and checks a dispatch with as many rows as could come at worst."""
        inputs = self.meter.inputs
        result = self.meter.time(op, lambda: self.send(inputs.x, inputs.most_rows))
        count = len(inputs.rows)
        self._check_rows(op, result[0][:count], False)
        require_same(self._torch, f"{op}: choices", result[1][:count], inputs.recv_idx)
        missing = result[1][count:]
        none = self._torch.full_like(missing, -1)
        require_same(self._torch, f"{op}: choices of rows that did not come", missing, none)

    def combine(self, op: str, rows: Callable[[], Any], *, weighted: bool = False) -> None:
        """Times and checks a combine of what experts made, in the memory that `rows` gives."""
        inputs = self.meter.inputs
        _, _, recv_weights, _, handle, _ = self.send(inputs.x)
        output = rows()
        output.copy_(inputs.output)
        weights = recv_weights if weighted else None
        result = self.meter.time(op, lambda: self.sum(output, handle, weights))
        require_same(self._torch, self._named(op), result[0], inputs.sums)
        if weighted:
            require_same(self._torch, f"{self._named(op)}: weights", result[1], inputs.weights)

    def combine_echo(self, op: str) -> None:
        """Times and checks a combine of copies of the rows that came, whatever their order."""
        recv_x, _, _, _, handle, _ = self.send(self.meter.inputs.x)
        rows = recv_x.clone()
        result = self.meter.time(op, lambda: self.sum(rows, handle))
        self._check_echo(op, result[0])

    def chain(self, op: str, *, cached: bool = False) -> None:
        """Times and checks dispatches with combines of what came."""
        x = self.meter.inputs.x
        known = self.send(x)[4] if cached else None

        def pair() -> Any:
            if known is not None:
                return self.sum(self.send_again(x, known)[0], known)
            result = self.send(x)
            return self.sum(result[0], result[4])

        self._check_echo(op, self.meter.time_chain(op, pair)[0])

    def graph(self, op: str) -> None:
        """Times and checks a CUDA graph of a dispatch and a combine that is replayed."""
        torch, inputs = self._torch, self.meter.inputs

        def pair() -> tuple[Any, Any]:
            result = self.send(inputs.x, inputs.most_rows)
            return result[0], self.sum(result[0], result[4])[0]

        # A capture that fails leaves its stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()):
            pair()  # finds room in the arena, which does not grow while it is captured
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                rows, sums = pair()
        self.meter.time_chain(op, graph.replay)
        spoil(torch, (rows, sums))
        graph.replay()
        torch.cuda.synchronize()
        self._check_rows(op, rows[: len(inputs.rows)], False)
        self._check_echo(op, sums)
        graph.reset()

    # Checks

    def _named(self, op: str) -> str:
        return f"{self.meter.system}: {op}"

    def _tokens(self, fp8: bool) -> Any:
        return self.meter.inputs.fp8 if fp8 else self.meter.inputs.x

    def _check_rows(self, op: str, given: Any, fp8: bool) -> None:
        inputs, torch = self.meter.inputs, self._torch
        compare = require_same if self._ordered else require_same_rows
        if not fp8:
            compare(torch, self._named(op), given, inputs.rows)
            return
        assert inputs.fp8_rows is not None
        for part, rows, expected in zip(("rows", "scales"), given, inputs.fp8_rows, strict=True):
            compare(torch, f"{self._named(op)}: {part}", rows, expected)

    def _check_choices(self, op: str, result: Any) -> None:
        if not self._ordered:
            return
        inputs, torch = self.meter.inputs, self._torch
        require_same(torch, f"{self._named(op)}: choices", result[1], inputs.recv_idx)
        require_same(torch, f"{self._named(op)}: weights", result[2], inputs.recv_weights)

    def _check_echo(self, op: str, given: Any) -> None:
        compare = require_same if self._ordered else require_close
        compare(self._torch, self._named(op), given, self.meter.inputs.echo)
