# SPDX-License-Identifier: MIT
"""The limit of the HT mode: plain copies of as many bytes as a rank receives, by all at once."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mscclpp_ep import _core
from mscclpp_ep.bench.ops import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from mscclpp_ep.bench.cases import Case
    from mscclpp_ep.bench.clock import Clock


_ALIGNMENT = 1 << 12

Bytes = npt.NDArray[np.uint8]


def _memcpy(out: Bytes, source: Bytes) -> None:
    np.copyto(out, source)


def _stream(out: Bytes, source: Bytes) -> None:
    _core.stream_copy(out, source)


COPIES: dict[str, Callable[[Bytes, Bytes], None]] = {
    "memcpy": _memcpy,
    "streaming stores": _stream,
}


def _private(length: int) -> Bytes:
    """Memory of this process, in large pages where the system gives them."""
    memory = mmap.mmap(-1, length + _ALIGNMENT, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:length]


def _shared(length: int) -> Bytes:
    """Memory as ranks share it."""
    memory = mmap.mmap(-1, length + _ALIGNMENT, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:length]


MEMORIES: dict[str, Callable[[int], Bytes]] = {"private": _private, "shared": _shared}


class Limits:
    """Copies with as many threads as the library uses on this rank."""

    def __init__(self, clock: Clock, threads: int, most_bytes: int) -> None:
        self._clock = clock
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._pairs = {
            name: (allocate(most_bytes), allocate(most_bytes))
            for name, allocate in MEMORIES.items()
        }
        for number, arrays in enumerate(self._pairs.values()):
            for array in arrays:
                array.fill(number + 1)  # touched, and no page of zeros that is shared

    def measure(self, case: Case, iterations: int, thorough: bool) -> None:
        """Times every way to copy, in every kind of memory, whatever `thorough`."""
        del thorough
        for memory, (out, source) in self._pairs.items():
            count = case.bytes_received
            for name, copy in COPIES.items():
                self._clock.measure(
                    (case.tokens, LIMIT, f"{name}, {memory}"),
                    self._bind(copy, out[:count], source[:count]),
                    iterations,
                )

    def destroy(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _bind(
        self, copy: Callable[[Bytes, Bytes], None], out: Bytes, source: Bytes
    ) -> Callable[[], None]:
        pool = self._pool
        if pool is None:
            return lambda: copy(out, source)
        cuts = [len(out) * i // self._threads & -64 for i in range(self._threads)] + [len(out)]
        parts = [slice(*cuts[i : i + 2]) for i in range(self._threads)]
        outs, sources = [out[part] for part in parts], [source[part] for part in parts]

        def copy_in_parts() -> None:
            for _ in pool.map(copy, outs, sources):
                pass

        return copy_in_parts
