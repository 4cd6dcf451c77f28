# SPDX-License-Identifier: MIT
"""The module that programs written for `deep_ep` import: names, signatures, and how it is found."""

from __future__ import annotations

import inspect
import os
import secrets
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import mscclpp_ep as ep
from harness.threads import on_ranks
from mscclpp_ep import deep_ep

if TYPE_CHECKING:
    from pathlib import Path

SIGNATURES = {
    "Buffer.set_num_sms": "new_num_sms",
    "Buffer.capture": "",
    "Buffer.get_comm_stream": "self",
    "Buffer.get_local_buffer_tensor": "self, dtype, size=None, offset=0, use_rdma_buffer=False",
    "Buffer.get_dispatch_config": "num_ranks",
    "Buffer.get_combine_config": "num_ranks",
    "Buffer.get_low_latency_rdma_size_hint": (
        "num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts"
    ),
    "Buffer._unpack_bias": "bias",
    "EventOverlap": "event=None, extra_tensors=None",
    "EventOverlap.current_stream_wait": "self, release_handle=False",
    "EventOverlap.register_hook_after_wait": "self, hook_after_wait",
    "utils.envs.init_dist": "local_rank, num_local_ranks, seed=0",
    "utils.envs.init_seed": "global_seed",
    "utils.envs.get_global_seed": "",
    "utils.envs.dist_print": "s='', once_in_node=False",
    "utils.envs.get_rdma_gbs": "nic_name='mlx5_0'",
    "utils.math.calc_diff": "x, y",
    "utils.math.inplace_unique": "x, num_slots",
    "utils.math.per_token_cast_to_fp8": "x",
    "utils.math.per_token_cast_back": "x_fp8, x_scales",
    "utils.math.hash_tensor": "t",
    "utils.math.create_grouped_scores": "scores, group_idx, num_groups",
    "utils.math.align": "x, y",
    "utils.math.ceil_div": "x, y",
    "utils.math.count_bytes": "*tensors",
    "utils.math.safe_div": "a, b",
    "utils.testing.bench": "fn, num_warmups=50, num_tests=50, post_fn=None, flush_l2=True",
    "utils.testing.bench_kineto": (
        "fn, kernel_names, num_tests=30, suppress_kineto_output=False, trace_path=None, "
        "flush_l2=True, barrier_comm_profiling=False, num_kernels_per_period=1, barrier=None"
    ),
    "utils.gate.get_unbalanced_scores": (
        "num_tokens, num_experts, num_ranks, num_topk, ratio, precise"
    ),
    "utils.refs.dispatch": "x, topk_idx, topk_weights, num_max_tokens_per_rank, num_experts",
    "utils.refs.combine": (
        "y, topk_idx, num_scaleout_ranks, num_scaleup_ranks, num_experts, bias, reduce_in_local, "
        "reduce_in_scaleup"
    ),
    "utils.refs.generate_pre_combine_data": (
        "src_token_global_idx, num_max_tokens_per_rank, num_topk, hidden"
    ),
    "utils.refs.ordered_accumulate": "data, initial_value=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    found = deep_ep
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(inspect.Signature(bare)).removeprefix("(").removesuffix(")")
    assert text == SIGNATURES[name]


def test_names() -> None:
    assert deep_ep.Buffer is ep.Buffer
    assert deep_ep.Config is ep.Config
    assert deep_ep.topk_idx_t is torch.int64
    assert deep_ep.__version__ == ep.__version__
    assert deep_ep.utils.EventOverlap is deep_ep.EventOverlap is ep.EventOverlap
    assert deep_ep.utils.EventHandle is deep_ep.EventHandle is deep_ep.utils.event.EventHandle
    assert deep_ep.Buffer.is_sm90_compiled() is False


def test_configs_for_any_number_of_ranks() -> None:
    for ranks in (1, 2, 3, 5, 12, 200):
        for get in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config):
            assert get(ranks).get_nvl_buffer_size_hint(14336, ranks) > 0
    hint = deep_ep.Buffer.get_dispatch_config(3).get_nvl_buffer_size_hint(14336, 3)
    assert hint == deep_ep.Buffer.get_dispatch_config(4).get_nvl_buffer_size_hint(14336, 3)
    with pytest.raises(ValueError, match="Unsupported number of EP ranks: 0"):
        deep_ep.Buffer.get_dispatch_config(0)


