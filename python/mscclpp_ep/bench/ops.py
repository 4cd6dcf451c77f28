# SPDX-License-Identifier: MIT
"""Names of what is measured; after a comma, how an operation differs from the plain one."""

from __future__ import annotations

OURS = "mscclpp_ep"
LIMIT = "limit"
FLOOR = "floor"
START = "start"  # of a peer

DISPATCH = "dispatch"
COMBINE = "combine"
LAYOUT = "layout"
CHAINED = "chained"

# Of the HT mode. Plain are: results in the arena, and experts' output in memory of `Buffer.empty`.
COMBINE_ORDINARY = "combine, ordinary input"
NO_BLOCK = "dispatch, no block free"
SEALED_DISPATCH = "dispatch, integrity check"
SEALED_COMBINE = "combine, integrity check"
COLD_DISPATCH = "dispatch, cold"
COLD_COMBINE = "combine, cold"

# Of GPUs. The plain dispatch asks the host for its counts.
CACHED_DISPATCH = "dispatch, cached"
WORST_DISPATCH = "dispatch, worst-case rows"
CACHED_FP8_DISPATCH = "dispatch, FP8, cached"
WEIGHTED_COMBINE = "combine, with weights"
CACHED_CHAINED = "chained, cached"
GRAPH_CHAINED = "chained, CUDA graph"

# Of the LL mode and of GPUs. Plain is bfloat16, as peers of the LL mode send it.
FP8_DISPATCH = "dispatch, FP8"


def kind(op: str) -> str:
    """What an operation is, however it differs from the plain one."""
    return op.split(",", maxsplit=1)[0]


def variant(op: str) -> str | None:
    """How an operation differs from the plain one; None if it is that."""
    _, comma, text = op.partition(", ")
    return text if comma else None
