# SPDX-License-Identifier: MIT
"""Groups of ranks: who this process is, and how it exchanges a few bytes with the others.

A group sets up connections; it carries no tokens. Anything with `rank`, `size`, `all_gather` and
`barrier` is a group (`GroupLike`); `Group` makes one from what launchers and frameworks provide.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mscclpp_ep._core import InvalidArgument
from mscclpp_ep._group_channels import Board, LocalChannel, MpiChannel, TorchChannel
from mscclpp_ep._group_jax import JaxChannel
from mscclpp_ep._rendezvous import connect, env_int, place_from_env
from mscclpp_ep._rendezvous_files import FileChannel
from mscclpp_ep._rendezvous_wire import check_int, check_timeout

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from mscclpp_ep._rendezvous_star import Channel


@runtime_checkable
class GroupLike(Protocol):
    """What the library needs of a group of ranks."""

    @property
    def rank(self) -> int:
        """The number of this rank, from 0 to size - 1."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks; lengths may differ."""

    def barrier(self) -> None:
        """Return when all ranks have called it."""


class _AloneChannel:
    """The gathers of a group of one."""

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data]

    def close(self) -> None:
        pass


class Group:
    """A group of ranks, made by one of the class methods.

    All ranks make the same calls in the same order. After an error in a call the group is broken:
    every later call raises the same error. It may be used as a context manager, which closes it.
    """

    def __init__(self, rank: int, size: int, channel: Channel) -> None:
        """Use the class methods instead."""
        self._rank = rank
        self._size = size
        self._channel: Channel | None = channel

    @property
    def rank(self) -> int:
        """The number of this rank, from 0 to size - 1."""
        return self._rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._size

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks; lengths may differ.

        Raises:
            InvalidArgument: The group is closed, or the data is not bytes.
            PeerFailure: A rank died, closed its group or gave up; the message names it.
            Timeout: Ranks are missing; the message names them.
        """
        if self._channel is None:
            msg = "this group is closed; make another"
            raise InvalidArgument(msg)
        given: object = data
        if not isinstance(given, (bytes, bytearray, memoryview)):
            msg = f"data is a {type(given).__name__}; bytes, bytearray and memoryview are accepted"
            raise InvalidArgument(msg)
        return self._channel.all_gather(bytes(given))

    def barrier(self) -> None:
        """Return when all ranks have called it; errors as `all_gather`."""
        self.all_gather(b"")

    def close(self) -> None:
        """Let go of sockets and files; may be called twice. Ranks that still wait raise."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> Group:
        """Return the group."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the group."""
        self.close()

    def __del__(self) -> None:
        """Close the group, quietly: nobody could catch an error here."""
        try:
            self.close()
        except Exception:
            return

    def __repr__(self) -> str:
        """Return rank and size."""
        return f"<mscclpp_ep.Group rank={self.rank} size={self.size}>"

    @classmethod
    def from_env(cls, timeout: float = 100.0) -> Group:
        """Meet the ranks that torchrun, or another launcher, started.

        Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. MASTER_PORT itself belongs to the
        launcher: rank 0 listens on MSCCLPP_EP_PORT if set, else on the first free port of the
        eight after MASTER_PORT. Ranks prove to each other that they know MSCCLPP_EP_TOKEN. If it
        is not set, the token is made from the launcher's job id, the size and the port: that
        tells jobs apart, but keeps nobody out who can guess them.

        Args:
            timeout: Seconds to wait for the others, here and in every later call.

        Raises:
            InvalidArgument: A variable is missing or malformed, or rank 0 refused this rank,
                because its number is taken or its WORLD_SIZE is another.
            SystemError: Rank 0 found no free port.
            PeerFailure: A rank died or gave up.
            Timeout: Ranks are missing; the message names them.
        """
        timeout = check_timeout(timeout)
        size = env_int("WORLD_SIZE", 1, None)
        rank = env_int("RANK", 0, size - 1)
        if size == 1:
            return cls(rank, size, _AloneChannel())
        return cls(rank, size, connect(place_from_env(rank, size), timeout))

    @classmethod
    def from_torch(cls, process_group: object = None) -> Group:
        """Use a torch.distributed group, of gloo or nccl; None is the default group.

        Gathers follow the timeout of the group.

        Raises:
            InvalidArgument: torch is not imported, torch.distributed is not initialized, or this
                process is not in the group.
        """
        channel = TorchChannel(process_group)
        return cls(channel.rank, channel.size, channel)

    @classmethod
    def from_mpi(cls, comm: object = None) -> Group:
        """Use an mpi4py communicator; None is COMM_WORLD, and imports mpi4py.

        Raises:
            InvalidArgument: mpi4py cannot be imported, or comm is no intracommunicator of its.
        """
        try:
            mpi = importlib.import_module("mpi4py.MPI")
        except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
            msg = f"from_mpi needs mpi4py and an MPI library ({error}); install them"
            raise InvalidArgument(msg) from error
        channel = MpiChannel(mpi, mpi.COMM_WORLD if comm is None else comm)
        return cls(channel.rank, channel.size, channel)

    @classmethod
    def from_jax(cls, timeout: float = 100.0) -> Group:
        """Use the processes of jax.distributed, which meet in its key-value store.

        A rank is a process. All processes make their groups in the same order.

        Args:
            timeout: Seconds to wait for the others in a call.

        Raises:
            InvalidArgument: jax is not imported, jax.distributed is not initialized, or timeout is
                no positive number.
        """
        channel = JaxChannel(check_timeout(timeout))
        return cls(channel.rank, channel.size, channel)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], rank: int, size: int, timeout: float = 100.0
    ) -> Group:
        """Meet the other ranks through files whose names start with `path`.

        The path may be on a shared file system; if it is a folder, the files are inside. Files
        that an earlier run left do no harm. One set of ranks may use a path at a time. Close the
        group: the last rank to close it removes the files.

        Args:
            path: Where all ranks can read and write.
            rank: The number of this rank.
            size: The number of ranks.
            timeout: Seconds to wait for the others, here and in every later call.

        Raises:
            InvalidArgument: An argument is out of range, the folder of `path` does not exist, or
                another process took this rank.
            SystemError: The file system refused.
            Timeout: Ranks are missing; the message names them.
        """
        size = check_int("size", size, 1, None)
        rank = check_int("rank", rank, 0, size - 1)
        return cls(rank, size, FileChannel(Path(path), rank, size, check_timeout(timeout)))

    @classmethod
    def local(cls, n: int, timeout: float = 100.0) -> list[Group]:
        """Return the groups of n ranks that are threads of this process.

        Args:
            n: The number of ranks.
            timeout: Seconds to wait for the others in a call.

        Raises:
            InvalidArgument: n is not a positive integer, or timeout no positive number.
        """
        n = check_int("n", n, 1, None)
        board = Board(n, check_timeout(timeout))
        return [cls(rank, n, LocalChannel(board, rank)) for rank in range(n)]


def as_group(obj: object) -> GroupLike:
    """Return `obj` as a group.

    Accepted are groups (anything with `rank`, `size`, `all_gather` and `barrier`), groups of
    torch.distributed and communicators of mpi4py.

    Raises:
        InvalidArgument: It is None, or nothing of these.
    """
    if obj is None:
        msg = "Either 'group' or 'comm' must be provided."
        raise InvalidArgument(msg)
    if _is_instance(obj, "torch.distributed", "ProcessGroup"):
        return Group.from_torch(obj)
    if _is_instance(obj, "mpi4py.MPI", "Comm"):
        return Group.from_mpi(obj)
    if isinstance(obj, GroupLike) and not isinstance(obj, type):
        size = check_int("group.size", obj.size, 1, None)
        check_int("group.rank", obj.rank, 0, size - 1)
        return obj
    msg = (
        f"group is {obj!r}; give a mscclpp_ep.Group, a torch.distributed.ProcessGroup, an mpi4py "
        "communicator, or an object with rank, size, all_gather(bytes) and barrier()"
    )
    raise InvalidArgument(msg)


def _is_instance(obj: object, module: str, name: str) -> bool:
    """Tell whether obj is of a class of a module that may not have been imported."""
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and isinstance(obj, found)
