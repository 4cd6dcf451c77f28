# SPDX-License-Identifier: MIT
"""What this machine and this process may use, as Linux tells it."""

import contextlib
import mmap
import os
import resource
import socket
from pathlib import Path

# Where /proc and /sys are; tests give others.
ROOT = Path("/")
_UNLIMITED = 1 << 60


def cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def cgroup_cores(root: Path = ROOT) -> float | None:
    """Return how many cores' time this process's cgroups grant, if there is a limit."""
    quotas = []
    for folder in _cgroup_folders("cpu", root):
        words = _text(folder / "cpu.max").split()
        words = words or [
            _text(folder / f"cpu.cfs_{which}_us").strip() for which in ("quota", "period")
        ]
        with contextlib.suppress(ValueError):  # "max", or no such files
            quota, period = map(int, words)
            if quota > 0 and period > 0:
                quotas.append(quota / period)
    return min(quotas, default=None)


def numa_nodes(root: Path = ROOT) -> dict[int, int]:
    """Return the NUMA nodes whose cores this process may use, and how many of those each has."""
    allowed = os.sched_getaffinity(0)
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        mine = allowed & _listed(_text(folder / "cpulist"))
        if mine:
            nodes[int(folder.name.removeprefix("node"))] = len(mine)
    return dict(sorted(nodes.items()))


def numa_balancing(root: Path = ROOT) -> bool:
    """Tell whether the kernel moves memory to the nodes that touch it."""
    return (_number(root / "proc/sys/kernel/numa_balancing") or 0) > 0


def _listed(text: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        numbers.update(range(int(low), int(high or low) + 1))
    return numbers


def memory_available(root: Path = ROOT) -> int | None:
    """Return the bytes that may still be allocated: free memory or what the cgroup leaves."""
    parts = [_meminfo("MemAvailable", root), cgroup_memory_left(root)]
    known = [part for part in parts if part is not None]
    return min(known) if known else None


def memory_total(root: Path = ROOT) -> int | None:
    """Return the bytes of memory of the machine."""
    return _meminfo("MemTotal", root)


def _meminfo(name: str, root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            with contextlib.suppress(ValueError, IndexError):
                return int(line.split()[1]) << 10
    return None


def cgroup_memory_limit(root: Path = ROOT) -> int | None:
    """Return the tightest limit of memory on this process's cgroups, if there is one."""
    limits = [limit for limit, _ in _cgroup_memory(root)]
    return min(limits, default=None)


def cgroup_memory_left(root: Path = ROOT) -> int | None:
    """Return the bytes that this process's cgroups still grant, if there is a limit."""
    return min((max(0, limit - used) for limit, used in _cgroup_memory(root)), default=None)


def _cgroup_memory(root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) of each cgroup, from this process's own to the root, with a limit."""
    found = []
    for folder in _cgroup_folders("memory", root):
        for names in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and limit < _UNLIMITED:
                found.append((limit, used or 0))
    return found


def cgroup_processes_left(root: Path = ROOT) -> int | None:
    """Return how many more processes and threads the cgroups grant, if there is a limit."""
    left = []
    for folder in _cgroup_folders("pids", root):
        limit, used = _number(folder / "pids.max"), _number(folder / "pids.current")
        if limit is not None:
            left.append(max(0, limit - (used or 0)))
    return min(left, default=None)


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Return the folders of version 1 and 2, from this process's own to the root."""
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").split("\n"):
        _, _, named = line.partition(":")
        controllers, colon, path = named.partition(":")
        if not colon:
            continue
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may be the host's; then only the root is there to read.
        folder = top / path.lstrip("/")
        folders += [one for one in (folder, *folder.parents) if one.is_relative_to(top)]
    return folders


def _text(path: Path) -> str:
    """Return the text of a file, empty if it cannot be read."""
    try:
        # A group's name may hold any bytes.
        return path.read_text("utf-8", "surrogateescape")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def open_files() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (a count, of names that come and go)


def limit_of(which: int) -> int | None:
    """Return the soft limit of a resource of this process, None if there is none."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def shared_memory_error() -> str | None:
    """Pass a memory file through an abstract Unix socket, as ranks do; say what fails."""
    payload = b"mscclpp_ep"
    name = f"\0mscclpp_ep-doctor-{os.getpid()}"
    step = "memfd_create"
    try:
        with contextlib.ExitStack() as stack:
            memory = os.memfd_create("mscclpp_ep-doctor", os.MFD_CLOEXEC)
            stack.callback(os.close, memory)
            os.ftruncate(memory, mmap.PAGESIZE)
            step = "binding an abstract Unix socket"
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(name)
            server.listen(1)
            step = "connecting to an abstract Unix socket"
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(name)
            peer = stack.enter_context(server.accept()[0])
            step = "passing a memory file through a Unix socket"
            socket.send_fds(client, [b"."], [memory])
            received = socket.recv_fds(peer, 1, 1)[1][0]
            stack.callback(os.close, received)
            step = "mapping shared memory"
            with mmap.mmap(memory, 0) as ours, mmap.mmap(received, 0) as theirs:
                ours[: len(payload)] = payload
                if theirs[: len(payload)] != payload:
                    return f"{step}: what one side wrote the other did not see"
    except (OSError, AttributeError) as error:
        return f"{step}: {error}"
    return None
