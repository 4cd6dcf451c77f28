# SPDX-License-Identifier: MIT
"""Gathers among threads, and over what torch.distributed and mpi4py already hold."""

from __future__ import annotations

import sys
import threading
import weakref
from array import array
from typing import TYPE_CHECKING, Any

from mscclpp_ep._core import Error, InvalidArgument, PeerFailure, Timeout
from mscclpp_ep._rendezvous_wire import name_ranks, same_error, split

if TYPE_CHECKING:
    from collections.abc import Sequence


class Board:
    """Where the threads of one process put their data.

    A result stays until the next round is complete, to which every reader contributes.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self._size = size
        self._timeout = timeout
        self._changed = threading.Condition()
        self._round = 0
        self._given: dict[int, bytes] = {}
        self._result: list[bytes] = []
        self._closed: set[int] = set()
        self._error: Error | None = None

    def exchange(self, rank: int, data: bytes) -> list[bytes]:
        """Contribute the data of a rank and return that of all ranks.

        Raises:
            PeerFailure: Another rank closed its group, or was interrupted.
            Timeout: Ranks are missing; the message names them.
        """
        with self._changed:
            self._check()
            self._given[rank] = data
            if len(self._given) == self._size:
                self._finish_round()
            else:
                self._wait_for_round(rank, self._round + 1)
            return list(self._result)

    def close(self, rank: int) -> None:
        """Note that a rank will not come any more."""
        with self._changed:
            self._closed.add(rank)
            self._changed.notify_all()

    def _finish_round(self) -> None:
        self._result = [self._given[rank] for rank in range(self._size)]
        self._given = {}
        self._round += 1
        self._changed.notify_all()

    def _wait_for_round(self, rank: int, number: int) -> None:
        try:
            in_time = self._changed.wait_for(lambda: self._is_over(number), self._timeout)
        except BaseException:
            self._fail(PeerFailure(f"rank {rank} was interrupted in a gather"))
            raise
        if self._round >= number:
            return
        self._check()
        missing = set(range(self._size)) - self._given.keys()
        if in_time:
            self._fail(PeerFailure(f"{name_ranks(missing & self._closed)} closed its group"))
        else:
            msg = f"{name_ranks(missing)} did not come to gather {number}"
            self._fail(Timeout(f"{msg} within {self._timeout:g} s"))
        self._check()

    def _is_over(self, number: int) -> bool:
        left = bool(self._closed - self._given.keys())
        return self._round >= number or self._error is not None or left

    def _fail(self, error: Error) -> None:
        self._error = self._error or error
        self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise same_error(self._error)


class LocalChannel:
    """One thread's side of a board."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks; errors as `Board.exchange`."""
        return self._board.exchange(self._rank, data)

    def close(self) -> None:
        """Leave; ranks that wait raise PeerFailure."""
        self._board.close(self._rank)