def test_a_hook_is_called_by_one_wait() -> None:
    calls = []
    event = deep_ep.Buffer.capture()
    event.register_hook_after_wait(lambda: calls.append("waited"))
    event.current_stream_wait()
    event.current_stream_wait()
    assert calls == ["waited"]
    event.register_hook_after_wait(lambda: calls.append("left"))
    with event(release_handle=True) as entered:
        assert entered is event
        assert calls == ["waited"]
    assert calls == ["waited", "left"]
    assert event.event is None
    with pytest.raises(RuntimeError, match="no event"):
        event.current_stream_wait()


def test_the_constructor_takes_what_means_nothing_here() -> None:
    def body(group: ep.Group) -> None:
        options = {"low_latency_mode": False, "num_qps_per_rank": 12, "explicitly_destroy": True}
        buffer = deep_ep.Buffer(group, int(2e9), int(1e9), **options, allow_mnnvl=True)
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (2_000_000_000, 1_000_000_000)
        runtime = buffer.runtime
        assert runtime.is_available()
        assert (runtime.get_num_rdma_ranks(), runtime.get_rdma_rank()) == (1, 0)
        roots = (runtime.get_root_rdma_rank(True), runtime.get_root_rdma_rank(False))
        assert roots == (group.rank, 0)
        assert isinstance(runtime.get_local_device_id(), int)
        for call in (buffer.get_comm_stream, runtime.get_comm_stream):
            with pytest.raises(ep.NotBuilt, match="get_comm_stream"):
                call()
        buffer.destroy()
        assert buffer.runtime is None
        assert not runtime.is_available()

    on_ranks(2, body)


def test_staging_tensors() -> None:
    def body(group: ep.Group) -> None:
        buffer = deep_ep.Buffer(group, num_nvl_bytes=4096, num_rdma_bytes=512)
        get = buffer.get_local_buffer_tensor
        assert get(torch.bfloat16).shape == (2048,)
        everything = get(dtype=torch.int8, use_rdma_buffer=True).zero_()
        assert everything.shape == (512,)
        part = get(torch.float32, torch.Size([3, 5]), offset=4096 - 60)
        assert (part.dtype, part.shape) == (torch.float32, (3, 5))
        assert get(torch.float8_e4m3fn, offset=4096).numel() == 0
        assert buffer.runtime.get_local_buffer_tensor(torch.bool, 96, True).shape == (416,)
        assert isinstance(get(np.float16, (2, 3)), np.ndarray)
        for wrong in ({"size": (1025,)}, {"offset": 4097}, {"offset": -4}, {"size": (-1, 2)}):
            with pytest.raises(ep.InvalidArgument):
                get(torch.float32, **wrong)
        buffer.destroy()

    on_ranks(1, body)


def test_a_group_for_missing_devices_says_what_to_give() -> None:
    from mscclpp_ep._group_channels import TorchChannel

    channel = TorchChannel.__new__(TorchChannel)
    channel._torch, channel._dist = torch, torch.distributed
    channel._reference = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_backend_config", lambda group: "cuda:nccl")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ep.InvalidArgument, match=r"cuda devices only.*gloo"):
            channel._device()


