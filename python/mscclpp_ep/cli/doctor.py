# SPDX-License-Identifier: MIT
"""Says what was built, what this machine has, whether it works, and what to do if it does not."""

import resource
from importlib import metadata
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

import mscclpp_ep as ep
from mscclpp_ep.cli import machine
from mscclpp_ep.cli.launch import Rank, RankError, run_ranks
from mscclpp_ep.cli.report import size

_FRAMEWORKS = ("numpy", "ml_dtypes", "torch", "jax", "cupy", "mpi4py")
_TIMEOUT_S = 30.0
# Each rank holds a memory file and a socket for each other rank, and a few of its own.
_FEW_FILES = 256
_LITTLE_MEMORY = 512 << 20


def examine() -> dict[str, Any]:
    """Return the whole report; it can be written as JSON."""
    report: dict[str, Any] = {
        "built": ep.build_info(),
        "machine": _machine(),
        "frameworks": {name: _version(name) for name in _FRAMEWORKS},
        "self_test": _self_test(),
    }
    report["problems"] = find_problems(report)
    return report


def _machine() -> dict[str, Any]:
    return {
        "cores": machine.cores(),
        "memory": machine.memory_total(),
        "memory_available": machine.memory_available(),
        "cgroup_memory_limit": machine.cgroup_memory_limit(),
        "open_files_limit": machine.limit_of(resource.RLIMIT_NOFILE),
        "locked_memory_limit": machine.limit_of(resource.RLIMIT_MEMLOCK),
        "shared_memory_error": machine.shared_memory_error(),
    }


def _version(name: str) -> str | None:
    """Return the installed version of a package, which is not imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _self_test() -> dict[str, Any]:
    try:
        rows: list[int] = run_ranks(exchange, None, 2, timeout=2 * _TIMEOUT_S)
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


def find_problems(report: dict[str, Any]) -> list[dict[str, str]]:
    """Return what is wrong, each with what to do about it, the worst first."""
    found = report["machine"]
    problems: list[tuple[str, str]] = []
    if error := found["shared_memory_error"]:
        problems.append(
            (
                f"ranks of this host cannot share memory: {error}",
                "allow memfd_create and abstract Unix sockets: they may be denied by a seccomp "
                "profile or by the sandbox of a container; ranks as threads of one process work",
            )
        )
    if not report["self_test"]["passed"]:
        message = report["self_test"]["error"].strip().splitlines()[0]
        problems.append((f"the self-test failed: {message}", "see its output above"))
    available = found["memory_available"]
    if available is not None and available < _LITTLE_MEMORY:
        problems.append(
            (
                f"only {size(available)} of memory are available",
                "end other programs, raise the container's limit or pass a small max_arena_bytes "
                "to Buffer",
            )
        )
    files = found["open_files_limit"]
    if files is not None and files < _FEW_FILES:
        problems.append(
            (
                f"a process may open only {files} files",
                "raise the limit with: ulimit -n 4096",
            )
        )
    return [{"problem": problem, "advice": advice} for problem, advice in problems]


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print a report for people."""
    sections = {
        "Built": report["built"],
        "Machine": {
            key.replace("_", " "): _readable(key, value) for key, value in report["machine"].items()
        },
        "Packages": report["frameworks"],
    }
    for title, entries in sections.items():
        console.print(f"[bold]{title}[/]")
        for key, value in entries.items():
            console.print(f"  {key:22} {_word(value)}", markup=False)
    test = report["self_test"]
    console.print("[bold]Self-test[/]: two processes, dispatch and combine")
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
    if value is None:
        return "unlimited" if "limit" in key else "unknown"
    return size(value) if "memory" in key else value


def _word(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
