# SPDX-License-Identifier: MIT
"""Arithmetic of tests: differences, casts to FP8, sets of ids, hashes and sizes."""

from __future__ import annotations

from typing import Any

import torch

from mscclpp_ep._core import InvalidArgument

# One scale stands for so many elements of a row.
_BLOCK = 128
# The largest number of float8_e4m3fn.
_LARGEST = 448.0
# An all-zero block gets the scale of one with this maximum.
_SMALLEST_MAXIMUM = 1e-4


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """How unlike two tensors of one shape are: 0 if they are equal, towards 1 if unrelated.

    It is 1 − 2Σab / Σ(a² + b²) of a = x + 1 and b = y + 1, in float64; 0 for empty tensors.
    """
    a, b = x.detach().double() + 1, y.detach().double() + 1
    denominator = (a * a + b * b).sum()
    if denominator == 0:
        return 0.0
    return float(1 - 2 * (a * b).sum() / denominator)


def safe_div(a: Any, b: Any) -> float:
    """`a / b`, or 0 if b is 0."""
    return 0 if b == 0 else a / b


def ceil_div(x: int, y: int) -> int:
    """`x / y` rounded up, for integers and y > 0."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The smallest multiple of y that is not below x."""
    return ceil_div(x, y) * y


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Casts rows to FP8 with a scale for every 128 elements.

    Args:
        x: [T, H] of a float dtype; the last block may be shorter than 128.

    Returns:
        float8_e4m3fn [T, H] and scales float32 [T, ceil(H / 128)], by which they are to be
        multiplied.

    Raises:
        InvalidArgument: x is not a matrix.
    """
    _check_matrix("x", x)
    tokens, hidden = x.shape
    columns = align(hidden, _BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, columns - hidden))
    blocks = padded.view(tokens, columns // _BLOCK, _BLOCK)
    maximum = blocks.abs().amax(2, keepdim=True).clamp(min=_SMALLEST_MAXIMUM)
    quantised = (blocks * (_LARGEST / maximum)).to(torch.float8_e4m3fn)
    rows = quantised.view(tokens, columns)[:, :hidden].contiguous()
    return rows, (maximum / _LARGEST).squeeze(2)


def per_token_cast_back(x_fp8: torch.Tensor, x_scales: torch.Tensor) -> torch.Tensor:
    """Undoes `per_token_cast_to_fp8`, but for the rounding.

    Args:
        x_fp8: float8_e4m3fn [T, H].
        x_scales: float32 [T, ceil(H / 128)], or int32 [T, ceil(H / 512)] with four exponents
            (UE8M0) each, the first in the lowest byte; or another shape with these elements.

    Returns:
        bfloat16 [T, H].

    Raises:
        InvalidArgument: The shapes do not fit each other.
    """
    if x_fp8.numel() == 0:
        return x_fp8.to(torch.bfloat16)
    _check_matrix("x_fp8", x_fp8)
    tokens, hidden = x_fp8.shape
    blocks = ceil_div(hidden, _BLOCK)
    packed = x_scales.dtype == torch.int32
    per_row = ceil_div(blocks, 4) if packed else blocks
    if x_scales.numel() != tokens * per_row:
        msg = (
            f"x_scales has the shape {tuple(x_scales.shape)}; for x_fp8 {tuple(x_fp8.shape)} it "
            f"must be float32 [{tokens}, {blocks}] or int32 [{tokens}, {ceil_div(blocks, 4)}]"
        )
        raise InvalidArgument(msg)
    rows = x_scales.reshape(tokens, per_row)
    scales = _unpacked(rows)[:, :blocks] if packed else rows.float()
    columns = scales.repeat_interleave(_BLOCK, dim=1)[:, :hidden]
    return (x_fp8.float() * columns).to(torch.bfloat16)


def _unpacked(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two as float32 [T, 4 P], of their exponents, int32 [T, P]."""
    exponents = scales.contiguous().view(torch.uint8).to(torch.int32)
    return (exponents << 23).view(torch.float32)


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Turns each row into the set of its ids: descending, each once, the rest -1.

    Args:
        x: Integers [T, K] below `num_slots`, negative ones for none; changed in place.
        num_slots: How many ids there are.

    Raises:
        InvalidArgument: x is not a matrix, or has an id that is too large.
    """
    _check_matrix("x", x)
    if x.numel() == 0:
        return
    if int(x.max()) >= num_slots:
        msg = f"x has the id {int(x.max())}; there are {num_slots} slots"
        raise InvalidArgument(msg)
    ids = x.clamp(min=-1).sort(dim=1, descending=True).values
    repeated = ids[:, 1:] == ids[:, :-1]
    ids[:, 1:][repeated] = -1
    x.copy_(ids.sort(dim=1, descending=True).values)


def create_grouped_scores(
    scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Scores with those of experts outside the groups of each token set to 0.

    Args:
        scores: [T, E], where group g has the experts from g·E / num_groups on.
        group_idx: int64 [T, G], the groups that each token may use.
        num_groups: Into how many the experts are divided.

    Returns:
        [T, E] of the dtype of `scores`.

    Raises:
        InvalidArgument: The experts cannot be divided into so many groups.
    """
    tokens, experts = scores.shape
    if num_groups <= 0 or experts % num_groups != 0:
        msg = f"num_groups is {num_groups}; it must divide the number of experts, {experts}"
        raise InvalidArgument(msg)
    allowed = torch.zeros((tokens, num_groups), dtype=torch.bool, device=scores.device)
    allowed.scatter_(1, group_idx, value=True)
    return scores * allowed.repeat_interleave(experts // num_groups, dim=1)


def hash_tensor(t: torch.Tensor) -> int:
    """The sum of a tensor's memory as int32 words; the order of rows does not matter."""
    raw = t.detach().contiguous().view(-1).view(torch.uint8)
    padded = torch.nn.functional.pad(raw, (0, -len(raw) % 4))
    return int(padded.view(torch.int32).sum(dtype=torch.int64))


def hash_tensors(*tensors: Any) -> int:
    """The exclusive or of the hashes of tensors, of tuples of them, and of None (0)."""
    value = 0
    for tensor in tensors:
        if isinstance(tensor, (tuple, list)):
            value ^= hash_tensors(*tensor)
        elif tensor is not None:
            value ^= hash_tensor(tensor)
    return value


def count_bytes(*tensors: Any) -> int:
    """The bytes of the elements of tensors, of tuples of them, and of None (0)."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, (tuple, list)):
            total += count_bytes(*tensor)
        elif tensor is not None:
            total += tensor.numel() * tensor.element_size()
    return total


def _check_matrix(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 2:
        msg = f"{name} has {tensor.dim()} dimensions; it must have 2"
        raise InvalidArgument(msg)
