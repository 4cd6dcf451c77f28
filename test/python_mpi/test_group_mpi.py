# SPDX-License-Identifier: MIT
"""Groups of mpi4py communicators, under a real mpirun."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

PATIENCE = 120
PRELUDE = """
import json, sys
from mscclpp_ep import Group, InvalidArgument, as_group
def say(thing):
    print(json.dumps(thing) + "\\n", end="", flush=True)
"""


def mpirun(size: int, script: str) -> list[object]:
    """Return what the ranks say, in the order of ranks if each says one line that starts so."""
    launcher = Path(sysconfig.get_path("scripts")) / "mpirun"
    command = [str(launcher), "--allow-run-as-root", "--oversubscribe", "-n", str(size)]
    run = subprocess.run(
        [*command, sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return sorted(json.loads(line) for line in run.stdout.splitlines())


def test_from_mpi_imports_mpi4py_itself() -> None:
    script = """
assert "mpi4py" not in sys.modules
group = Group.from_mpi()
parts = group.all_gather(b"ab" * group.rank)
group.barrier()
say([group.rank, group.size, [part.decode() for part in parts]])
"""
    assert mpirun(3, script) == [[rank, 3, ["", "ab", "abab"]] for rank in range(3)]


def test_communicators() -> None:
    script = """
from mpi4py import MPI
world = MPI.COMM_WORLD
half = world.Split(world.rank % 2, -world.rank)
seen = [world.rank]
for comm in (world, half, MPI.COMM_SELF):
    group = as_group(comm)
    assert group.all_gather(b"") == [b""] * group.size
    large = group.all_gather(bytes([world.rank]) * 1_000_000)
    assert all(part == part[:1] * 1_000_000 for part in large)
    seen.append([group.rank, group.size, [part[0] for part in large]])
half.Free()
say(seen)
"""
    world = [0, 1, 2]
    assert mpirun(3, script) == [
        [0, [0, 3, world], [1, 2, [2, 0]], [0, 1, [0]]],
        [1, [1, 3, world], [0, 1, [1]], [0, 1, [1]]],
        [2, [2, 3, world], [0, 2, [2, 0]], [0, 1, [2]]],
    ]


def test_what_is_no_communicator_is_refused() -> None:
    script = """
from mpi4py import MPI
world = MPI.COMM_WORLD
local = world.Split(world.rank, 0)
inter = local.Create_intercomm(0, world, 1 - world.rank)
for thing in (MPI.COMM_NULL, inter, "comm"):
    try:
        Group.from_mpi(thing)
        say([world.rank, "accepted"])
    except InvalidArgument as error:
        say([world.rank, str(error).partition("; ")[2]])
inter.Free()
local.Free()
"""
    text = "give an mpi4py intracommunicator that this process is in"
    assert mpirun(2, script) == [[rank, text] for rank in (0, 1) for _ in range(3)]


def test_freed_communicator_is_refused() -> None:
    script = """
from mpi4py import MPI
comm = MPI.COMM_WORLD.Dup()
comm.Free()
try:
    as_group(comm)
except InvalidArgument as error:
    say(str(error))
"""
    (text,) = mpirun(1, script)
    assert "give an mpi4py intracommunicator" in str(text)
