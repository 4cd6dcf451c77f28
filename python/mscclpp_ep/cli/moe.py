# SPDX-License-Identifier: MIT
"""A mixture-of-experts layer in NumPy, and how far from it a distributed one may be.

All parameters are random, drawn from a seed, so that every rank has the same without sending any.
Experts compute in float64: of all that a distributed layer does differently, only its two
roundings to bfloat16 and the library's sum are then large enough to be seen.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Half the distance from 1 to the next bfloat16: the largest relative error of one rounding.
BFLOAT16_ROUNDOFF = 2.0**-8
# A rank's partial sum p is rounded to bfloat16 before it is sent, and the sum of all is rounded
# again: u sum|p| + u (1 + u) sum|p|. 2.01 instead of 2 + u leaves room for the float32 additions
# in between, (R - 1) 2^-24 each, up to several hundred ranks.
BOUND_FACTOR = 2.01 * BFLOAT16_ROUNDOFF
BOUND_TEXT = "2.01 x 2^-8 x (sum over ranks of |partial sum|)"

_EMBEDDING, _ROUTER, _POPULARITY, _EXPERT = range(4)


@dataclass(frozen=True)
class Model:
    """The sizes of a layer, and the seed of its parameters.

    Attributes:
        vocabulary: how many different tokens there are.
        hidden: elements a token.
        ffn: elements between the two matrices of an expert.
        experts: experts in all.
        topk: experts a token.
        skew: 0 treats experts alike; 1 favours them like words of a language, by 1 / n.
        seed: where the random numbers start.
    """

    vocabulary: int
    hidden: int
    ffn: int
    experts: int
    topk: int
    skew: float
    seed: int

    def random(self, purpose: int, index: int = 0) -> np.random.Generator:
        """Return the generator of one set of parameters."""
        return np.random.default_rng([self.seed, purpose, index])


@dataclass(frozen=True)
class Expert:
    """The two matrices of an expert: [hidden, ffn] and [ffn, hidden]."""

    up: Floats
    down: Floats

    def __call__(self, x: Doubles) -> Doubles:
        """Return x up to ffn elements a row, through SiLU, and down again."""
        inner = x @ self.up
        # A large negative element gives exp(...) = inf, and SiLU's limit, -0.
        with np.errstate(over="ignore"):
            inner /= 1.0 + np.exp(-inner)
        return inner @ self.down


def make_expert(model: Model, index: int) -> Expert:
    """Draw the parameters of one expert, which keep the scale of what they multiply."""
    random = model.random(_EXPERT, index)
    up = random.standard_normal((model.hidden, model.ffn), dtype=np.float32)
    down = random.standard_normal((model.ffn, model.hidden), dtype=np.float32)
    return Expert(up / np.float32(model.hidden**0.5), down / np.float32(model.ffn**0.5))


def experts_of(rank: int, ranks: int, experts: int) -> range:
    """Return the experts that a rank holds: blocks of equal length, the last ones shorter."""
    block = -(-experts // ranks)
    return range(min(rank * block, experts), min((rank + 1) * block, experts))


def shares(tokens: int, ranks: int) -> list[int]:
    """Return where to cut tokens so that rank r gets about r + 1 parts: ranks + 1 positions."""
    parts = np.cumsum(np.arange(ranks + 1))
    return [int(cut) for cut in np.rint(parts * tokens / parts[-1])]


def embed(model: Model, tokens: Ids) -> Array:
    """Return the input of the layer, bfloat16[tokens, hidden]."""
    shape = (model.vocabulary, model.hidden)
    table = model.random(_EMBEDDING).standard_normal(shape, dtype=np.float32)
    return table.astype(BFLOAT16)[tokens]


def route(model: Model, x: Array) -> tuple[Ids, Floats]:
    """Return the experts of each token, best first, and their weights, which sum to 1.

    In float64, so that however the products are summed, the choice is the same.
    """
    router = model.random(_ROUTER).standard_normal((model.hidden, model.experts))
    place = model.random(_POPULARITY).permutation(model.experts)
    scores = x.astype(np.float64) @ (router / model.hidden**0.5) - model.skew * np.log1p(place)
    topk_idx = np.argsort(-scores, axis=1, kind="stable")[:, : model.topk].astype(np.int64)
    best = np.take_along_axis(scores, topk_idx, axis=1)
    odds = np.exp(best - best.max(axis=1, keepdims=True))
    return topk_idx, (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def apply_experts(
    x: Array, topk_idx: Ids, topk_weights: Floats, experts: Iterable[tuple[int, Expert]]
) -> Doubles:
    """Return, for each row, the weighted sum of the given experts among those it chose.

    Args:
        x: [rows, hidden].
        topk_idx: [rows, topk], -1 for none.
        topk_weights: [rows, topk].
        experts: pairs of the number by which `topk_idx` calls an expert, and the expert.
    """
    result = np.zeros(x.shape, dtype=np.float64)
    for index, expert in experts:
        rows, choices = np.nonzero(topk_idx == index)
        if rows.size:
            weights = topk_weights[rows, choices].astype(np.float64)
            result[rows] += weights[:, np.newaxis] * expert(x[rows].astype(np.float64))
    return result


@dataclass(frozen=True)
class Reference:
    """The layer computed in one process.

    Attributes:
        output: float64[tokens, hidden].
        bound: how far from each element of `output` a distributed layer may be.
        topk_weights: float32[tokens, topk].
        load: routes an expert.
    """

    output: Doubles
    bound: Doubles
    topk_weights: Floats
    load: list[int]


def compute_reference(model: Model, tokens: Ids, ranks: int) -> Reference:
    """Compute the layer without sending anything; `ranks` matters to the bound only."""
    x = embed(model, tokens)
    topk_idx, topk_weights = route(model, x)
    output = np.zeros(x.shape, dtype=np.float64)
    magnitude = np.zeros(x.shape, dtype=np.float64)
    for rank in range(ranks):
        held = experts_of(rank, ranks, model.experts)
        drawn = ((index, make_expert(model, index)) for index in held)
        partial = apply_experts(x, topk_idx, topk_weights, drawn)
        output += partial
        magnitude += np.abs(partial)
    bound = BOUND_FACTOR * magnitude + float(np.finfo(np.float32).tiny)
    load = np.bincount(topk_idx.ravel(), minlength=model.experts)
    return Reference(output, bound, topk_weights, load.tolist())


@dataclass(frozen=True)
class Difference:
    """How a result differs from the reference.

    Attributes:
        elements: how many elements there are.
        beyond: how many are further off than their bound, or not numbers.
        largest: the largest difference.
        of_bound: the largest ratio of a difference to its bound.
    """

    elements: int
    beyond: int
    largest: float
    of_bound: float


def compare(output: Array, reference: Reference) -> Difference:
    """Compare the output of a distributed layer with the reference, element by element."""
    if output.shape != reference.output.shape:
        raise ValueError(f"output has shape {output.shape}, not {reference.output.shape}")
    difference = np.abs(output.astype(np.float64) - reference.output)
    difference[np.isnan(difference)] = np.inf
    return Difference(
        elements=difference.size,
        beyond=int(np.count_nonzero(difference > reference.bound)),
        largest=float(difference.max(initial=0.0)),
        of_bound=float((difference / reference.bound).max(initial=0.0)),
    )
