# SPDX-License-Identifier: MIT
"""`bench --device cuda` where there is no GPU: its options, its arithmetic and its reports."""

import io
import json
import sys
import threading
import types

import pytest
from rich.console import Console

from harness.cli import run
from mscclpp_ep import _core
from mscclpp_ep.bench import gpu_peers, gpu_settings
from mscclpp_ep.bench.clock import SpinBarrier
from mscclpp_ep.bench.gpu_clock import Times
from mscclpp_ep.bench.gpu_floor import PUSH_BYTES, bandwidth
from mscclpp_ep.bench.gpu_measure import CaseFailure
from mscclpp_ep.bench.gpu_profile import activities_between_marks, short_name
from mscclpp_ep.bench.gpu_report import print_gpu_notes, print_gpu_report
from mscclpp_ep.bench.gpu_results import (
    GpuResults,
    gpu_to_json,
    merged,
    not_measured,
    row_bytes_of,
    slowest,
)
from mscclpp_ep.bench.gpu_settings import ALL_SMS, GpuSettings, plan_gpu, sms_available
from mscclpp_ep.bench.gpu_worker import GpuMeasured, GpuTraffic
from mscclpp_ep.bench.plan import Options
from mscclpp_ep.bench.settings import Settings
from mscclpp_ep.cli import InputError

PUSH = "void mscclpp_ep::cuda::(anonymous namespace)::pushKernel<uint4, 2>(mscclpp_ep::PushContext)"
SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"


# Options


def test_gpus_need_a_build_with_cuda(monkeypatch):
    monkeypatch.setattr(_core, "is_cuda_built", lambda: False)
    with pytest.raises(InputError, match=r"no CUDA\. Build it .*MSCCLPP_EP_CUDA=ON"):
        gpu_settings.require_gpus()


def test_gpus_need_torch(monkeypatch):
    monkeypatch.setattr(_core, "is_cuda_built", lambda: True)
    monkeypatch.setattr(gpu_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"torch is not installed\. .*pip install torch"):
        gpu_settings.require_gpus()


