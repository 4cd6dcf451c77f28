# SPDX-License-Identifier: MIT
"""Other systems that do the same work on GPUs: which there are, and how they are made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.gpu_measure import GpuSystem
    from mscclpp_ep.bench.gpu_settings import GpuSettings

NCCL = "nccl"
DEEP_EP = "deep_ep"
DEEP_EP_V2 = "deep_ep_v2"
MSCCLPP = "mscclpp"


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]


def _no_nccl() -> str | None:
    import torch.distributed

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "this build of torch has no NCCL"
    return None


def _no_deep_ep() -> str | None:
    folders = _folders("deep_ep")
    if not folders:
        return "deep_ep is not installed"
    ours = Path(__file__).resolve().parents[1]
    if any(folder.resolve().is_relative_to(ours) for folder in folders):
        return "the deep_ep that is found is mscclpp_ep's own"
    return None


def _no_mscclpp() -> str | None:
    folders = _folders("mscclpp")
    if not folders:
        return "mscclpp is not installed"
    if not any((folder / "ep").is_dir() for folder in folders):
        return "the mscclpp that is installed has no mscclpp.ep"
    return None


# By name, what says why a peer cannot be measured here; None if it can.
GPU_PEERS: dict[str, Callable[[], str | None]] = {
    NCCL: _no_nccl,
    DEEP_EP: _no_deep_ep,
    DEEP_EP_V2: _no_deep_ep,
    MSCCLPP: _no_mscclpp,
}


def join_nccl(torch: Any, settings: GpuSettings, rank: int, folder: Path) -> Any:
    """The process group that peers work with; collective."""
    from torch import distributed

    distributed.init_process_group(
        NCCL,
        init_method=f"file://{folder / NCCL}",
        rank=rank,
        world_size=settings.base.ranks,
        device_id=torch.device("cuda", torch.cuda.current_device()),
    )
    return distributed.group.WORLD


def make_peer(name: str, torch: Any, process_group: Any, settings: GpuSettings) -> GpuSystem:
    """Makes one of `GPU_PEERS`; collective.

    Raises:
        Exception: whatever the peer raises.
    """
    from mscclpp_ep.bench import gpu_deep_ep, gpu_mscclpp, gpu_nccl

    kinds: dict[str, Callable[[Any, Any, GpuSettings], GpuSystem]] = {
        NCCL: gpu_nccl.Nccl,
        DEEP_EP: gpu_deep_ep.DeepEp,
        DEEP_EP_V2: gpu_deep_ep.Elastic,
        MSCCLPP: gpu_mscclpp.Mscclpp,
    }
    return kinds[name](torch, process_group, settings)
