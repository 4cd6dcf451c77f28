# SPDX-License-Identifier: MIT
"""Compares tensors on a GPU with what they must be, and spoils those that were compared."""

from __future__ import annotations

from typing import Any

from mscclpp_ep.bench.checks import WrongResultError

_POISON = 0x7F  # makes NaNs of bytes, in every type that rows have
_SPOILED = 3  # of what a dispatch returns: rows (and scales), indices, weights
_FACTOR = 0x9E3779B1


def bits_of(torch: Any, tensor: Any) -> Any:
    """The bytes of a tensor, without a copy."""
    return tensor.contiguous().view(torch.uint8)


def require_same(torch: Any, what: str, given: Any, expected: Any) -> None:
    """Compares bits.

    Raises:
        WrongResultError: they differ.
    """
    if tuple(given.shape) != tuple(expected.shape) or given.dtype != expected.dtype:
        msg = (
            f"{what} gave {given.dtype} {list(given.shape)}, expected {expected.dtype} "
            f"{list(expected.shape)}"
        )
        raise WrongResultError(msg)
    ours, theirs = bits_of(torch, given), bits_of(torch, expected)
    if torch.equal(ours, theirs):
        return
    wrong = (ours != theirs).flatten(1).any(dim=1).nonzero().flatten().tolist()
    msg = f"{what}: {len(wrong)} of {len(expected)} rows are wrong, the first is {wrong[0]}"
    raise WrongResultError(msg)


def require_close(torch: Any, what: str, given: Any, expected: Any) -> None:
    """Compares bfloat16 sums that may have been taken in another order.

    Raises:
        WrongResultError: they differ by more than order can explain.
    """
    if given.shape != expected.shape:
        msg = f"{what} gave {list(given.shape)}, expected {list(expected.shape)}"
        raise WrongResultError(msg)
    ours, theirs = expected.float(), given.float()
    if not bool(((theirs - ours).abs() <= 2**-7 * ours.abs() + 1e-5).all()):
        msg = f"{what}: sums differ from the expected ones by more than one unit in bfloat16"
        raise WrongResultError(msg)


def require_same_rows(torch: Any, what: str, given: Any, expected: Any) -> None:
    """Compares rows, whatever their order, by a number that is made of each.

    Raises:
        WrongResultError: they differ.
    """
    if tuple(given.shape) != tuple(expected.shape):
        msg = f"{what} gave {list(given.shape)}, expected {list(expected.shape)}"
        raise WrongResultError(msg)
    if not torch.equal(_numbers(torch, given), _numbers(torch, expected)):
        msg = f"{what}: the rows are not those that were sent"
        raise WrongResultError(msg)


def _numbers(torch: Any, rows: Any) -> Any:
    pieces = bits_of(torch, rows).view(torch.int16).int()
    places = torch.arange(1, pieces.shape[1] + 1, device=pieces.device)
    # Odd, so that no bit is lost, and the same for the same place.
    factors = (places * _FACTOR & 0x7FFFFFFF | 1).int()
    return (pieces * factors).sum(dim=1, dtype=torch.int64).sort().values


def spoil(torch: Any, result: Any) -> None:
    """Overwrites rows, indices and weights of a result, so that no later one is right by remains.

    Handles are left alone, which come after them in what a dispatch returns.
    """
    if isinstance(result, (tuple, list)):
        for item in result[:_SPOILED]:
            spoil(torch, item)
    elif isinstance(result, torch.Tensor) and result.numel() > 0 and result.is_contiguous():
        result.view(torch.uint8).fill_(_POISON)
