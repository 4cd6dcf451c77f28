# SPDX-License-Identifier: MIT
"""What needs one rank only: signatures, sizes, errors as classes, and what is not built yet."""

from __future__ import annotations

import inspect
import operator

import numpy as np

import mscclpp_ep as ep
from harness import steps

STREAM = {"previous_event": None, "async_finish": False, "allocate_on_comm_stream": False}
REQUIRED = inspect.Parameter.empty
SIGNATURES = {
    "__init__": {
        "group": REQUIRED,
        "num_nvl_bytes": 0,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 24,
        "allow_nvlink_for_low_latency_mode": True,
        "allow_mnnvl": False,
        "explicitly_destroy": False,
        "enable_shrink": False,
        "comm": None,
    },
    "get_dispatch_layout": {"topk_idx": REQUIRED, "num_experts": REQUIRED, **STREAM},
    "dispatch": {
        "x": REQUIRED,
        "handle": None,
        "num_tokens_per_rank": None,
        "num_tokens_per_rdma_rank": None,
        "is_token_in_rank": None,
        "num_tokens_per_expert": None,
        "topk_idx": None,
        "topk_weights": None,
        "expert_alignment": 1,
        "num_worst_tokens": 0,
        "config": None,
        **STREAM,
    },
    "combine": {
        "x": REQUIRED,
        "handle": REQUIRED,
        "topk_weights": None,
        "bias": None,
        "config": None,
        **STREAM,
    },
}


def same_signature(_context, name: str) -> None:
    """Positional arguments, their order and their defaults; ours come after, by keyword only."""
    parameters = inspect.signature(getattr(ep.Buffer, name)).parameters.values()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    got = {p.name: p.default for p in parameters if p.kind == kind and p.name != "self"}
    wanted = SIGNATURES[name]
    assert list(got) == list(wanted)
    optional = {name: default for name, default in wanted.items() if default is not REQUIRED}
    assert {name: got[name] for name in optional} == optional


def size_hints(_context) -> None:
    config = ep.Config(20, 6, 256, 6, 128)
    assert ep.Config().get_nvl_buffer_size_hint(14336, 2) == 83_927_552
    assert config.get_nvl_buffer_size_hint(14336, 8) == 335_709_824
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    hint = ep.Buffer.get_low_latency_rdma_size_hint
    assert hint(128, 3072, 2, 288) == 920_127_872
    assert hint(128, 7168, 8, 288) == 2_146_961_792
    assert hint(256, 7168, 16, 256) == 3_816_818_816
    wide, wider = ep.Buffer.get_dispatch_config(16), ep.Buffer.get_dispatch_config(64)
    assert wide.get_nvl_buffer_size_hint(14336, 16) == 377_673_984
    assert wide.get_rdma_buffer_size_hint(14336, 16) == 91_887_744
    assert wider.get_nvl_buffer_size_hint(14336, 64) == 377_677_824


def configs(_context) -> None:
    for size in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160):
        assert isinstance(ep.Buffer.get_dispatch_config(size), ep.Config)
        assert isinstance(ep.Buffer.get_combine_config(size), ep.Config)
    steps.raised(ep.InvalidArgument, ep.Config, 20, 256, 6)
    steps.raised(ep.InvalidArgument, ep.Config, -2)


def sms_are_remembered(_context) -> None:
    before = ep.Buffer.num_sms
    assert before == 20
    ep.Buffer.set_num_sms(24)
    assert ep.Buffer.num_sms == 24
    ep.Buffer.set_num_sms(before)
    steps.raised(ep.InvalidArgument, ep.Buffer.set_num_sms, 7)
    assert ep.Buffer.is_sm90_compiled() in (True, False)


def errors_are_classes(_context) -> None:
    names = "InvalidArgument Timeout PeerFailure CudaError SystemError NotBuilt"
    assert all(issubclass(getattr(ep, name), ep.Error) for name in names.split())
    assert issubclass(ep.InvalidArgument, ValueError)
    assert issubclass(ep.Timeout, TimeoutError)
    assert issubclass(ep.Error, Exception)


def events_are_complete(_context) -> None:
    ep.EventHandle().current_stream_wait()
    overlap = ep.Buffer.capture()
    assert isinstance(overlap, ep.EventOverlap)
    with overlap:
        assert overlap.extra_tensors is None
    ep.EventOverlap(ep.EventHandle(), (1, 2)).current_stream_wait()
    assert ep.EventOverlap().event is None


def not_built_yet(context) -> None:
    buffer = context.standing()
    for name in ("get_comm_stream", "internode_dispatch", "internode_combine"):
        assert name in str(steps.raised(ep.NotBuilt, operator.methodcaller(name), buffer))


def neither_group_nor_comm(_context) -> None:
    message = str(steps.raised(ValueError, ep.Buffer, None))
    assert "group" in message
    assert "comm" in message
    steps.raised(ep.InvalidArgument, ep.Buffer, "everybody")


def options_are_checked(context) -> None:
    for option in ({"timeout": 0}, {"max_arena_bytes": -1}, {"num_threads": -1}):
        message = str(steps.raised(ep.InvalidArgument, context.buffer, **option))
        assert next(iter(option)) in message, message
    far = np.array([0, 5], np.int32)
    message = str(steps.raised(ep.InvalidArgument, context.buffer, expert_map=far))
    assert "expert_map" in message
    assert "5" in message


def map_fixes_the_number_of_experts(context) -> None:
    buffer = context.buffer(expert_map=np.zeros(4, np.int32))
    idx = context.backend.array(np.zeros((3, 2), np.int64))
    message = str(steps.raised(ep.InvalidArgument, buffer.get_dispatch_layout, idx, 5))
    assert all(part in message for part in ("num_experts", "5", "4", "expert_map")), message


# Of a backend that has no streams.
CPU_PROGRAMS = [not_built_yet]
SMALL_PROGRAMS = [
    size_hints,
    configs,
    sms_are_remembered,
    errors_are_classes,
    events_are_complete,
    neither_group_nor_comm,
    options_are_checked,
    map_fixes_the_number_of_experts,
]
