# SPDX-License-Identifier: MIT
"""Says what was built, what this machine has, whether it works, and what to do if it does not."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

import mscclpp_ep as ep
from mscclpp_ep.cli import gpus, machine, packages
from mscclpp_ep.cli.gpu_memory import GpuMemory
from mscclpp_ep.cli.launch import Rank, RankError, run_ranks
from mscclpp_ep.cli.problems import files_needed, find_problems
from mscclpp_ep.cli.report import size

_TIMEOUT_S = 30.0
_EXPERTS, _HIDDEN = 4, 256  # of the self-tests
# Parts that a build may lack, and why this one does.
_PARTS = {
    "cuda": "nvcc of CUDA 12.5 or later was not found, or not wanted; buffers are on the CPU",
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
        "gpus": gpus.examine(root),
        "variables": packages.variables(),
        "self_test": _self_test(exchange, None, ranks),
        "gpu_self_test": None,
    }
    count = len(report["gpus"]["devices"])
    if count > 0:
        report["gpu_self_test"] = _self_test(exchange_on_gpu, count, ranks)
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


def passed(report: dict[str, Any]) -> bool:
    """Tell whether ranks can exchange rows, on the CPU and on the GPUs that there are."""
    on_gpus = report["gpu_self_test"]
    return report["self_test"]["passed"] and (on_gpus is None or on_gpus["passed"])


def _self_test(target: Callable[[Rank, Any], int], argument: Any, ranks: int) -> dict[str, Any]:
    try:
        rows: list[int] = run_ranks(target, argument, ranks, timeout=2 * _TIMEOUT_S)
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
    with (
        rank.join() as group,
        ep.Buffer(group, device="cpu", timeout=_TIMEOUT_S) as buffer,
    ):
        x, topk_idx, weights = _inputs(rank)
        recv_x, output = _there_and_back(buffer, x, topk_idx, weights)
        _check(output, x, topk_idx, rank.size)
        return len(recv_x)


def exchange_on_gpu(rank: Rank, gpus: int) -> int:
    """Do the same with rank r on GPU r modulo `gpus`.

    Returns:
        How many rows this rank received.

    Raises:
        RuntimeError: if the result is wrong.
    """
    gpu = rank.index % gpus
    with (
        rank.join() as group,
        ep.Buffer(group, device=f"cuda:{gpu}", timeout=_TIMEOUT_S) as buffer,
    ):
        memory = GpuMemory(gpu)
        inputs = _inputs(rank)
        tensors = [buffer.empty(array.shape, array.dtype) for array in inputs]
        for tensor, array in zip(tensors, inputs, strict=True):
            memory.put(tensor, array)
        recv_x, output = _there_and_back(buffer, *tensors)
        x, topk_idx, _ = inputs
        _check(memory.get(output, x.dtype), x, topk_idx, rank.size)
        return int(recv_x.shape[0])


def _inputs(rank: Rank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(rank.index)
    topk_idx = random.integers(-1, _EXPERTS, size=(48 + 16 * rank.index, 2))
    x = random.integers(-64, 64, size=(len(topk_idx), _HIDDEN)).astype(ml_dtypes.bfloat16)
    return x, topk_idx, np.ones(topk_idx.shape, np.float32)


def _there_and_back(buffer: ep.Buffer, x: Any, topk_idx: Any, weights: Any) -> tuple[Any, Any]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, _EXPERTS)
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=weights,
    )
    output, _, _ = buffer.combine(recv_x, handle)
    return recv_x, output


def _check(output: np.ndarray, x: np.ndarray, topk_idx: np.ndarray, ranks: int) -> None:
    """Compare with each token times the number of ranks that it went to."""
    holders = topk_idx // -(-_EXPERTS // ranks)
    times = np.zeros(len(x), np.float32)
    for rank in range(ranks):
        times += ((topk_idx >= 0) & (holders == rank)).any(axis=1)
    if not np.array_equal(output.astype(np.float32), x.astype(np.float32) * times[:, None]):
        raise RuntimeError("dispatch and combine gave a wrong result")


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
    _print_gpus(console, report.get("gpus"))
    console.print(f"[bold]Self-test[/]: {report['ranks']} processes, dispatch and combine")
    _print_test(console, report["self_test"])
    on_gpus = report.get("gpu_self_test")
    if on_gpus is not None:
        console.print(f"[bold]Self-test on GPUs[/]: {report['ranks']} processes, the same")
        _print_test(console, on_gpus)
    for entry in report["problems"]:
        console.print(f"[bold red]problem:[/] {entry['problem']}")
        console.print(f"  what to do: {entry['advice']}")
    if not report["problems"]:
        console.print("[bold green]no problems found[/]")


def _print_test(console: Console, test: dict[str, Any]) -> None:
    if test["passed"]:
        console.print(f"  [green]passed[/], {test['rows']} rows")
    else:
        console.print("  [red]failed[/]")
        console.print(test["error"].strip(), markup=False)


def _print_gpus(console: Console, found: dict[str, Any] | None) -> None:
    if found is None:
        return
    console.print("[bold]GPUs[/]")
    entries = {
        "runtime": gpus.version_name(found["runtime"]),
        "driver": gpus.version_name(found["driver"]),
        "driver release": found["driver_release"],
        "NCCL": found["nccl"],
        "torch is built for": found["torch_built_for"],
        **{name: value or "not set" for name, value in found["variables"].items()},
    }
    for number, device in enumerate(found["devices"]):
        entries[f"GPU {number}"] = _gpu(number, device)
    for key, value in entries.items():
        console.print(f"  {key:27} {_word(value)}", markup=False)
    if found["topology"]:
        console.print("  links (nvidia-smi topo -m):")
        console.print(found["topology"], markup=False)


def _gpu(number: int, device: dict[str, Any]) -> str:
    capability = ".".join(map(str, device["capability"]))
    reached = [str(n) for n, peer in enumerate(device["peers"]) if peer and n != number]
    return (
        f"{device['name']}, {size(device['free_bytes'])} of {size(device['total_bytes'])} free, "
        f"{device['multiprocessors']} SMs, compute capability {capability}, "
        f"memory shared by file descriptors: {_word(device['posix_handles'])}, "
        f"reaches: {', '.join(reached) or 'no other'}"
    )


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