# How it is found


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    foreign = ("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return subprocess.run(
        [sys.executable, *command],
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_as_deep_ep(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "mscclpp_ep", "run-as-deep-ep", *arguments, **variables)


def free_port() -> int:
    """A port that no outgoing connection will get, for it is below their range."""
    while True:
        with suppress(OSError):
            port = 20000 + secrets.randbelow(12000)
            socket.create_server(("127.0.0.1", port)).close()
            return port


def test_install() -> None:
    script = """
import sys
import mscclpp_ep
assert "torch" not in sys.modules
module = mscclpp_ep.install_as_deep_ep()
assert mscclpp_ep.install_as_deep_ep() is module
import importlib.util
import deep_ep
import deep_ep.utils.envs
from deep_ep.utils.math import calc_diff
assert deep_ep is module is mscclpp_ep.deep_ep
assert deep_ep.utils.math.calc_diff is calc_diff
assert importlib.util.find_spec("deep_ep") is not None
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_install_refuses_where_another_is_imported(tmp_path: Path) -> None:
    (tmp_path / "deep_ep.py").touch()
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import deep_ep
import mscclpp_ep
mscclpp_ep.install_as_deep_ep()
"""
    done = run("-c", script, str(tmp_path))
    assert done.returncode == 1
    assert f"another deep_ep has been imported already, from {tmp_path}/deep_ep.py" in done.stderr


def test_a_script_is_run_as_python_would(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("here = True\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import beside\n"
        "from deep_ep.utils.math import align\n"
        "print(__name__, sys.argv[1:], align(5, 4))\n"
        "sys.exit(7)\n"
    )
    done = run_as_deep_ep(str(script), "--help", "-x")
    assert (done.stdout, done.returncode) == ("__main__ ['--help', '-x'] 8\n", 7), done.stderr


def test_a_module_is_run_as_python_would(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import deep_ep\nprint(__name__)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    done = run_as_deep_ep("-m", "program", PYTHONPATH=path)
    assert (done.stdout, done.returncode) == ("__main__\n", 0), done.stderr


def test_help_and_mistakes(tmp_path: Path) -> None:
    done = run_as_deep_ep("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: python -m mscclpp_ep run-as-deep-ep SCRIPT")
    (tmp_path / "deep_ep").mkdir()
    script = tmp_path / "script.py"
    script.touch()
    mistakes = {
        (): "SCRIPT is missing",
        ("-m",): "MODULE is missing",
        ("--quick", "a.py"): "there is no option --quick",
        (f"{tmp_path}/none.py",): "there is no file",
        (str(script),): "has a deep_ep of its own",
    }
    for arguments, message in mistakes.items():
        done = run_as_deep_ep(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


SPAWNING = """
import sys

import torch
import torch.multiprocessing


def child(local_rank, num_local_ranks):
    import torch.distributed as dist

    import deep_ep
    from deep_ep.utils.envs import dist_print, get_global_seed, init_dist
    from deep_ep.utils.gate import get_unbalanced_scores
    from deep_ep.utils.math import calc_diff, per_token_cast_back, per_token_cast_to_fp8
    from deep_ep.utils.refs import combine, dispatch, generate_pre_combine_data
    from deep_ep.utils.refs import ordered_accumulate

    rank, size, group = init_dist(local_rank, num_local_ranks, seed=5)
    assert (rank, size, get_global_seed()) == (local_rank, num_local_ranks, 5)
    assert torch.get_default_dtype() == torch.bfloat16
    buffer = deep_ep.Buffer(group, int(1e8), explicitly_destroy=True)
    tokens, experts, hidden, topk = 24 - rank, 4 * size, 256, 3
    scores = get_unbalanced_scores(tokens, experts, size, topk, 1.5, True)
    weights, topk_idx = scores.topk(topk, dim=1)
    topk_idx = topk_idx.to(deep_ep.topk_idx_t)
    topk_idx[0, 1] = -1
    x = torch.randn(tokens, hidden)
    fp8 = per_token_cast_to_fp8(x)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, experts)
    routing = dict(
        num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
        topk_idx=topk_idx, topk_weights=weights, config=deep_ep.Buffer.get_dispatch_config(size),
    )
    for rows in (x, fp8):
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(rows, **routing)
        reference = dispatch(rows, topk_idx, weights, 32, experts)
        wanted, idx, wanted_weights, source, per_source = reference
        pairs = zip(recv_x, wanted) if isinstance(rows, tuple) else [(recv_x, wanted)]
        for got, right in pairs:
            assert torch.equal(got.view(torch.uint8), right.view(torch.uint8))
        assert torch.equal(recv_idx, idx)
        assert torch.equal(recv_weights, wanted_weights)
        assert torch.equal(handle[0][:, rank], per_source.cumsum(0).int())
        assert torch.equal(handle[3].long(), source % 32)

    def make(source, idx):
        made = generate_pre_combine_data(source, 32, topk, hidden)
        return made.masked_fill(idx[..., None] < 0, 0)

    out, _, _ = buffer.combine(ordered_accumulate(make(source, idx)), handle, bias=x)
    whole = make(rank * 32 + torch.arange(tokens), topk_idx)
    right = combine(whole, topk_idx, 1, size, experts, x, True, False)
    assert calc_diff(out, right) < 1e-5, calc_diff(out, right)
    assert calc_diff(per_token_cast_back(*fp8), x) < 1e-3
    dist_print(f"rank {rank} is done", once_in_node=True)
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(child, args=(int(sys.argv[1]),), nprocs=int(sys.argv[1]))
    print("all is well")
"""


@pytest.mark.multirank
def test_spawned_children_find_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPAWNING)
    done = run_as_deep_ep(str(script), "3", MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rank 0 is done\nall is well\n"
