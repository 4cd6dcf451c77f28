# SPDX-License-Identifier: MIT
"""What one run on GPUs measures, and what keeps it from being run here."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

from mscclpp_ep import _core
from mscclpp_ep.bench.gpu_peers import GPU_PEERS
from mscclpp_ep.bench.plan import chosen_peers, plan
from mscclpp_ep.bench.settings import HT, LL
from mscclpp_ep.cli import InputError

if TYPE_CHECKING:
    from mscclpp_ep.bench.plan import Options
    from mscclpp_ep.bench.settings import Settings

DEFAULT_SMS = "8,16,24,32,64,all"
ALL_SMS = 0  # stands for as many as a GPU has


@dataclasses.dataclass(frozen=True)
class GpuSettings:
    """Sizes and method of the measurements on GPUs.

    Attributes:
        base: what does not depend on the kind of device; of the HT mode.
        gpus: how many there are; rank r is on number r modulo that.
        sms: numbers of multiprocessors that a call may use; `ALL_SMS` for those that there are.
    """

    base: Settings
    gpus: int
    sms: tuple[int, ...]

    @property
    def linked(self) -> bool:
        """Whether every rank has a GPU of its own, so that rows cross links."""
        return self.base.ranks <= self.gpus

    def steps(self) -> int:
        """How many steps a rank reports, at most."""
        # Inputs, then everything once by clocks and once by the profiler.
        return len(self.base.rounds()) * (1 + 2 * len(self.sms))

    def to_json(self) -> dict[str, Any]:
        """What does not depend on the kind of device, and the rest beside it."""
        sms = ["all" if number == ALL_SMS else number for number in self.sms]
        return self.base.to_json() | {"device": "cuda", "gpus": self.gpus, "sms": sms}


def require_gpus() -> int:
    """How many GPUs this process can use.

    Raises:
        InputError: there is none, or the build or the Torch that is installed cannot use them.
    """
    if not _core.is_cuda_built():
        raise InputError(
            "--device cuda: this build of mscclpp_ep has no CUDA. Build it where nvcc of CUDA 12.5 "
            "or later is found: pip install . -C cmake.define.MSCCLPP_EP_CUDA=ON"
        )
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "--device cuda measures with Torch's streams, events and profiler, and torch is not "
            "installed. Install a build with CUDA: pip install torch"
        )
    count = _core.cuda_device_count()
    if count == 0:
        raise InputError(
            "--device cuda: there is no GPU, or no driver for it; nvidia-smi and "
            "python -m mscclpp_ep doctor tell more"
        )
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"--device cuda: torch {torch.__version__} cannot use the GPU. Install a build with "
            "CUDA that fits the driver: pip install torch"
        )
    return count


def plan_gpu(
    options: Options, mode: str, sms: str, gpus: int
) -> tuple[GpuSettings, dict[str, str]]:
    """The settings of a run, and what is left out of it and why.

    Raises:
        InputError: with what would do.
    """
    if mode == LL:
        raise InputError("--mode ll is measured on the CPU only: leave out --device cuda")
    if options.sizes or options.ll_sizes:
        raise InputError("--sizes and --ll-sizes are of the CPU: GPUs are measured at --tokens")
    ranks = options.ranks
    if ranks is None and options.routing is None:
        ranks = max(2, gpus)
    common = dataclasses.replace(options, ranks=ranks, sizes=str(options.tokens), peers="none")
    wanted = chosen_peers(options.peers, tuple(GPU_PEERS))
    settings = GpuSettings(
        base=dataclasses.replace(plan(common, HT), peers=wanted), gpus=gpus, sms=_numbers(sms)
    )
    left_out = _not_measurable(settings)
    base = settings.base.without_peers(set(left_out))
    if mode != HT:
        left_out["ll mode"] = "it is measured on the CPU only"
    return dataclasses.replace(settings, base=base), left_out


def _numbers(text: str) -> tuple[int, ...]:
    numbers = []
    for part in filter(None, text.split(",")):
        number = ALL_SMS if part == "all" else int(part) if part.isdecimal() else -1
        if number % 2 or (number == 0 and part != "all"):
            raise InputError(f"--sms is {text!r}; it must be even numbers like {DEFAULT_SMS}")
        numbers.append(number)
    if not numbers:
        raise InputError(f"--sms is empty; it must be even numbers like {DEFAULT_SMS}")
    return tuple(dict.fromkeys(numbers))


def sms_available(wanted: tuple[int, ...], multiprocessors: int) -> tuple[int, ...]:
    """The numbers of multiprocessors to measure with, ascending, where there are so many."""
    # A call takes even numbers only.
    most = multiprocessors // 2 * 2
    return tuple(sorted({most if number == ALL_SMS else min(number, most) for number in wanted}))


def _not_measurable(settings: GpuSettings) -> dict[str, str]:
    reasons = {}
    for peer, why_not in GPU_PEERS.items():
        reason = "not asked for" if peer not in settings.base.peers else why_not()
        if reason is None and not settings.linked:
            reason = "ranks share a GPU, which NCCL refuses"
        if reason is not None:
            reasons[peer] = reason
    return reasons
