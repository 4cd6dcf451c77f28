# SPDX-License-Identifier: MIT
"""What this machine and this process may use, as Linux tells it."""

import contextlib
import mmap
import os
import resource
import socket
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_available() -> int | None:
    """Return the bytes that may still be allocated: free memory or what the cgroup leaves."""
    parts = [_meminfo("MemAvailable"), cgroup_memory_left()]
    known = [part for part in parts if part is not None]
    return min(known) if known else None


def memory_total() -> int | None:
    """Return the bytes of memory of the machine."""
    return _meminfo("MemTotal")


def _meminfo(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None


def cgroup_memory_limit() -> int | None:
    """Return the tightest limit of memory on this process's cgroups, if there is one."""
    limits = [limit for limit, _ in _cgroup_memory()]
    return min(limits, default=None)


def cgroup_memory_left() -> int | None:
    """Return the bytes that this process's cgroups still grant, if there is a limit."""
    return min((max(0, limit - used) for limit, used in _cgroup_memory()), default=None)


def _cgroup_memory() -> list[tuple[int, int]]:
    """Return (limit, used) of each cgroup, from this process's own to the root, with a limit."""
    found = []
    for folder, limit_file, used_file in _cgroup_folders():
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and limit < _UNLIMITED:
            found.append((limit, used or 0))
    return found


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    """Return the folders of version 1 and 2, with the names of their files."""
    try:
        # A group's name may hold any bytes.
        lines = _OWN_CGROUPS.read_text("utf-8", "surrogateescape").split("\n")
    except OSError:
        return []
    folders = []
    for line in lines:
        _, _, named = line.partition(":")
        controllers, colon, path = named.partition(":")
        if not colon:
            continue
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root = _CGROUPS / "memory"
        else:
            continue
        # In a container the path may be the host's; then only the root is there to read.
        folder = root / path.lstrip("/")
        chain = [folder, *folder.parents]
        folders += [(f, *names) for f in chain if f.is_relative_to(root)]
    return folders


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


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
