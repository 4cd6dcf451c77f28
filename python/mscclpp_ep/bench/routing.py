# SPDX-License-Identifier: MIT
"""Reads what `mscclpp_ep.record_routing` wrote: the choices of a model, to measure with them."""

from __future__ import annotations

import dataclasses
import re
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mscclpp_ep.cli import InputError
from mscclpp_ep.recording import FORMAT, KEY, files_of

if TYPE_CHECKING:
    from pathlib import Path

Ids = npt.NDArray[np.int64]
_Parts = dict[tuple[int, int], Ids]  # by rank and step


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """Choices of all ranks at several steps.

    Attributes:
        path: as the user gave it.
        experts: E.
        steps: of each step the int64 [T, K] of each rank, -1 for none; T may differ, K does not.
    """

    path: str
    experts: int
    steps: tuple[tuple[Ids, ...], ...]

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.steps[0])

    @property
    def topk(self) -> int:
        """K."""
        return int(self.steps[0][0].shape[1])

    @property
    def most_tokens(self) -> int:
        """The largest T."""
        return max(len(ids) for step in self.steps for ids in step)

    def at(self, number: int, count: int) -> tuple[Ids, ...]:
        """The step that set `number` of `count` sets of inputs replays.

        They are spread over the recording, which is repeated if it is too short.
        """
        index = number * len(self.steps) // count if count < len(self.steps) else number
        return self.steps[index % len(self.steps)]

    def describe(self) -> dict[str, Any]:
        """Where it is from and how long it is."""
        return {"file": self.path, "steps": len(self.steps)}


def read_routing(path: Path) -> Routing:
    """Reads the file of a recording, or those that the ranks of a job wrote beside it.

    Raises:
        InputError: a file cannot be read, is no recording, or does not fit the others.
    """
    files = files_of(path)
    if not files:
        raise InputError(
            f"cannot read {path}: there is no such file, nor are there {path.stem}.rank*"
            f"{path.suffix}. A running model records one: "
            f"with mscclpp_ep.record_routing({str(path)!r})"
        )
    parts: _Parts = {}
    headers: dict[str, tuple[int, int]] = {}
    for file in files:
        headers[str(file)] = _read_file(file, parts)
    if len(set(headers.values())) > 1:
        said = "; ".join(f"{f}: {r} ranks, {e} experts" for f, (r, e) in headers.items())
        raise InputError(f"the files are not of one recording: {said}. Remove the older ones")
    ranks, experts = next(iter(headers.values()))
    return Routing(str(path), experts, _complete(path, parts, ranks))


def _read_file(path: Path, parts: _Parts) -> tuple[int, int]:
    """Adds the arrays of a file to `parts`; returns the numbers of ranks and experts."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an .npz file of NumPy: {error}") from error
    if str(arrays.pop("format", "")) != FORMAT:
        raise InputError(f"{path} has no entry 'format' that is {FORMAT!r}: it is no recording")
    ranks, experts = (
        _positive(path, name, arrays.pop(name, None)) for name in ("ranks", "experts")
    )
    for name, array in arrays.items():
        place = re.fullmatch(KEY.format(rank=r"(\d+)", step=r"(\d+)"), name)
        if place is None or int(place[1]) >= ranks:
            raise InputError(f"{path}: {name!r} is not the choices of one of {ranks} ranks")
        parts[int(place[1]), int(place[2])] = _ids(path, name, array, experts)
    return ranks, experts


def _positive(path: Path, name: str, array: npt.NDArray[Any] | None) -> int:
    if array is None or array.shape != () or array.dtype.kind not in "iu" or int(array) < 1:
        raise InputError(f"{path}: {name!r} must be a positive integer")
    return int(array)


def _ids(path: Path, name: str, array: npt.NDArray[Any], experts: int) -> Ids:
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] < 1:
        raise InputError(
            f"{path}: {name!r} is {array.dtype} {list(array.shape)}; it must be integers [T, K]"
        )
    ids = array.astype(np.int64)
    if ids.size and not (ids.min() >= -1 and ids.max() < experts):
        raise InputError(
            f"{path}: {name!r} has ids from {ids.min()} to {ids.max()}; they must be -1 or of one "
            f"of {experts} experts"
        )
    return ids


def _complete(path: Path, parts: _Parts, ranks: int) -> tuple[tuple[Ids, ...], ...]:
    """The steps that all ranks recorded: the last may lack some, if a job was ended."""
    count = 0
    while all((rank, count) in parts for rank in range(ranks)):
        count += 1
    if count == 0:
        missing = [str(rank) for rank in range(ranks) if (rank, 0) not in parts]
        raise InputError(f"{path}: no choices of rank {', '.join(missing)} of {ranks}")
    steps = tuple(tuple(parts[rank, step] for rank in range(ranks)) for step in range(count))
    widths = {ids.shape[1] for step in steps for ids in step}
    if len(widths) > 1:
        raise InputError(f"{path}: choices a token differ: {', '.join(map(str, sorted(widths)))}")
    if not any(ids.size for step in steps for ids in step):
        raise InputError(f"{path}: there are no tokens in it")
    return steps
