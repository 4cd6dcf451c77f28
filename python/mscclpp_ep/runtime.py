# SPDX-License-Identifier: MIT
"""What `deep_ep` keeps in `Buffer.runtime`, for callers that ask it where ranks are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from mscclpp_ep._arguments import not_built
from mscclpp_ep._devices import gpu_of

if TYPE_CHECKING:
    from mscclpp_ep._frameworks import Array
    from mscclpp_ep.buffer import Buffer


class Runtime:
    """The place of a buffer's rank among the others. All ranks are in one domain of memory."""

    def __init__(self, buffer: Buffer) -> None:
        """Use `Buffer.runtime` instead."""
        self._buffer = buffer

    def is_available(self) -> bool:
        """Whether the buffer is connected."""
        return self._buffer.is_available()

    def get_num_rdma_ranks(self) -> int:
        """The number of domains: 1."""
        return 1

    def get_rdma_rank(self) -> int:
        """The number of this rank's domain: 0."""
        return 0

    def get_root_rdma_rank(self, global_: bool) -> int:
        """Which rank begins the connection between domains.

        Args:
            global_: Its number among all ranks, which is that of this rank, as there are no others
                in its place in other domains; otherwise that among domains, 0.
        """
        return self._buffer.rank if global_ else 0

    def get_local_device_id(self) -> int:
        """The number of this rank's GPU among those of this process: 0 on the CPU."""
        return gpu_of(self._buffer.device)

    def get_local_buffer_tensor(
        self, dtype: Any, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Array:
        """As `Buffer.get_local_buffer_tensor` without a size."""
        return self._buffer.get_local_buffer_tensor(dtype, None, offset, use_rdma_buffer)

    def get_comm_stream(self) -> Any:
        """As `Buffer.get_comm_stream`."""
        return self._buffer.get_comm_stream()

    def get_local_ipc_handle(self) -> NoReturn:
        """Not there: ranks find each other's memory by themselves.

        Raises:
            NotBuilt: Always.
        """
        not_built("get_local_ipc_handle")

    def destroy(self) -> None:
        """As `Buffer.destroy`."""
        self._buffer.destroy()
