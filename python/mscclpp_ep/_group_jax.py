# SPDX-License-Identifier: MIT
"""Gathers over the key-value store that the processes of jax.distributed share."""

from __future__ import annotations

import itertools
import sys
from typing import Any

from mscclpp_ep._core import Error, InvalidArgument, PeerFailure, Timeout
from mscclpp_ep._rendezvous_wire import Deadline, name_ranks, same_error

# All processes make their groups in the same order, so that a number means the same group in each.
_numbers = itertools.count()
# Waits are cut into slices, between which Python handles Ctrl-C, and closed groups are noticed.
_SLICE_S = 0.5


class JaxChannel:
    """One process's side: it sets a key in each round, and reads those of the others."""

    def __init__(self, timeout: float) -> None:
        """Look at jax.distributed.

        Raises:
            InvalidArgument: jax is not imported, or jax.distributed is not initialized.
        """
        state = _distributed_state()
        self._client: Any = state.client
        self.rank = int(state.process_id)
        self.size = int(state.num_processes)
        self._timeout = timeout
        self._prefix = f"mscclpp_ep/{next(_numbers)}"
        self._round = 0
        self._error: Error | None = None

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks.

        Raises:
            PeerFailure: A rank closed its group, or jax.distributed failed.
            Timeout: Ranks are missing; the message names them.
        """
        if self._error is not None:
            raise same_error(self._error)
        try:
            return self._gather(data)
        except Error as error:
            self._error = error
            raise
        except RuntimeError as error:
            msg = f"a gather over jax.distributed failed on rank {self.rank}: {error}"
            self._error = PeerFailure(msg)
            raise self._error from error

    def _gather(self, data: bytes) -> list[bytes]:
        deadline = Deadline(self._timeout)
        self._client.key_value_set_bytes(self._key(self.rank), data)
        others = (rank for rank in range(self.size) if rank != self.rank)
        parts = {rank: self._wait_for(rank, deadline) for rank in others}
        # Whoever came to this round has read everything of the one before.
        if self._round > 0:
            self._client.key_value_delete(self._key(self.rank, self._round - 1))
        self._round += 1
        return [parts.get(rank, data) for rank in range(self.size)]

    def _wait_for(self, rank: int, deadline: Deadline) -> bytes:
        while True:
            wait = max(1, int(1000 * min(_SLICE_S, deadline.left())))
            try:
                data: bytes = self._client.blocking_key_value_get_bytes(self._key(rank), wait)
                return data
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            # A rank closes its group after what it last set, which may have come in between.
            closed = self._read(self._closed_key(rank)) is not None
            if closed and self._read(self._key(rank)) is None:
                raise PeerFailure(f"rank {rank} closed its group")
            if deadline.expired():
                self._raise_timeout()

    def _raise_timeout(self) -> None:
        others = (rank for rank in range(self.size) if rank != self.rank)
        missing = [rank for rank in others if self._read(self._key(rank)) is None]
        if missing:
            msg = f"{name_ranks(missing)} did not come to gather {self._round + 1}"
            raise Timeout(f"{msg} within {self._timeout:g} s")

    def _read(self, key: str) -> bytes | None:
        try:
            data: bytes = self._client.key_value_try_get_bytes(key)
            return data
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def _key(self, rank: int, number: int | None = None) -> str:
        return f"{self._prefix}/{self._round if number is None else number}/{rank}"

    def _closed_key(self, rank: int) -> str:
        return f"{self._prefix}/closed/{rank}"

    def close(self) -> None:
        """Leave; ranks that wait raise PeerFailure. The last key stays for those that read it."""
        if self._error is None:
            self._error = InvalidArgument("this group is closed; make another")
            self._client.key_value_set_bytes(self._closed_key(self.rank), b"1")


def _distributed_state() -> Any:
    """Return jax's own record of its client; there is no public way to the key-value store."""
    if "jax" not in sys.modules:
        msg = "from_jax needs jax, which this program has not imported; import it first"
        raise InvalidArgument(msg)
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    if getattr(state, "client", None) is None:
        msg = "jax.distributed is not initialized; call jax.distributed.initialize first"
        raise InvalidArgument(msg)
    return state
