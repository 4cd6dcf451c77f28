# SPDX-License-Identifier: MIT
"""How long a function takes: by the GPU's clock in programs that use one, else by the host's."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Durations: TypeAlias = float | list[float]

_GPU_FLUSH_BYTES = 256 << 20
_CPU_FLUSH_BYTES = 64 << 20
# About 10 ms: longer than the ranks differ in when they launch.
_SLEEP_CYCLES = 20_000_000


def bench(
    fn: Callable[[], Any],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], Any] | None = None,
    flush_l2: bool = True,
) -> tuple[float, float, float]:
    """Measures calls of a function, each alone.

    Args:
        fn: What to measure.
        num_warmups: Calls before those measured.
        num_tests: Calls measured; the first is left out, if there are others.
        post_fn: Called after each, not measured.
        flush_l2: Write other memory before each, so that caches hold nothing of use.

    Returns:
        Mean, least and greatest time in seconds.
    """
    for _ in range(num_warmups):
        fn()
    measure = _time_gpu if _uses_gpu() else _time_cpu
    scratch = _scratch(flush_l2)
    times = measure(fn, num_tests, post_fn, scratch)
    times = times[1:] or times
    return sum(times) / len(times), min(times), max(times)


def bench_kineto(  # noqa: PLR0917 - deep_ep's arguments, in its order
    fn: Callable[[], Any],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], Any] | None = None,
) -> Any:
    """Measures kernels that a function launches, by the profiler of torch.

    On the CPU there are no kernels: the mean time of a whole call of `fn` stands for each. With
    EP_USE_NVIDIA_TOOLS=1, for runs under another profiler, `fn` is called and the results are 1.

    Args:
        fn: What launches the kernels.
        kernel_names: A part of the name of one kernel, or a tuple of such.
        num_tests: Calls measured.
        suppress_kineto_output: Discard what is written to stdout and stderr meanwhile.
        trace_path: Where to put a trace for Chrome; GPU only.
        flush_l2: Write other memory before each call.
        barrier_comm_profiling: Let all ranks begin each call together.
        num_kernels_per_period: How many launches of a kernel repeat; if not 1, a list of their
            mean times stands for each time.
        barrier: What `barrier_comm_profiling` calls, instead of a reduction by torch.distributed.

    Returns:
        Mean time of a launch in seconds, 0 if there was none; a tuple of them if `kernel_names` is.

    Raises:
        RuntimeError: A name is part of the names of several kernels, or launches do not make up
            whole periods.
    """
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    begin = (barrier or _reduce) if barrier_comm_profiling else None
    scratch = _scratch(flush_l2)
    if os.environ.get("EP_USE_NVIDIA_TOOLS", "0") == "1":
        _repeat(fn, num_tests, scratch, begin)
        durations: list[Durations] = [1 for _ in names]
    elif _uses_gpu():
        with _silence(suppress_kineto_output):
            profile = _profile(fn, num_tests, scratch, begin)
        if trace_path is not None:
            profile.export_chrome_trace(trace_path)
        durations = [_periodic(_launches(profile, n), num_kernels_per_period, n) for n in names]
    else:
        with _silence(suppress_kineto_output):
            times = _time_cpu(fn, num_tests, None, scratch, begin)
        mean = sum(times) / len(times)
        whole: Durations = mean if num_kernels_per_period == 1 else [mean] * num_kernels_per_period
        durations = [whole for _ in names]
    return durations[0] if isinstance(kernel_names, str) else tuple(durations)


def _uses_gpu() -> bool:
    """Whether this program has used a GPU, as it has before it measures one."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def _scratch(wanted: bool) -> torch.Tensor | None:
    if not wanted:
        return None
    if _uses_gpu():
        return torch.empty(_GPU_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    return torch.empty(_CPU_FLUSH_BYTES, dtype=torch.uint8, device="cpu")


def _reduce() -> None:
    dist.all_reduce(torch.ones(1, dtype=torch.float32, device="cuda" if _uses_gpu() else "cpu"))


def _prepare(scratch: torch.Tensor | None, barrier: Callable[[], Any] | None) -> None:
    """What comes before a call that is measured."""
    if scratch is not None:
        scratch.zero_()
    if barrier is not None:
        if _uses_gpu():
            torch.cuda._sleep(_SLEEP_CYCLES)
        barrier()


def _repeat(
    fn: Callable[[], Any],
    num_tests: int,
    scratch: torch.Tensor | None,
    barrier: Callable[[], Any] | None,
) -> None:
    for _ in range(num_tests):
        _prepare(scratch, barrier)
        fn()


def _time_cpu(
    fn: Callable[[], Any],
    num_tests: int,
    post_fn: Callable[[], Any] | None,
    scratch: torch.Tensor | None,
    barrier: Callable[[], Any] | None = None,
) -> list[float]:
    times = []
    for _ in range(num_tests):
        _prepare(scratch, barrier)
        begin = time.perf_counter()
        fn()
        times.append(time.perf_counter() - begin)
        if post_fn is not None:
            post_fn()
    return times


def _time_gpu(
    fn: Callable[[], Any],
    num_tests: int,
    post_fn: Callable[[], Any] | None,
    scratch: torch.Tensor | None,
) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_tests)]
    for begin, end in events:
        _prepare(scratch, None)
        begin.record()
        fn()
        end.record()
        if post_fn is not None:
            post_fn()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def _profile(
    fn: Callable[[], Any],
    num_tests: int,
    scratch: torch.Tensor | None,
    barrier: Callable[[], Any] | None,
) -> Any:
    # The first round starts the profiler up, and is not recorded.
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, schedule=schedule) as profile:
        for _ in range(2):
            _repeat(fn, num_tests, scratch, barrier)
            torch.cuda.synchronize()
            profile.step()
    return profile


def _launches(profile: Any, name: str) -> list[float]:
    """Times of the launches of the one kernel with such a name, in seconds and in order."""
    found = [event for event in profile.events() if name in event.name]
    kernels = sorted({event.name for event in found})
    if len(kernels) > 1:
        msg = f"several kernels have {name!r} in their names: {', '.join(kernels)}"
        raise RuntimeError(msg)
    found.sort(key=lambda event: event.time_range.start)
    return [event.device_time_total / 1e6 for event in found]


def _periodic(times: list[float], period: int, name: str) -> Durations:
    """The mean of times, or if they repeat with a period, that of each place in it."""
    if len(times) % period != 0:
        msg = f"{name!r} was launched {len(times)} times, not a multiple of {period}"
        raise RuntimeError(msg)
    if not times:
        return 0.0 if period == 1 else [0.0] * period
    rounds = len(times) // period
    means = [sum(times[place::period]) / rounds for place in range(period)]
    return means[0] if period == 1 else means


@contextlib.contextmanager
def _silence(wanted: bool) -> Iterator[None]:
    """Sends stdout and stderr nowhere, those of native code too."""
    if not wanted:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,  # noqa: PTH123 - no path of a file
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        _descriptors_to(nowhere.fileno()),
    ):
        yield


@contextlib.contextmanager
def _descriptors_to(target: int) -> Iterator[None]:
    """Sends what native code writes to stdout and stderr elsewhere."""
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(target, descriptor)
        yield
    finally:
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
