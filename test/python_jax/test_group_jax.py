# SPDX-License-Identifier: MIT
"""Groups of jax.distributed: processes that meet in its key-value store."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from contextlib import closing

import jax
import pytest

import mscclpp_ep as ep

PATIENCE = 120
PRELUDE = """
import json, os, sys, time
import jax, jax.numpy as jnp, numpy as np
import mscclpp_ep as ep
rank, size = int(sys.argv[2]), int(sys.argv[3])
jax.distributed.initialize(sys.argv[1], size, rank, initialization_timeout=60)
def say(thing):
    print("said", json.dumps(thing), flush=True)
"""
# Processes leave together: jax ends those that are left when the one with the store goes.
EPILOGUE = """
jax.distributed.shutdown()
"""


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def processes(size: int, script: str) -> list[object]:
    """Return what the processes say, in the order of ranks."""
    address = f"127.0.0.1:{free_port()}"
    program = PRELUDE + textwrap.dedent(script) + EPILOGUE
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(rank), str(size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = []
    try:
        for process in started:
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, out + err
            lines = [line for line in out.splitlines() if line.startswith("said ")]
            said.append(json.loads(lines[0].removeprefix("said ")))
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
                process.communicate()
    return said


def test_gathers_of_any_length() -> None:
    script = """
    first, second = ep.Group.from_jax(), ep.Group.from_jax()
    seen = []
    for group in (second, first, second):
        parts = group.all_gather(b"ab" * group.rank)
        group.barrier()
        large = group.all_gather(bytes([group.rank]) * 6_000_000 * group.rank)
        assert large == [bytes([r]) * 6_000_000 * r for r in range(size)]
        seen.append([group.rank, group.size, [part.decode() for part in parts]])
    say(seen)
    """
    parts = ["", "ab", "abab"]
    assert processes(3, script) == [[[rank, 3, parts]] * 3 for rank in range(3)]


def test_dispatch_and_combine_between_two_processes() -> None:
    script = """
    tokens, hidden, experts, topk = 50 + rank, 256, 8, 3
    scores = jax.random.uniform(jax.random.key(rank), (tokens, experts))
    weights, idx = jax.lax.top_k(scores, topk)
    x = jax.random.normal(jax.random.key(9 + rank), (tokens, hidden), jnp.bfloat16)
    gain = jnp.asarray([1.0 + 0.5 * e for e in range(experts)])

    def weighted(rows, local_idx, w, first):  # what the experts of a rank make of rows
        g = jnp.where(local_idx >= 0, gain[local_idx + first] * w, 0).sum(1, keepdims=True)
        return (rows.astype(jnp.float32) * g).astype(jnp.bfloat16)

    with ep.Group.from_jax() as group, ep.Buffer(group, timeout=60) as buffer:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, experts)
        recv_x, recv_idx, recv_w, _, handle, _ = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert, topk_idx=idx, topk_weights=weights)
        assert recv_x.devices() == x.devices()
        first = rank * experts // size
        y = weighted(recv_x, recv_idx, recv_w, first)
        out, _, _ = buffer.combine(y, handle)

    plain = jnp.zeros((tokens, hidden), jnp.float32)
    for r in range(size):
        low, high = r * experts // size, (r + 1) * experts // size
        local = jnp.where((idx >= low) & (idx < high), idx - low, -1)
        plain += weighted(x, local, weights, low).astype(jnp.float32)
    say([bool((out == plain.astype(jnp.bfloat16)).all()), out.shape, str(out.dtype)])
    """
    assert processes(2, script) == [[True, [50 + rank, 256], "bfloat16"] for rank in range(2)]


def test_a_rank_that_does_not_come_is_named() -> None:
    script = """
    group = ep.Group.from_jax(timeout=1.5)
    group.barrier()
    if rank == 1:
        time.sleep(3)
        say("late")
    else:
        messages = []
        for _ in range(2):
            try:
                group.barrier()
            except ep.Timeout as error:
                messages.append(str(error))
        say(messages)
    group.close()
    """
    message = "rank 1 did not come to gather 2 within 1.5 s"
    assert processes(3, script) == [[message] * 2, "late", [message] * 2]


def test_a_rank_that_closed_its_group_is_named() -> None:
    script = """
    group = ep.Group.from_jax(timeout=60)
    group.barrier()
    if rank == 1:
        group.close()
        say("closed")
    else:
        try:
            group.barrier()
        except ep.PeerFailure as error:
            say(str(error))
    """
    assert processes(2, script) == ["rank 1 closed its group", "closed"]


def test_jax_distributed_must_be_initialized() -> None:
    assert not jax.distributed.is_initialized()
    with pytest.raises(ep.InvalidArgument, match=r"call jax\.distributed\.initialize first"):
        ep.Group.from_jax()
    with pytest.raises(ep.InvalidArgument, match="timeout"):
        ep.Group.from_jax(timeout=-1)


def test_jax_must_be_imported() -> None:
    script = (
        "import mscclpp_ep as ep\n"
        "try:\n    ep.Group.from_jax()\nexcept ep.InvalidArgument as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "import it first" in done.stdout
