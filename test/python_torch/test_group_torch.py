# SPDX-License-Identifier: MIT
"""Groups under torchrun, in each of its ways of launching, and groups of torch.distributed."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PATIENCE = 120
PRELUDE = """
import json, os, pathlib, sys, time
import torch.distributed as dist
from mscclpp_ep import Error, Group, InvalidArgument, PeerFailure, Timeout, as_group
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def say(thing):
    (pathlib.Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(thing))
"""
FROM_ENV = """
seen = []
for _ in range(2):
    group = Group.from_env(timeout=60)
    parts = group.all_gather(b"ab" * group.rank)
    group.barrier()
    seen.append([group.rank, group.size, [part.decode() for part in parts]])
say(seen)
"""
FROM_TORCH = """
dist.init_process_group("gloo")
seen = []
for group in (Group.from_torch(), as_group(dist.group.WORLD)):
    parts = group.all_gather(b"ab" * group.rank)
    group.barrier()
    seen.append([group.rank, group.size, [part.decode() for part in parts]])
say(seen)
dist.destroy_process_group()
"""


def start(directory: Path, script: str, *options: str) -> subprocess.Popen[str]:
    program = directory / "program.py"
    program.write_text(PRELUDE + script)
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(program)]
    foreign = ("MASTER_", "MSCCLPP_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return subprocess.Popen(
        [*command, str(directory)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*launchers: subprocess.Popen[str]) -> None:
    """Wait for torchrun; its ranks die with it if it does not end."""
    try:
        for launcher in launchers:
            out, _ = launcher.communicate(timeout=PATIENCE)
            assert launcher.returncode == 0, out
    finally:
        for launcher in launchers:
            if launcher.returncode is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.communicate()


def said(directory: Path, size: int) -> list[object]:
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]


def free_port() -> int:
    """Return a port that no outgoing connection will get, for it is below their range."""
    while True:
        with suppress(OSError):
            port = 20000 + secrets.randbelow(12000)
            socket.create_server(("127.0.0.1", port)).close()
            return port


def expected(size: int) -> list[object]:
    parts = ["ab" * rank for rank in range(size)]
    return [[[rank, size, parts]] * 2 for rank in range(size)]


@pytest.mark.parametrize("way", ["standalone", "master-port", "rdzv-endpoint"])
def test_torchrun(tmp_path: Path, way: str) -> None:
    port = free_port()
    options: Sequence[str] = {
        "standalone": ["--standalone"],
        "master-port": ["--master-port", str(port)],
        "rdzv-endpoint": ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"],
    }[way]
    finish(start(tmp_path, FROM_ENV, "--nproc-per-node", "3", *options))
    assert said(tmp_path, 3) == expected(3)


def test_torchrun_with_two_agents(tmp_path: Path) -> None:
    common = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    common += [f"--master-port={free_port()}"]
    finish(*(start(tmp_path, FROM_ENV, *common, f"--node-rank={node}") for node in range(2)))
    assert said(tmp_path, 4) == expected(4)


def test_from_env_beside_torch_distributed(tmp_path: Path) -> None:
    script = 'dist.init_process_group("gloo")\n' + FROM_ENV + "dist.destroy_process_group()\n"
    finish(start(tmp_path, script, "--nproc-per-node=3", "--standalone"))
    assert said(tmp_path, 3) == expected(3)


def test_from_torch(tmp_path: Path) -> None:
    finish(start(tmp_path, FROM_TORCH, "--nproc-per-node=3", "--standalone"))
    assert said(tmp_path, 3) == expected(3)


def test_from_torch_subgroup(tmp_path: Path) -> None:
    script = """
dist.init_process_group("gloo")
some = dist.new_group([0, 2])
try:
    group = as_group(some) if rank != 1 else Group.from_torch(some)
    large = group.all_gather(bytes([7 + rank]) * 3_000_000 * rank)
    assert large == [b"", bytes([9]) * 6_000_000]
    assert group.all_gather(b"") == [b"", b""]
    say([group.rank, group.size])
except InvalidArgument as error:
    say(str(error))
dist.barrier()
dist.destroy_process_group()
"""
    finish(start(tmp_path, script, "--nproc-per-node=3", "--standalone"))
    first, outsider, last = said(tmp_path, 3)
    assert (first, last) == ([0, 2], [1, 2])
    assert "this process is not in the torch.distributed group given" in str(outsider)


def test_from_torch_names_its_needs(tmp_path: Path) -> None:
    script = """
lines = []
for attempt in (Group.from_torch, lambda: Group.from_torch("group")):
    try:
        attempt()
    except InvalidArgument as error:
        lines.append(str(error))
    if not dist.is_initialized():
        dist.init_process_group("gloo")
say(lines)
dist.destroy_process_group()
"""
    finish(start(tmp_path, script, "--nproc-per-node=1", "--standalone"))
    lines = said(tmp_path, 1)[0]
    assert isinstance(lines, list)
    assert lines[0] == "torch.distributed is not initialized; call init_process_group first"
    assert lines[1].startswith("process_group is 'group', no torch.distributed group")


def test_torch_timeout_becomes_ours(tmp_path: Path) -> None:
    script = """
import datetime
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
group = Group.from_torch()
group.barrier()
done = pathlib.Path(sys.argv[1]) / "1.json"
if rank == 0:
    try:
        group.barrier()
        say("no error")
    except Error as error:
        say([type(error).__name__, str(error)])
    os._exit(0)
while not (done.parent / "0.json").exists():
    time.sleep(0.01)
say("done")
os._exit(0)
"""
    finish(start(tmp_path, script, "--nproc-per-node=2", "--standalone"))
    error = said(tmp_path, 2)[0]
    assert isinstance(error, list)
    assert error[0] == "Timeout"
    assert error[1].startswith("a gather over torch.distributed failed on rank 0")
