# SPDX-License-Identifier: MIT
"""What one run measures."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from mscclpp_ep.bench.routing import Routing

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HT = "ht"
LL = "ll"
MODES = (HT, LL)
# One of so many pairs of a chain is not timed: those at its beginning.
_CHAIN_WARMUP = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and method of the measurements of one mode.

    Attributes:
        mode: HT (high throughput) or LL (low latency).
        tokens: of each rank, in the headline figures; in LL mode also what a rank may send at most.
        sizes: numbers of tokens, ascending; `tokens` is one of them.
        iters: timed calls of each operation.
        refresh: timed calls with the same inputs.
        warmup: untimed calls before the timed ones, each time that inputs change.
        threads: of each rank.
        flush: megabytes (2^20 bytes) of other memory that are read before each timed call.
        chain: dispatch and combine, so many times in a row; 0: no chains.
        peers: those to measure.
        routing: recorded choices; None: random ones.
    """

    mode: str
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
    chain: int
    seed: int
    peers: tuple[str, ...]
    routing: Routing | None = None

    @property
    def row_bytes(self) -> int:
        """Of one token, in bfloat16."""
        return self.hidden * int(BFLOAT16.itemsize)

    @property
    def experts_held(self) -> int:
        """Experts of a rank, of the last ones perhaps fewer."""
        return -(-self.experts // self.ranks)

    @property
    def chain_warmup(self) -> int:
        """Pairs at the beginning of a chain that are not timed."""
        return self.chain // _CHAIN_WARMUP

    def without_peers(self, names: set[str]) -> Settings:
        """The same, with fewer peers."""
        return dataclasses.replace(self, peers=tuple(p for p in self.peers if p not in names))

    def rounds(self) -> list[int]:
        """How many iterations each set of inputs serves."""
        full, rest = divmod(self.iters, self.refresh)
        return [self.refresh] * full + [rest] * (rest > 0)

    def to_json(self) -> dict[str, Any]:
        """The same, with the file instead of the choices recorded in it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["routing"] = None if self.routing is None else self.routing.describe()
        return fields
