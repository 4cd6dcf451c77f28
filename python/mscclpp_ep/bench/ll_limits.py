# SPDX-License-Identifier: MIT
"""The limit of the LL mode: the same rows read and written, and nothing else.

Dispatch: a token is copied once to each rank that holds some of its experts, into memory that the
two share, and from there to one row for each expert. Combine: the rows of a token are read on each
rank that has some, one row is written for them into memory shared with the token's rank, which
reads those of all ranks and writes one row. Instead of sums there are maxima of bytes, which the
processor computes as fast as it reads.
"""

from __future__ import annotations

import mmap
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mscclpp_ep.bench.checks import Bytes
from mscclpp_ep.bench.ll import FP8_GROUP
from mscclpp_ep.bench.ops import COMBINE, DISPATCH, FP8_DISPATCH, LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    import mscclpp_ep as ep
    from mscclpp_ep.bench.cases import Case
    from mscclpp_ep.bench.clock import Clock
    from mscclpp_ep.bench.settings import Settings

_Indices = npt.NDArray[np.intp]


class LowLatencyLimits:
    """Copies with as many threads as the library uses on this rank."""

    def __init__(self, group: ep.Group, clock: Clock, settings: Settings) -> None:
        self._clock = clock
        self._settings = settings
        self._pool = ThreadPoolExecutor(settings.threads) if settings.threads > 1 else None
        self._staging = _share(group, settings.ranks * settings.tokens * settings.row_bytes)

    def destroy(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def measure(self, case: Case, iterations: int, thorough: bool) -> None:
        """Times the copies of each operation; those of FP8 only if `thorough`."""
        routes = _Routes(case)
        hidden = self._settings.hidden
        wide = self._settings.row_bytes
        calls = {
            DISPATCH: self._dispatch(case, routes, wide),
            COMBINE: self._combine(case, routes, wide),
        }
        if thorough and hidden % FP8_GROUP == 0:
            calls[FP8_DISPATCH] = self._dispatch(case, routes, hidden + hidden // FP8_GROUP * 4)
        for op, call in calls.items():
            self._clock.measure((case.tokens, LIMIT, op), call, iterations)

    def _window(self, holder: int, source: int, row_bytes: int) -> Bytes:
        """The rows of one rank in the shared memory of another."""
        tokens = self._settings.tokens
        memory = self._staging[holder][: self._settings.ranks * tokens * row_bytes]
        window: Bytes = memory.reshape(-1, tokens, row_bytes)[source]
        return window

    def _dispatch(self, case: Case, routes: _Routes, row_bytes: int) -> Callable[[], None]:
        ranks, rank = range(self._settings.ranks), case.rank
        x = _touched(case.counts[rank], row_bytes)
        send = [
            (x, routes.sent[r], self._window(r, rank, row_bytes)[: len(routes.sent[r])])
            for r in ranks
        ]
        expand = [
            (self._window(r, rank_source, row_bytes), slots, _touched(len(slots), row_bytes))
            for r, rank_source, slots in ((rank, r, routes.slots[r]) for r in ranks)
        ]
        return self._phases(_take, send, expand)

    def _combine(self, case: Case, routes: _Routes, row_bytes: int) -> Callable[[], None]:
        ranks, rank = range(self._settings.ranks), case.rank
        partial, total = [], []
        for r in ranks:
            rows = _touched(len(routes.slots[r]), row_bytes)
            out = self._window(r, rank, row_bytes)[: routes.received[r]]
            partial.append((rows, routes.firsts[r], out))
        # A row of each token is written once, with the part of the first rank that has some of it.
        left = np.ones(case.counts[rank], np.bool_)
        for r in ranks:
            mine = routes.sent[r]
            new = np.flatnonzero(left[mine])
            left[mine] = False
            part = self._window(rank, r, row_bytes)[: len(mine)]
            total.append((part, new, _touched(len(new), row_bytes)))
        return self._phases(_read_and_take, partial, total)

    def _phases(
        self, work: Callable[..., None], first: list[Any], second: list[Any]
    ) -> Callable[[], None]:
        """Both parts of an operation, the second when every rank has done the first."""
        before, after = self._split(first), self._split(second)

        def run() -> None:
            self._all(work, before)
            self._clock.barrier.wait()
            self._all(work, after)

        return run

    def _split(self, parts: list[Any]) -> list[Any]:
        """The same copies in as many pieces as there are threads, of each."""
        count = self._settings.threads
        if count == 1:
            return parts
        pieces = []
        for source, indices, out in parts:
            for i in range(count):
                cut = slice(len(indices) * i // count, len(indices) * (i + 1) // count)
                read = slice(len(source) * i // count, len(source) * (i + 1) // count)
                pieces.append((source, indices[cut], out[cut], read))
        return pieces

    def _all(self, work: Callable[..., None], parts: list[Any]) -> None:
        if self._pool is None:
            for part in parts:
                work(*part)
        else:
            for _ in self._pool.map(lambda part: work(*part), parts):
                pass


class _Routes:
    """Where the rows of a rank go and come from, by the other rank.

    Attributes:
        sent: the tokens sent to each rank.
        received: how many came from each.
        slots: of the rows that came from each, the one that each of this rank's expert rows copies.
        firsts: an expert row for each row that came.
    """

    def __init__(self, case: Case) -> None:
        held = case.settings.experts_held
        ranks = range(case.settings.ranks)
        self.sent: list[_Indices] = [case.sent_to(case.rank, r) for r in ranks]
        self.received: list[int] = []
        self.slots: list[_Indices] = []
        self.firsts: list[_Indices] = []
        for source in ranks:
            tokens, columns = np.nonzero(case.choices_of(source) // held == case.rank)
            came, slots = np.unique(tokens, return_inverse=True)
            # By expert, as the operation's own results are.
            order = np.argsort(case.choices_of(source)[tokens, columns], kind="stable")
            slots = slots[order]
            self.received.append(len(came))
            self.slots.append(slots)
            self.firsts.append(np.unique(slots, return_index=True)[1])


def _take(source: Bytes, indices: _Indices, out: Bytes, read: slice | None = None) -> None:
    del read
    # With mode="raise" NumPy would copy twice.
    np.take(source, indices, axis=0, out=out, mode="clip")


def _read_and_take(source: Bytes, indices: _Indices, out: Bytes, read: slice = slice(None)) -> None:
    np.maximum.reduce(source[read].ravel(), initial=0)
    np.take(source, indices, axis=0, out=out, mode="clip")


def _touched(rows: int, row_bytes: int) -> Bytes:
    return np.ones((rows, row_bytes), np.uint8)


def _share(group: ep.Group, length: int) -> list[Bytes]:
    """Memory of every rank, which all can write; collective."""
    own = os.memfd_create("mscclpp_ep-limit", os.MFD_CLOEXEC)
    try:
        os.ftruncate(own, length)
        memory = []
        for process, descriptor in map(
            pickle.loads, group.all_gather(pickle.dumps((os.getpid(), own)))
        ):
            peer = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                memory.append(np.frombuffer(mmap.mmap(peer, length), np.uint8))
            finally:
                os.close(peer)
        memory[group.rank].fill(1)
        group.barrier()
    finally:
        os.close(own)
    return memory
