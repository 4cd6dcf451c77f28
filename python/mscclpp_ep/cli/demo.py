# SPDX-License-Identifier: MIT
"""A mixture-of-experts layer over rank processes of this host, checked against one process."""

import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import mscclpp_ep as ep
from mscclpp_ep.cli import InputError, machine, moe
from mscclpp_ep.cli.launch import Rank, run_ranks

PHASES = ("router", "layout", "dispatch", "experts", "combine")
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Task:
    """What the ranks compute, and how often."""

    model: moe.Model
    tokens: moe.Ids
    repeats: int

    @property
    def steps(self) -> int:
        """How many steps each rank reports."""
        return self.repeats + 2


@dataclass(frozen=True)
class RankResult:
    """What one rank saw and computed.

    Attributes:
        rows_to: rows sent to each rank, itself included.
        load: routes received by each of its experts.
        seconds: of each phase, one a repeat.
        output: bfloat16[its tokens, hidden].
        topk_weights: as combine returned them.
    """

    rows_to: list[int]
    load: list[int]
    seconds: dict[str, list[float]]
    output: moe.Array
    topk_weights: moe.Floats


class _Clock:
    """Time phases that all ranks begin together, so that none counts its wait for another."""

    def __init__(self, group: ep.Group) -> None:
        self._group = group
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._group.barrier()
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)


class _Layer:
    """One rank's part of the layer."""

    def __init__(self, model: moe.Model, rank: Rank, group: ep.Group, buffer: ep.Buffer) -> None:
        held = moe.experts_of(rank.index, rank.size, model.experts)
        self._model = model
        self._experts = [moe.make_expert(model, index) for index in held]
        self._buffer = buffer
        self.clock = _Clock(group)

    def __call__(self, x: moe.Array) -> RankResult:
        clock, buffer = self.clock, self._buffer
        with clock.phase("router"):
            topk_idx, topk_weights = moe.route(self._model, x)
        with clock.phase("layout"):
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(
                topk_idx, self._model.experts
            )
        with clock.phase("dispatch"):
            recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
                x,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
            )
        with clock.phase("experts"):
            # In the library's own memory, from which combine needs no copy.
            expert_output = buffer.empty(recv_x.shape, recv_x.dtype)
            expert_output[:] = moe.apply_experts(
                recv_x, recv_idx, recv_weights, enumerate(self._experts)
            )
        with clock.phase("combine"):
            output, weights, _ = buffer.combine(expert_output, handle, topk_weights=recv_weights)
        return RankResult(
            rows_to=per_rank.tolist(),
            load=list(counts),
            seconds=dict(clock.seconds),
            output=np.array(output),
            topk_weights=np.array(weights),
        )


def run_rank(rank: Rank, task: Task) -> RankResult:
    """Run one rank: the layer once to warm up, then as often as asked."""
    rank.report("parameters")
    cuts = moe.shares(len(task.tokens), rank.size)
    mine = task.tokens[cuts[rank.index] : cuts[rank.index + 1]]
    x = moe.embed(task.model, mine)
    with (
        rank.join() as group,
        ep.Buffer(group, device="cpu", timeout=_TIMEOUT_S) as buffer,
    ):
        layer = _Layer(task.model, rank, group, buffer)
        rank.report("warm-up")
        layer(x)
        layer.clock.seconds.clear()
        for repeat in range(task.repeats):
            rank.report(f"layer {repeat + 1} of {task.repeats}")
            result = layer(x)
    return result


def check_sizes(task: Task, ranks: int) -> None:
    """Refuse what makes no sense, or does not fit in memory.

    Raises:
        InputError: with what would do.
    """
    model = task.model
    if model.topk > model.experts:
        raise InputError(
            f"--topk {model.topk} is more than --experts {model.experts}: "
            "a token chooses different experts"
        )
    tokens, hidden = len(task.tokens), model.hidden
    needed = (
        4 * 2 * model.experts * hidden * model.ffn
        + 6 * (ranks + 1) * model.vocabulary * hidden
        + 8 * tokens * (4 * hidden + 3 * model.experts)
        + 24 * tokens * hidden * min(model.topk, ranks)
    )
    available = machine.memory_available()
    if available is not None and needed > available:
        raise InputError(
            f"this needs about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
            "available: lower --tokens, --hidden, --ffn, --experts or --ranks"
        )


def run_demo(task: Task, ranks: int, on_step: Callable[[int, str], None]) -> dict[str, Any]:
    """Run the layer over `ranks` processes and compare it with the layer in this one.

    Returns:
        A report that can be written as JSON; `report["check"]["passed"]` is the verdict.

    Raises:
        InputError: if the sizes make no sense.
        RankError: if a rank fails.
    """
    check_sizes(task, ranks)
    results: list[RankResult] = run_ranks(run_rank, task, ranks, on_step=on_step)
    reference = moe.compute_reference(task.model, task.tokens, ranks)
    load = [count for result in results for count in result.load]
    rows = [result.rows_to for result in results]
    row_bytes = task.model.hidden * moe.BFLOAT16.itemsize
    return {
        "version": ep.__version__,
        "settings": asdict(task.model)
        | {"ranks": ranks, "tokens": len(task.tokens), "repeats": task.repeats},
        "tokens_per_rank": [len(result.output) for result in results],
        "routes": sum(load),
        "load": load,
        "rows": rows,
        "row_bytes": row_bytes,
        "bytes_each_way": row_bytes * sum(map(sum, rows)),
        "bytes_each_way_between_ranks": row_bytes
        * sum(n for i, row in enumerate(rows) for j, n in enumerate(row) if i != j),
        "seconds": {phase: _seconds(results, phase) for phase in PHASES},
        "check": check(results, load, reference),
    }


def _seconds(results: list[RankResult], phase: str) -> dict[str, float]:
    medians = [statistics.median(result.seconds[phase]) for result in results]
    return {"min": min(medians), "max": max(medians)}


def check(results: list[RankResult], load: list[int], reference: moe.Reference) -> dict[str, Any]:
    """Compare what the ranks computed with the reference."""
    output = np.concatenate([result.output for result in results])
    weights = np.concatenate([result.topk_weights for result in results])
    difference = moe.compare(output, reference)
    weights_equal = np.array_equal(weights, reference.topk_weights)
    load_equal = load == reference.load
    return {
        "passed": difference.beyond == 0 and weights_equal and load_equal,
        "bound": moe.BOUND_TEXT,
        "elements": difference.elements,
        "beyond_bound": difference.beyond,
        "largest_difference": _finite(difference.largest),
        "largest_share_of_bound": _finite(difference.of_bound),
        "weights_equal": weights_equal,
        "load_equal": load_equal,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def write_json(report: dict[str, Any]) -> None:
    """Write a report to standard output."""
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")
