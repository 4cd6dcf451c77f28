# SPDX-License-Identifier: MIT
"""The environment of a test: ranks, seeds, and the machine."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import torch
import torch.distributed as dist

_local_seed = 0
_global_seed = 0
_ranks_per_node = 1


def init_seed(global_seed: int) -> None:
    """Seeds torch and `random` with `global_seed` plus this rank's number."""
    global _local_seed, _global_seed  # noqa: PLW0603 - torch's and Python's seeds are global too
    _global_seed = global_seed
    _local_seed = global_seed + (dist.get_rank() if dist.is_initialized() else 0)
    torch.manual_seed(_local_seed)
    random.seed(_local_seed)


def get_local_seed() -> int:
    """This rank's seed."""
    return _local_seed


def get_global_seed() -> int:
    """The seed that all ranks gave to `init_seed`."""
    return _global_seed


def init_dist(
    local_rank: int, num_local_ranks: int, seed: int = 0
) -> tuple[int, int, dist.ProcessGroup]:
    """Initializes torch.distributed, as one of the processes that a test spawned.

    The backend is nccl, and the default device this rank's GPU, if torch finds one; else they are
    gloo and the CPU. The default dtype becomes bfloat16. Reads from the environment MASTER_ADDR
    (default 127.0.0.1), MASTER_PORT (8361), WORLD_SIZE, the number of nodes (1), and RANK, that of
    this node (0).

    Args:
        local_rank: The number of this process on its node.
        num_local_ranks: The processes of a node.
        seed: For `init_seed`.

    Returns:
        This rank, the number of ranks, and a group of all ranks.
    """
    global _ranks_per_node  # noqa: PLW0603 - there is one default process group, too
    _ranks_per_node = num_local_ranks
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "8361"))
    num_nodes = int(os.environ.get("WORLD_SIZE", "1"))
    node = int(os.environ.get("RANK", "0"))
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend="nccl" if has_gpu else "gloo",
        init_method=f"tcp://{address}:{port}",
        world_size=num_nodes * num_local_ranks,
        rank=node * num_local_ranks + local_rank,
        device_id=torch.device("cuda", local_rank) if has_gpu else None,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if has_gpu else "cpu")
    init_seed(seed)
    size = dist.get_world_size()
    return dist.get_rank(), size, dist.new_group(list(range(size)))


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Prints a line and waits for all ranks.

    Args:
        s: The line.
        once_in_node: Only the first rank of each node prints it.
    """
    if not once_in_node or dist.get_rank() % _ranks_per_node == 0:
        print(s, flush=True)
    dist.barrier()


@functools.cache
def get_rdma_gbs(nic_name: str = "mlx5_0") -> float:
    """The speed of an InfiniBand or RoCE card in GB/s; 0 if there is none of that name."""
    try:
        rate = Path("/sys/class/infiniband", nic_name, "ports", "1", "rate").read_text()
        return float(rate.split()[0]) / 8
    except (OSError, ValueError, IndexError):
        return 0.0
