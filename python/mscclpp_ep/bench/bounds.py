# SPDX-License-Identifier: MIT
"""What the figures of the HT mode are held to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mscclpp_ep.bench.gloo import GLOO
from mscclpp_ep.bench.ops import COMBINE, DISPATCH, NO_BLOCK

if TYPE_CHECKING:
    from mscclpp_ep.bench.results import Results


@dataclasses.dataclass(frozen=True)
class Bound:
    """Something that must hold; `value` is None if it could not be measured."""

    name: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether it was measured and holds."""
        if self.value is None:
            return False
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)


def bounds_of(results: Results) -> list[Bound]:
    """Those of docs/bench.md, with the values of a run."""
    dispatch, combine = results.find(DISPATCH), results.find(COMBINE)
    no_block = results.find(NO_BLOCK).median_us / dispatch.median_us
    bounds = [
        Bound("dispatch: times faster than gloo", dispatch.times_faster.get(GLOO), least=12),
        Bound("combine: times faster than gloo", combine.times_faster.get(GLOO), least=20),
        Bound("dispatch: percent of the limit", dispatch.percent_of_limit, least=70),
        Bound("combine: percent of the limit", combine.percent_of_limit, least=70),
        Bound("dispatch, no block free: times the time of dispatch", no_block, most=1.5),
    ]
    sizes = results.settings.sizes
    if len(sizes) > 1:
        text = f"from {sizes[0]} to {sizes[-1]} tokens: growth of the time over that of tokens"
        for op in (DISPATCH, COMBINE):
            bounds.append(Bound(f"{op}, {text}", _growth(results, op), least=0.85, most=1.15))
    return bounds


def _growth(results: Results, op: str) -> float:
    """Time with most tokens over time with fewest, divided by the ratio of tokens."""
    least, most = results.settings.sizes[0], results.settings.sizes[-1]
    times = results.find(op, most).median_us / results.find(op, least).median_us
    return times * least / most
