# SPDX-License-Identifier: MIT
"""What is measured on: random inputs of every rank, and the results that they must give.

Any rank can make the inputs of any other from the seed, so that results are compared with what the
definitions say, and not with another implementation of the same size.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import ml_dtypes
import numpy as np
import numpy.typing as npt

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SLICE = 512  # rows that are summed at once

Bits = npt.NDArray[np.uint16]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class WrongResultError(Exception):
    """What was measured did not compute what it should."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        sizes: numbers of tokens, ascending; `tokens` is one of them.
        refresh: iterations with the same inputs.
        warmup: untimed calls before the timed ones, each time that inputs change.
        flush: megabytes (2^20 bytes) of other memory that are read before each timed call.
        peers: those to measure.
    """

    ranks: int
    tokens: int
    sizes: tuple[int, ...]
    hidden: int
    experts: int
    topk: int
    iters: int
    refresh: int
    warmup: int
    threads: int
    flush: int
    seed: int
    peers: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        """Of one token."""
        return self.hidden * int(BFLOAT16.itemsize)

    def without_peers(self, names: set[str]) -> Settings:
        """The same, with fewer peers."""
        return dataclasses.replace(self, peers=tuple(p for p in self.peers if p not in names))

    def rounds(self) -> list[int]:
        """How many iterations each set of inputs serves."""
        full, rest = divmod(self.iters, self.refresh)
        return [self.refresh] * full + [rest] * (rest > 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs: as rank `rank` sees it, and what it must compute of it."""

    settings: Settings
    rank: int
    tokens: int
    number: int

    def _random(self, kind: int, rank: int) -> np.random.Generator:
        key = [self.settings.seed, self.number, self.tokens, rank, kind]
        return np.random.Generator(np.random.SFC64(key))

    def _rows(self, kind: int, rank: int, count: int) -> Bits:
        """Random bfloat16 rows, as bits: either sign, all mantissas, 2^-7 to 2 in size."""
        words = -(-count * self.settings.hidden // 4)
        random = self._random(kind, rank).integers(0, 1 << 64, words, np.uint64)
        bits = random.view(np.uint16)[: count * self.settings.hidden]
        bits &= 0x83FF
        bits |= 0x3C00
        return bits.reshape(count, self.settings.hidden)

    def tokens_of(self, rank: int) -> Bits:
        """The tokens of a rank, [T, H]."""
        return self._rows(0, rank, self.tokens)

    def choices_of(self, rank: int) -> Ids:
        """The experts of the tokens of a rank, [T, K], all different."""
        scores = self._random(1, rank).random((self.tokens, self.settings.experts), np.float32)
        best = np.argpartition(scores, self.settings.topk - 1, axis=1)[:, : self.settings.topk]
        return np.ascontiguousarray(best, np.int64)

    def weights_of(self, rank: int) -> Floats:
        """The weights of the choices of a rank, [T, K]."""
        return self._random(2, rank).random((self.tokens, self.settings.topk), np.float32)

    @cached_property
    def in_rank(self) -> npt.NDArray[np.bool_]:
        """Which token of which rank goes where, [R, T, R]."""
        ranks, held = self.settings.ranks, -(-self.settings.experts // self.settings.ranks)
        wanted = np.zeros((ranks, self.tokens, ranks), np.bool_)
        for source in range(ranks):
            np.put_along_axis(wanted[source], self.choices_of(source) // held, True, axis=1)
        return wanted

    def received_by(self, rank: int) -> int:
        """N, the rows that a rank receives."""
        return int(self.in_rank[:, :, rank].sum())

    @property
    def bytes_received(self) -> int:
        """Of rows, by this rank; a combine gives back as much."""
        return self.received_by(self.rank) * self.settings.row_bytes

    def expert_output_of(self, rank: int) -> Bits:
        """What a rank gives to combine, [N, H]."""
        return self._rows(3, rank, self.received_by(rank))

    def expected_rows(self) -> Bits:
        """What dispatch must give this rank, in the order of sources and tokens."""
        sources = range(self.settings.ranks)
        parts = [self.tokens_of(r)[self.in_rank[r, :, self.rank]] for r in sources]
        return np.concatenate(parts)

    def expected_sums(self) -> Bits:
        """What combine must give this rank: sums in float32, ranks ascending, rounded once."""
        total = np.zeros((self.tokens, self.settings.hidden), np.float32)
        for holder in range(self.settings.ranks):
            first = int(self.in_rank[: self.rank, :, holder].sum())
            mine = np.flatnonzero(self.in_rank[self.rank, :, holder])
            output = self.expert_output_of(holder)[first : first + len(mine)]
            for begin in range(0, len(mine), _SLICE):
                part = slice(begin, begin + _SLICE)
                total[mine[part]] += output[part].view(BFLOAT16).astype(np.float32)
        return total.astype(BFLOAT16).view(np.uint16)


def require_equal(what: str, given: Bits, expected: Bits) -> None:
    """Compares bits.

    Raises:
        WrongResultError: they differ.
    """
    if given.shape != expected.shape:
        msg = f"{what} gave {given.shape}, expected {expected.shape}"
        raise WrongResultError(msg)
    if not np.array_equal(given, expected):
        rows = np.flatnonzero((given != expected).any(axis=1))
        msg = f"{what}: {len(rows)} of {len(expected)} rows are wrong, the first is {rows[0]}"
        raise WrongResultError(msg)


def require_close(what: str, given: Bits, expected: Bits) -> None:
    """Compares bfloat16 sums that may have been taken in another order.

    Raises:
        WrongResultError: they differ by more than the last place, beyond what order can explain.
    """
    if np.array_equal(given, expected):
        return
    for begin in range(0, len(expected), _SLICE):
        part = slice(begin, begin + _SLICE)
        ours = expected[part].view(BFLOAT16).astype(np.float32)
        theirs = given[part].view(BFLOAT16).astype(np.float32)
        bound = np.float32(2**-7) * np.abs(ours) + np.float32(1e-5)
        if not (np.abs(theirs - ours) <= bound).all():
            msg = f"{what}: sums differ from the expected ones by more than one unit in bfloat16"
            raise WrongResultError(msg)
