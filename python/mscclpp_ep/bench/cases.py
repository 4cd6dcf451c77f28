# SPDX-License-Identifier: MIT
"""What is measured on: random inputs of every rank, and the results that they must give.

Any rank can make the inputs of any other from the seed, so that results are compared with what the
definitions say, and not with another implementation of the same size.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mscclpp_ep.bench.checks import Bits, Floats, rounded
from mscclpp_ep.bench.settings import BFLOAT16

if TYPE_CHECKING:
    from mscclpp_ep.bench.settings import Settings

_SLICE = 512  # rows that are summed at once

Ids = npt.NDArray[np.int64]


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

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """T of each rank: equal, unless they were recorded."""
        if self._recorded is None:
            return (self.tokens,) * self.settings.ranks
        return tuple(map(len, self._recorded))

    @cached_property
    def _recorded(self) -> tuple[Ids, ...] | None:
        routing = self.settings.routing
        return None if routing is None else routing.at(self.number, len(self.settings.rounds()))

    def tokens_of(self, rank: int) -> Bits:
        """The tokens of a rank, [T, H]."""
        return self._rows(0, rank, self.counts[rank])

    def choices_of(self, rank: int) -> Ids:
        """The experts of the tokens of a rank, [T, K], -1 for none."""
        if self._recorded is not None:
            return self._recorded[rank]
        scores = self._random(1, rank).random((self.tokens, self.settings.experts), np.float32)
        best = np.argpartition(scores, self.settings.topk - 1, axis=1)[:, : self.settings.topk]
        return np.ascontiguousarray(best, np.int64)

    def weights_of(self, rank: int) -> Floats:
        """The weights of the choices of a rank, [T, K]."""
        shape = (self.counts[rank], self.settings.topk)
        return self._random(2, rank).random(shape, np.float32)

    @cached_property
    def in_rank(self) -> npt.NDArray[np.bool_]:
        """Which token of which rank goes where, [R, T, R], with the largest T."""
        ranks = self.settings.ranks
        # One column more, for the choices that are none.
        wanted = np.zeros((ranks, max(self.counts), ranks + 1), np.bool_)
        for source, count in enumerate(self.counts):
            choices = self.choices_of(source)
            holders = np.where(choices < 0, ranks, choices // self.settings.experts_held)
            np.put_along_axis(wanted[source, :count], holders, True, axis=1)
        return wanted[:, :, :ranks]

    def sent_to(self, source: int, rank: int) -> npt.NDArray[np.intp]:
        """The tokens of a rank that go to another, ascending."""
        return np.flatnonzero(self.in_rank[source, :, rank])

    def received_by(self, rank: int) -> int:
        """N, the rows that a rank receives, its own included."""
        return int(self.in_rank[:, :, rank].sum())

    def received_from_others(self, rank: int) -> int:
        """The rows that a rank receives from the others."""
        return self.received_by(rank) - int(self.in_rank[rank, :, rank].sum())

    def sent_to_others(self, rank: int) -> int:
        """The rows that a rank sends to the others."""
        return int(self.in_rank[rank].sum()) - int(self.in_rank[rank, :, rank].sum())

    @property
    def rows_crossing(self) -> int:
        """The most rows that any rank sends to the others, or receives from them."""
        ranks = range(self.settings.ranks)
        return max(max(self.sent_to_others(r), self.received_from_others(r)) for r in ranks)

    def choices_received_by(self, rank: int) -> int:
        """How many choices are of experts of a rank: rows, if each expert gets its own."""
        held = self.settings.experts_held
        everything = (self.choices_of(source) for source in range(self.settings.ranks))
        return sum(int((choices // held == rank).sum()) for choices in everything)

    @property
    def bytes_received(self) -> int:
        """Of rows, by this rank, one a token and rank; a combine gives back as much."""
        return self.received_by(self.rank) * self.settings.row_bytes

    def expert_output_of(self, rank: int) -> Bits:
        """What a rank gives to combine, [N, H]."""
        return self._rows(3, rank, self.received_by(rank))

    def expected_rows(self) -> Bits:
        """What dispatch must give this rank, in the order of sources and tokens."""
        sources = range(self.settings.ranks)
        return np.concatenate([self.tokens_of(r)[self.sent_to(r, self.rank)] for r in sources])

    def expected_choices(self) -> tuple[Ids, Floats]:
        """The choices, as local ids or -1, and weights that come with the rows of dispatch."""
        held, sources = self.settings.experts_held, range(self.settings.ranks)
        choices = np.concatenate([self.choices_of(r)[self.sent_to(r, self.rank)] for r in sources])
        weights = np.concatenate([self.weights_of(r)[self.sent_to(r, self.rank)] for r in sources])
        here = choices // held == self.rank
        return (
            np.where(here, choices - held * self.rank, -1),
            np.where(here, weights, np.float32(0)),
        )

    def expected_sums(self) -> Bits:
        """What combine must give this rank: sums in float32, ranks ascending, rounded once."""
        total = np.zeros((self.counts[self.rank], self.settings.hidden), np.float32)
        for holder in range(self.settings.ranks):
            first = int(self.in_rank[: self.rank, :, holder].sum())
            mine = self.sent_to(self.rank, holder)
            output = self.expert_output_of(holder)[first : first + len(mine)]
            for begin in range(0, len(mine), _SLICE):
                part = slice(begin, begin + _SLICE)
                total[mine[part]] += output[part].view(BFLOAT16).astype(np.float32)
        return rounded(total)

    def expected_echo(self) -> Bits:
        """What combine must give if it is handed what dispatch gave: tokens times their ranks.

        Such products are exact in float32, so that the order of the sum makes no difference.
        """
        times = self.in_rank[self.rank, : self.counts[self.rank]].sum(axis=1, keepdims=True)
        total = self.tokens_of(self.rank).view(BFLOAT16).astype(np.float32)
        total *= times.astype(np.float32)
        total += 0  # a token sent to none gives zero, not minus zero
        return rounded(total)
