# SPDX-License-Identifier: MIT
"""Compares what was measured with what it must be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mscclpp_ep.bench.settings import BFLOAT16

_SLICE = 512  # rows that are compared at once

Bits = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def rounded(sums: Floats) -> Bits:
    """Sums as bfloat16, by their bits."""
    bits: Bits = sums.astype(BFLOAT16).view(np.uint16)
    return bits


class WrongResultError(Exception):
    """What was measured did not compute what it should."""


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


def require_same_rows(what: str, given: Bytes, expected: Bytes) -> None:
    """Compares rows, whatever their order.

    Raises:
        WrongResultError: they differ.
    """
    if given.shape != expected.shape:
        msg = f"{what} gave {given.shape[0]} rows, expected {expected.shape[0]}"
        raise WrongResultError(msg)
    if given.size and not np.array_equal(_sorted(given), _sorted(expected)):
        msg = f"{what}: the rows are not those that were sent"
        raise WrongResultError(msg)


def _sorted(rows: Bytes) -> npt.NDArray[np.void]:
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1])))
    return np.sort(whole.ravel())


def require_within(what: str, given: Floats, expected: Floats, largest: Floats) -> None:
    """Compares sums of which parts may have been rounded to bfloat16.

    Args:
        what: Named in the error.
        given: The sums.
        expected: What they are without any rounding.
        largest: The sums of the absolute values of what is added.

    Raises:
        WrongResultError: they differ by more than two roundings can explain.
    """
    if given.shape != expected.shape:
        msg = f"{what} gave {given.shape}, expected {expected.shape}"
        raise WrongResultError(msg)
    if not (np.abs(given - expected) <= np.float32(2**-7) * largest).all():
        msg = f"{what}: sums differ from the expected ones by more than rounding explains"
        raise WrongResultError(msg)