class TorchChannel:
    """Gathers of uint8 tensors, lengths first, over a torch.distributed group."""

    def __init__(self, process_group: object) -> None:
        """Look at the group.

        Raises:
            InvalidArgument: torch is not imported, torch.distributed is not initialized, or this
                process is not in the group.
        """
        self._torch: Any = sys.modules.get("torch")
        if self._torch is None:
            msg = "from_torch needs torch, which this program has not imported; import it first"
            raise InvalidArgument(msg)
        self._dist = self._torch.distributed
        if not self._dist.is_available() or not self._dist.is_initialized():
            msg = "torch.distributed is not initialized; call init_process_group first"
            raise InvalidArgument(msg)
        try:
            self.rank = int(self._dist.get_rank(process_group))
            self.size = int(self._dist.get_world_size(process_group))
        except (TypeError, ValueError, AttributeError) as error:
            msg = f"process_group is {process_group!r}, no torch.distributed group ({error})"
            raise InvalidArgument(msg) from None
        if self.rank < 0:
            msg = "this process is not in the torch.distributed group given; use one it belongs to"
            raise InvalidArgument(msg)
        # A process group that outlives destroy_process_group may abort the process at its end, so
        # torch alone keeps it.
        self._reference = None if process_group is None else weakref.ref(process_group)

    def _process_group(self) -> Any:
        """Return the group given; None stands for torch's default one.

        Raises:
            InvalidArgument: it has been destroyed.
        """
        if self._reference is None:
            return None
        group = self._reference()
        if group is None:
            msg = "the torch.distributed group has been destroyed; make a new group"
            raise InvalidArgument(msg)
        return group

    def _device(self) -> Any:
        """Return the CPU if the group serves it (gloo, mpi), else the current device (nccl).

        The tensors gathered are the channel's own: those of the caller may be on the CPU all the
        same.

        Raises:
            InvalidArgument: the group is for devices of which there are none.
        """
        backends = str(self._dist.get_backend_config(self._process_group()))
        if "cpu:" in backends:
            return self._torch.device("cpu")
        kind = backends.partition(":")[0]
        module = getattr(self._torch, kind, None)
        if module is None or not module.is_available():
            msg = (
                f"the torch.distributed group ({backends}) exchanges data on {kind} devices only, "
                "and torch finds none; give a group of gloo: torch.distributed.new_group("
                'backend="gloo")'
            )
            raise InvalidArgument(msg)
        return self._torch.device(kind, module.current_device())

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks.

        Raises:
            PeerFailure: torch.distributed reports that a rank failed.
            Timeout: torch.distributed reports that its timeout passed.
        """
        try:
            return self._gather(data)
        except RuntimeError as error:
            msg = f"a gather over torch.distributed failed on rank {self.rank}: {error}"
            timed_out = "timeout" in msg.lower() or "timed out" in msg.lower()
            raise (Timeout if timed_out else PeerFailure)(msg) from error

    def _gather(self, data: bytes) -> list[bytes]:
        torch, device = self._torch, self._device()
        length = torch.tensor([len(data)], dtype=torch.int64, device=device)
        lengths = [int(one) for one in self._gather_tensor(length)]
        longest = max(lengths)
        if longest == 0:
            return [b""] * self.size
        padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        rows = self._gather_tensor(padded.to(device))
        received = [row.cpu().numpy().tobytes() for row in rows]
        return [part[:size] for part, size in zip(received, lengths, strict=True)]

    def _gather_tensor(self, tensor: Any) -> Sequence[Any]:
        rows = [self._torch.empty_like(tensor) for _ in range(self.size)]
        self._dist.all_gather(rows, tensor, group=self._process_group())
        return rows

    def close(self) -> None:
        """Do nothing: the group is the caller's."""


class MpiChannel:
    """Gathers of buffers, lengths first, over an mpi4py communicator."""

    def __init__(self, mpi: Any, comm: Any) -> None:
        """Look at the communicator.

        Raises:
            InvalidArgument: It is no intracommunicator of mpi4py that this process is in.
        """
        if not isinstance(comm, mpi.Comm) or comm == mpi.COMM_NULL or comm.Is_inter():
            msg = f"comm is {comm!r}; give an mpi4py intracommunicator that this process is in"
            raise InvalidArgument(msg)
        self._mpi = mpi
        self._comm = comm
        self.rank = int(comm.Get_rank())
        self.size = int(comm.Get_size())

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks.

        Raises:
            PeerFailure: MPI reports an error.
        """
        try:
            return self._gather(data)
        except self._mpi.Exception as error:
            msg = f"a gather over MPI failed on rank {self.rank}: {error}"
            raise PeerFailure(msg) from error

    def _gather(self, data: bytes) -> list[bytes]:
        lengths = array("q", [0] * self.size)
        self._comm.Allgather(array("q", [len(data)]), lengths)
        received = bytearray(sum(lengths))
        kind = self._mpi.BYTE
        self._comm.Allgatherv([data, kind], [received, lengths.tolist(), None, kind])
        return split(received, lengths)

    def close(self) -> None:
        """Do nothing: the communicator is the caller's."""
