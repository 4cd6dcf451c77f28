"""What a dispatch leaves for the combines that undo it and the dispatches that repeat it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mscclpp_ep._devices import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mscclpp_ep import _core
    from mscclpp_ep._frameworks import Array, Framework


class DispatchHandle(tuple["Array", ...]):
    """The tuple that DeepEP's dispatch returns on one host, with attributes of our own.

    The items, where T tokens were sent, N rows received, and R is the number of ranks, are on the
    buffer's device:

    0. `rank_prefix_matrix`, int32 [R, R]: column `rank` has the inclusive prefix sums of the rows
       received from ranks 0, 1, …; the other columns are -1.
    1. `channel_prefix_matrix`, int32 [R, 1]: tokens sent to each rank.
    2. `recv_channel_prefix_matrix`, int32 [R, 1]: zeros, as there is one channel.
    3. `recv_src_idx`, int32 [N]: the token of its source rank that each row is; -1: not received.
    4. `is_token_in_rank`, bool [T, R].
    5. `send_head`, int32 [T, R]: the ordinal of each token among those sent to a rank, or -1.

    Attributes:
        core: The handle of the C++ library.
        epoch: Number of the dispatch, the same on every rank.
    """

    core: _core.DispatchHandle
    epoch: int
    _buffer: _core.Buffer
    _framework: Framework

    @classmethod
    def wrap(
        cls, core: _core.DispatchHandle, buffer: _core.Buffer, framework: Framework
    ) -> DispatchHandle:
        """Makes the tuple of a handle of the C++ library."""
        handle = cls((None,) * 6)
        handle.core = core
        handle.epoch = core.epoch
        handle._buffer = buffer
        handle._framework = framework
        return handle

    # Tensors are made when they are asked for, which few callers do: that takes longer than all
    # else that a call does on the host.

    @cached_property
    def _items(self) -> tuple[Array, ...]:
        core, export = self.core, self._framework.export
        counts = (
            _counts_on_cpu(core, self._buffer, self._framework)
            if self._buffer.device == CPU
            else [
                export(core.fields.rank_prefix_matrix),
                export(core.fields.num_send_tokens),
                export(core.fields.channel_prefix),
            ]
        )
        rows = [core.recv_source_index, core.is_token_in_rank, core.send_head]
        return (*counts, *(export(tensor) for tensor in rows))

    def __getitem__(self, index: Any) -> Any:
        """Return an item, or a tuple of some."""
        return self._items[index]

    def __iter__(self) -> Iterator[Array]:
        """Return an iterator over the items."""
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        """Return whether it is the same handle: tensors have no truth."""
        return self is other

    def __ne__(self, other: object) -> bool:
        """Return whether it is another handle."""
        return self is not other

    def __hash__(self) -> int:
        """Return a number that goes with being the same."""
        return id(self)

    def __reduce__(self) -> Any:
        """Refuse to be copied to another process."""
        msg = "a handle belongs to its buffer, and cannot be pickled or copied"
        raise TypeError(msg)

    @property
    def num_recv_tokens_on_device(self) -> Array | None:
        """int32 [1], rows that came, in the memory of the GPU; on the CPU None."""
        return self._field("num_recv_tokens")

    @property
    def num_recv_tokens_per_expert_on_device(self) -> Array | None:
        """int32 [L], not rounded up, in the memory of the GPU; on the CPU None."""
        return self._field("num_recv_tokens_per_expert")

    def _field(self, name: str) -> Array | None:
        if self._buffer.device == CPU:
            return None
        return self._framework.export(getattr(self.core.fields, name))

    @property
    def num_recv_tokens(self) -> int:
        """Rows that came; more than N if `num_worst_tokens` was too small.

        After a dispatch with `num_worst_tokens` on a GPU, this waits for it.
        """
        known = self.core.num_recv_tokens
        return known if known >= 0 else self._buffer.read_counts(self.core)[0]

    @property
    def num_recv_tokens_per_expert(self) -> Array:
        """int64 [L], not rounded up, on the CPU; waits as `num_recv_tokens` does."""
        known = self.core.num_recv_tokens >= 0
        counts = (
            self.core.num_recv_tokens_per_expert
            if known
            else self._buffer.read_counts(self.core)[1:]
        )
        (array,) = self._framework.small_arrays([np.array(counts, np.int64)])
        return array


def _counts_on_cpu(
    core: _core.DispatchHandle, buffer: _core.Buffer, framework: Framework
) -> list[Array]:
    prefix = core.recv_rank_prefix_sum
    ranks = len(prefix)
    matrix = np.full((ranks, ranks), -1, np.int32)
    matrix[:, buffer.rank] = prefix
    sent = np.array(core.num_send_tokens, np.int32).reshape(ranks, 1)
    return framework.small_arrays([matrix, sent, np.zeros_like(sent)])


class LowLatencyHandle(tuple["Any", ...]):
    """The tuple that DeepEP's low-latency dispatch returns, with attributes of our own.

    The items, where L is the number of local experts, R of ranks, M the most tokens of any rank:

    0. `packed_recv_src_info`, int32 [L, R * M]: the token of its source rank that each row is.
    1. `packed_recv_layout_range`, int64 [L, R]: of each source rank's rows the count in the low 32
       bits, and the first row in the high ones.
    2. M.
    3. H.
    4. E.

    Attributes:
        core: The handle of the C++ library.
        framework: What the tensors belong to.
        epoch: Number of the dispatch among low-latency operations, the same on every rank.
    """

    core: _core.LowLatencyHandle
    framework: Framework
    epoch: int

    @classmethod
    def wrap(
        cls,
        sent: _core.DispatchSent,
        framework: Framework,
        max_tokens: int,
        hidden: int,
        num_experts: int,
    ) -> LowLatencyHandle:
        """Makes the tuple of a handle of the C++ library."""
        source = framework.export(sent.source_index)
        ranges = framework.export(sent.layout_range)
        handle = cls((source, ranges, max_tokens, hidden, num_experts))
        handle.core = sent.pending.handle
        handle.framework = framework
        handle.epoch = handle.core.epoch
        return handle
