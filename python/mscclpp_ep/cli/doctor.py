# SPDX-License-Identifier: MIT
"""Says what was built, what this machine has, whether it works, and what to do if it does not."""

import resource
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

import mscclpp_ep as ep
from mscclpp_ep.cli import machine, packages
from mscclpp_ep.cli.launch import Rank, RankError, run_ranks
from mscclpp_ep.cli.problems import files_needed, find_problems
from mscclpp_ep.cli.report import size

_TIMEOUT_S = 30.0
# Parts that a build may lack, and why this one does.
_PARTS = {
    "cuda": "this version has no CUDA backend; buffers are on the CPU",
    "mscclpp": "only ranks of several hosts need it, which this version does not serve",
    "ucx": "only ranks of several hosts need it, which this version does not serve",
}


def examine(ranks: int = 2, root: Path = machine.ROOT) -> dict[str, Any]:
    """Return the whole report; it can be written as JSON.

    Args:
        ranks: how many processes take part in the self-test, and are to find room.
        root: where /proc and /sys are.
    """
    built = ep.build_info()
    report: dict[str, Any] = {
        "ranks": ranks,
        "built": built,
        "not_built": {part: why for part, why in _PARTS.items() if built[part] == "no"},
        "machine": examine_machine(ranks, root),
        "frameworks": packages.versions(),
        "mpi": packages.mpi(),
        "variables": packages.variables(),
        "self_test": _self_test(ranks),
    }
    report["problems"] = find_problems(report)
    return report


def examine_machine(ranks: int, root: Path = machine.ROOT) -> dict[str, Any]:
    """Return what the machine has, and what limits this process."""
    files = machine.open_files()
    return {
        "cores": machine.cores(),
        "cgroup_cores": machine.cgroup_cores(root),
        "numa_nodes": machine.numa_nodes(root),
        "numa_balancing": machine.numa_balancing(root),
        "memory": machine.memory_total(root),
        "memory_available": machine.memory_available(root),
        "cgroup_memory_limit": machine.cgroup_memory_limit(root),
        "cgroup_processes_left": machine.cgroup_processes_left(root),
        "open_files": files,
        "open_files_limit": machine.limit_of(resource.RLIMIT_NOFILE),
        "open_files_needed": files_needed(ranks, files),
        "address_space_limit": machine.limit_of(resource.RLIMIT_AS),
        "locked_memory_limit": machine.limit_of(resource.RLIMIT_MEMLOCK),
        "shared_memory_error": machine.shared_memory_error(),
    }


def _self_test(ranks: int) -> dict[str, Any]:
    try:
        rows: list[int] = run_ranks(exchange, None, ranks, timeout=2 * _TIMEOUT_S)
    except RankError as error:
        return {"passed": False, "error": str(error) + "\n" + error.details}
    return {"passed": True, "rows": sum(rows)}


def exchange(rank: Rank, _config: None) -> int:
    """Dispatch small integers and combine them unchanged, which must give exact multiples.

    Returns:
        How many rows this rank received.

    Raises:
        RuntimeError: if the result is wrong.
    """
    experts, hidden = 4, 256
    random = np.random.default_rng(rank.index)
    topk_idx = random.integers(-1, experts, size=(48 + 16 * rank.index, 2))
    x = random.integers(-64, 64, size=(len(topk_idx), hidden)).astype(ml_dtypes.bfloat16)
    with (
        rank.join() as group,
        ep.Buffer(group, device="cpu", timeout=_TIMEOUT_S) as buffer,
    ):
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, experts)
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=np.ones(topk_idx.shape, np.float32),
        )
        output, _, _ = buffer.combine(recv_x, handle)
        expected = x.astype(np.float32) * in_rank.sum(axis=1, keepdims=True)
        if not np.array_equal(output.astype(np.float32), expected):
            raise RuntimeError("dispatch and combine gave a wrong result")
        return len(recv_x)


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print a report for people."""
    sections = {
        "Built": report["built"],
        "Left out": report["not_built"],
        "Machine": {
            key.replace("_", " "): _readable(key, value) for key, value in report["machine"].items()
        },
        "Packages": report["frameworks"],
        "MPI": report["mpi"],
        "Environment": report["variables"],
    }
    for title, entries in sections.items():
        if not entries:
            continue
        console.print(f"[bold]{title}[/]")
        for key, value in entries.items():
            console.print(f"  {key:22} {_word(value)}", markup=False)
    test = report["self_test"]
    console.print(f"[bold]Self-test[/]: {report['ranks']} processes, dispatch and combine")
    if test["passed"]:
        console.print(f"  [green]passed[/], {test['rows']} rows")
    else:
        console.print("  [red]failed[/]")
        console.print(test["error"].strip(), markup=False)
    for entry in report["problems"]:
        console.print(f"[bold red]problem:[/] {entry['problem']}")
        console.print(f"  what to do: {entry['advice']}")
    if not report["problems"]:
        console.print("[bold green]no problems found[/]")


def _readable(key: str, value: Any) -> Any:
    if key == "shared_memory_error":
        return value or "none"
    if key == "numa_nodes":
        return ", ".join(f"{node} ({cores} cores)" for node, cores in value.items()) or "unknown"
    if key == "locked_memory_limit":
        return f"{_quantity(key, value)} (not needed on the CPU)"
    return _quantity(key, value)


def _quantity(key: str, value: Any) -> Any:
    if value is None:
        return "unlimited" if "limit" in key or "cgroup" in key else "unknown"
    return size(value) if "memory" in key or "address" in key else value


def _word(value: Any) -> str:
    if value is None:
        return "not found"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