def test_gpus_need_a_gpu_and_a_torch_that_can_use_it(monkeypatch):
    unable = types.SimpleNamespace(
        __version__="2.0+cpu", cuda=types.SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setattr(_core, "is_cuda_built", lambda: True)
    monkeypatch.setattr(gpu_settings.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch", unable)
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 0)
    with pytest.raises(InputError, match="there is no GPU, or no driver"):
        gpu_settings.require_gpus()
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 4)
    with pytest.raises(InputError, match=r"torch 2.0\+cpu cannot use the GPU"):
        gpu_settings.require_gpus()
    unable.cuda.is_available = lambda: True
    assert gpu_settings.require_gpus() == 4


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--device=tpu"], "--device"),
        (["--sms=8"], "--sms is of GPUs: add --device cuda"),
        (["--device=cuda", "--require"], "are of the CPU: leave out --device cuda"),
        (["--device=cuda", "--plot={tmp}/figures.png"], "are of the CPU"),
        (["--device=cuda", "--json={tmp}/no/file.json"], "there is no folder"),
    ],
)
def test_wrong_options_are_refused(tmp_path, arguments, answer):
    done = run("bench", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert answer in done.stderr
    assert "Traceback" not in done.stderr


def options(**changes):
    fields = {
        **dict.fromkeys(("ranks", "experts", "topk", "threads", "seed", "peers", "routing")),
        **{"tokens": 8, "sizes": "", "ll_tokens": 8, "ll_sizes": "", "hidden": 256, "iters": 4},
        **{"refresh": 2, "warmup": 1, "chain": 8, "flush": 1},
    }
    return Options(**(fields | changes))


@pytest.fixture
def no_peers(monkeypatch):
    """None is installed, whatever is."""
    missing = dict.fromkeys(gpu_peers.GPU_PEERS, lambda: "it is hidden")
    monkeypatch.setattr(gpu_settings, "GPU_PEERS", missing)


@pytest.mark.parametrize(
    ("changes", "mode", "sms", "answer"),
    [
        ({}, "ll", "8", "--mode ll is measured on the CPU only"),
        ({"sizes": "4"}, "ht", "8", "GPUs are measured at --tokens"),
        ({"ll_sizes": "4"}, "ht", "8", "GPUs are measured at --tokens"),
        ({"ranks": 1}, "ht", "8", "one rank sends nothing"),
        ({"peers": "gloo"}, "ht", "8", "known: nccl, deep_ep, deep_ep_v2, mscclpp"),
        ({}, "ht", "7", "it must be even numbers like 8,16,24,32,64,all"),
        ({}, "ht", "8,-2", "it must be even numbers"),
        ({}, "ht", "0", "it must be even numbers"),
        ({}, "ht", "8,most", "it must be even numbers"),
        ({}, "ht", ",", "--sms is empty"),
    ],
)
def test_what_cannot_be_planned(no_peers, changes, mode, sms, answer):
    with pytest.raises(InputError, match=answer):
        plan_gpu(options(**changes), mode, sms, 2)


def test_the_plan_has_a_rank_for_each_gpu(no_peers):
    settings, left_out = plan_gpu(options(), "both", "all,16,8,16", 4)
    assert settings.base.ranks == 4
    assert settings.linked
    assert settings.base.sizes == (8,)
    assert settings.sms == (ALL_SMS, 16, 8)
    assert settings.base.peers == ()
    assert left_out == dict.fromkeys(gpu_peers.GPU_PEERS, "it is hidden") | {
        "ll mode": "it is measured on the CPU only"
    }
    assert settings.to_json()["sms"] == ["all", 16, 8]
    # Two sets of inputs, each by clocks and by the profiler.
    assert settings.steps() == 2 * (1 + 2 * 3)


def test_ranks_that_share_a_gpu_have_no_peers(monkeypatch):
    monkeypatch.setattr(gpu_settings, "GPU_PEERS", {"nccl": lambda: None, "deep_ep": lambda: None})
    settings, left_out = plan_gpu(options(peers="nccl"), "ht", "8", 1)
    assert settings.base.ranks == 2
    assert not settings.linked
    assert left_out == {
        "nccl": "ranks share a GPU, which NCCL refuses",
        "deep_ep": "not asked for",
    }
    settings, left_out = plan_gpu(options(peers="nccl"), "ht", "8", 2)
    assert settings.base.peers == ("nccl",)
    assert left_out == {"deep_ep": "not asked for"}


def test_our_own_deep_ep_is_no_peer(monkeypatch, tmp_path):
    ours = gpu_peers.Path(gpu_peers.__file__).parents[1] / "deep_ep"
    monkeypatch.setattr(gpu_peers, "_folders", lambda package: [ours])
    assert "mscclpp_ep's own" in gpu_peers._no_deep_ep()
    monkeypatch.setattr(gpu_peers, "_folders", lambda package: [tmp_path])
    assert gpu_peers._no_deep_ep() is None
    assert "has no mscclpp.ep" in gpu_peers._no_mscclpp()
    (tmp_path / "ep").mkdir()
    assert gpu_peers._no_mscclpp() is None
    monkeypatch.setattr(gpu_peers, "_folders", lambda package: [])
    assert gpu_peers._no_deep_ep() == "deep_ep is not installed"


def test_numbers_of_multiprocessors_that_there_are():
    assert sms_available((64, ALL_SMS, 8), 132) == (8, 64, 132)
    assert sms_available((8, 64, 132, ALL_SMS), 49) == (8, 48)


# The profiler


def activity(name, begin, micros, category="kernel"):
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": micros}


def test_work_is_told_apart_by_marks():
    events = [
        activity(PUSH, 5, 100),  # before the first mark
        activity(SPIN, 8, 1),
        activity(PUSH, 9, 1),  # of the gate
        activity(SPIN, 10, 200),
        activity(PUSH, 12.5, 30),  # on another stream, while the mark still spins
        activity("Memcpy DtoH (Device -> Pinned)", 300, 2, "gpu_memcpy"),
        activity(PUSH, 310, 40.5),
        activity("Memset (Device)", 360, 1, "gpu_memset"),
        activity("cudaLaunchKernel", 361, 7, "cuda_runtime"),
        {"ph": "M", "name": "process_name"},
        activity(SPIN, 400, 1),
        activity("fill_kernel", 410, 90),  # between calls
        activity(SPIN, 500, 1),
        activity(SPIN, 600, 1),
        activity(SPIN, 700, 1),
        activity(SPIN, 800, 1),
        activity(SPIN, 805, 1),
        activity(PUSH, 810, 1),  # no mark follows
    ]
    calls = activities_between_marks(reversed(events))
    assert calls == [
        pytest.approx(
            {"pushKernel": 70.5e-6, "Memcpy DtoH (Device -> Pinned)": 2e-6, "Memset (Device)": 1e-6}
        ),
        {},
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (PUSH, "pushKernel"),
        (SPIN, "spin_kernel"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_SendRecv"),
        ("void a::b<c::d>(e::f)", "b"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


# Figures


def test_the_slowest_rank_of_each_iteration_counts():
    assert slowest([[1, 5, 2], [3, 4, 2]]) == [3, 5, 2]
    calls = [[{"a": 1.0}, {"a": 5.0, "b": 1.0}, {"a": 2.0}], [{"a": 3.0}, {"a": 1.0}, {"a": 9.0}]]
    assert merged(calls) == {"a": 5.0, "b": 0.0}


def test_the_bandwidth_is_that_of_the_slowest_rank():
    assert bandwidth([[1.0, 2.0, 9.0], [4.0, 1.0, 1.0]]) == PUSH_BYTES / 4.0


def test_bytes_of_rows():
    assert row_bytes_of("dispatch, cached", 7168) == row_bytes_of("combine", 7168) == 14336
    assert row_bytes_of("dispatch, FP8, cached", 7168) == 7168 + 56 * 4
    assert row_bytes_of("chained, CUDA graph", 7168) == 2 * 14336


def settings(**changes):
    fields = {
        **{"mode": "ht", "ranks": 2, "tokens": 8, "sizes": (8,), "hidden": 500, "experts": 4},
        **{"topk": 2, "iters": 3, "refresh": 2, "warmup": 1, "threads": 1, "flush": 0},
        **{"chain": 8, "seed": 0, "peers": ()},
    }
    return GpuSettings(base=Settings(**fields), **({"gpus": 2, "sms": (8, 16)} | changes))


def times(micros, kernel=None):
    seconds = [each * 1e-6 for each in micros]
    activities = [{"pushKernel": each * 1e-6} for each in kernel or micros]
    return Times(host=[2 * each for each in seconds], events=seconds, activities=activities)


def measured(times_of_keys, failures=(), pushes=None, profiler_error=None):
    return GpuMeasured(
        sms=(8, 16),
        times=times_of_keys,
        # On average 11 rows, of which 5 come from the other rank; at most 6 cross.
        traffic=[GpuTraffic(10, 5, 6, 2), GpuTraffic(13, 5, 6, 1)],
        pushes={8: [PUSH_BYTES / 2e9] * 3, 16: [PUSH_BYTES / 3e9] * 3}
        if pushes is None
        else pushes,
        failures=list(failures),
        profiler_error=profiler_error,
        device={"name": "a GPU"},
    )


GRAPH_FAILED = CaseFailure("mscclpp_ep", "chained, CUDA graph", 16, 1, "NotBuilt: no", "Trace [x]")
PEER_FAILED = CaseFailure("deep_ep", "start", 0, 0, "ImportError: no", "Traceback")


def results(**changes):
    ours = {
        ("mscclpp_ep", "dispatch", 8): times([4, 8, 6], [2, 4, 3]),
        ("mscclpp_ep", "dispatch", 16): times([3, 3, 3]),
        ("mscclpp_ep", "combine, ordinary input", 8): times([5, 5, 5]),
        ("mscclpp_ep", "chained", 8): times([10, 10, 10]),
        ("nccl", "dispatch", 0): times([60, 60, 60]),
    }
    late = dict(ours) | {("mscclpp_ep", "dispatch", 8): times([5, 7, 6], [1, 5, 2])}
    of_ranks = [measured(each, **changes) for each in (ours, late)]
    return GpuResults(settings(), of_ranks)


def test_figures():
    found = results()
    row, wide, *_ = found.rows
    assert (row.system, row.name, row.sms, wide.sms) == ("mscclpp_ep", "dispatch", 8, 16)
    assert row.logical_bytes == 11 * 1000
    assert row.link_bytes == 5 * 1000
    # 6 rows at 3 GB/s.
    assert row.floor_us == pytest.approx(2)
    events = row.figures["events"]
    assert events.calls == 3
    assert (events.p50_us, events.min_us) == pytest.approx((6, 5))
    assert events.p95_us == pytest.approx(7.8)
    assert row.figures["host"].p50_us == pytest.approx(12)
    kernel = row.figures["kernel"]
    assert kernel.p50_us == pytest.approx(3)
    assert kernel.percent_of_floor == pytest.approx(100 * 2 / 3)
    assert kernel.logical_gbps == pytest.approx(11000 / 3e3)
    assert kernel.link_gbps == pytest.approx(5000 / 3e3)
    assert row.activities == pytest.approx({"pushKernel": 3})
    assert row.times_faster == {"nccl": pytest.approx(10)}
    chained = next(row for row in found.rows if row.op == "chained")
    assert (chained.floor_us, chained.link_bytes) == (pytest.approx(4), 10 * 1000)
    assert found.passed


def test_a_run_without_floor_and_profiler():
    failure = CaseFailure("floor", "floor", 8, 0, "RuntimeError: no time_push", "Traceback")
    found = results(pushes={}, failures=[failure], profiler_error="the profiler saw nothing")
    assert found.best is found.rows[0].floor_us is None
    assert found.rows[0].figures["events"].percent_of_floor is None
    assert not found.passed
    reasons = not_measured(found, {"nccl": "not asked for"})
    assert reasons == {
        "nccl": "not asked for",
        "times of kernels": "the profiler saw nothing",
    }
    assert "GB/s (link" not in printed(found)


def test_a_call_that_some_ranks_could_not_make_has_no_figures():
    key = ("mscclpp_ep", "dispatch", 8)
    found = GpuResults(settings(), [measured({key: times([1])}), measured({})])
    assert found.rows == []


def test_a_profiler_that_fails_on_one_rank_gives_no_figures():
    key = ("mscclpp_ep", "dispatch", 8)
    silent = times([1, 2])
    silent.activities = []
    found = GpuResults(settings(), [measured({key: times([1, 2])}), measured({key: silent})])
    assert set(found.rows[0].figures) == {"events", "host"}
    assert found.rows[0].activities == {}


def test_the_file_has_the_keys_of_a_run_on_the_cpu():
    found = results(failures=[PEER_FAILED, GRAPH_FAILED])
    figures = json.loads(json.dumps(gpu_to_json(found, {"ll mode": "no"}, 0.5)))
    assert set(figures) >= {"version", "machine", "config", "limits", "results", "chained"}
    assert figures["machine"]["load_before"] == 0.5
    assert figures["config"]["ht"]["device"] == "cuda"
    assert figures["limits"]["ht"]["push_gbps"] == {"8": pytest.approx(2), "16": pytest.approx(3)}
    assert figures["limits"]["ht"]["best_sms"] == 16
    assert [(row["system"], row["sms"]) for row in figures["results"]] == [
        *(("mscclpp_ep", 8), ("mscclpp_ep", 16), ("nccl", None))
    ]
    assert figures["results"][0]["events"]["p50_us"] == pytest.approx(6)
    assert [row["variant"] for row in figures["variants"]] == ["ordinary input"]
    assert [row["op"] for row in figures["chained"]] == ["chained"]
    assert [entry["op"] for entry in figures["failed"]] == ["start", "chained, CUDA graph"]
    assert figures["not_measured"] == {"ll mode": "no", "deep_ep": "ImportError: no"}


def printed(found, reasons=None):
    output = io.StringIO()
    console = Console(file=output, width=100, highlight=False, soft_wrap=True)
    print_gpu_report(console, found)
    print_gpu_notes(console, found, reasons or {})
    return output.getvalue()


def test_the_report():
    found = results()
    text = printed(found, {"mscclpp": "mscclpp is not installed"})
    lines = [line.split() for line in text.splitlines()]
    shown = "mscclpp_ep dispatch 8 3.0 4.8 67 6.0 7.8 33 12.0 15.6 17 3.7 1.7 10.00"
    assert shown.split() in lines
    assert "x nccl" in text
    assert "at 3.0 GB/s (link, every rank pushing to the next at once, 16 SMs)" in text
    assert "mscclpp: not measured: mscclpp is not installed" in text
    assert "share GPUs" not in text
    assert "FAILED" not in text


def test_the_report_says_what_failed_and_what_is_shared():
    found = results(failures=[GRAPH_FAILED])
    found.settings = settings(gpus=1)
    text = printed(found)
    assert "there is no link between them in the figures" in text
    assert "memory GB/s" in text
    # Brackets are no markup here.
    assert "FAILED mscclpp_ep: chained, CUDA graph with 16 SMs, on rank 1:\nTrace [x]" in text
    assert not found.passed
    assert results(failures=[PEER_FAILED]).passed


# The barrier


def test_a_barrier_names_who_did_not_come_and_can_be_used_again(tmp_path):
    barriers = [SpinBarrier(tmp_path / "barrier", rank, 3) for rank in range(3)]
    with pytest.raises(TimeoutError, match="rank 1, 2 did not come"):
        barriers[0].wait(0.01)
    assert [barrier.turn for barrier in barriers] == [1, 0, 0]
    for barrier in barriers:
        barrier.realign(2)
    threads = [threading.Thread(target=barrier.wait, args=(20,)) for barrier in barriers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [barrier.turn for barrier in barriers] == [3, 3, 3]
