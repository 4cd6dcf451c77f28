# SPDX-License-Identifier: MIT
"""Records which experts a running model chooses, for `python -m mscclpp_ep bench --routing`."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mscclpp_ep._frameworks import framework_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mscclpp_ep._frameworks import Array

FORMAT = "mscclpp_ep routing 1"
KEY = "rank{rank}/step{step}"

_lock = threading.Lock()
_recorders: list[_Recorder] = []


@contextlib.contextmanager
def record_routing(path: str | os.PathLike[str], max_steps: int = 1000) -> Iterator[None]:
    """Records the choices of every dispatch of this process, until the block ends.

    `python -m mscclpp_ep bench --routing PATH` measures with them. Every rank gives the same path.
    A process that is one of several ranks writes a file of its own beside it: `routing.npz` becomes
    `routing.rank0.npz` and so on; bench is given `routing.npz` all the same.

    The file is one of NumPy (`.npz`): `format`, the string "mscclpp_ep routing 1"; `ranks`, R;
    `experts`, E; and for each rank and step `rank0/step0`, an int32 [T, K] of ids of experts, -1
    for none.

    Args:
        path: Where to write; what is there is replaced when the block ends.
        max_steps: Dispatches recorded of each rank, T x K x 4 bytes each; later ones are not.

    Raises:
        OSError: The file cannot be written.
        ValueError: Dispatches in the block disagree on the number of ranks or experts.
    """
    recorder = _Recorder(Path(path), max_steps)
    with _lock:
        _recorders.append(recorder)
    try:
        yield
    finally:
        with _lock:
            _recorders.remove(recorder)
        recorder.write()


def note_choices(rank: int, ranks: int, experts: int, topk_idx: Array) -> None:
    """Gives the choices of a dispatch to those who record; cheap if nobody does."""
    if not _recorders:
        return
    ids = framework_of(topk_idx).copy_to_host(topk_idx)
    with _lock:
        for recorder in _recorders:
            recorder.add(rank, ranks, experts, ids.astype(np.int32))


def files_of(path: Path) -> list[Path]:
    """The file of a recording, or the files that its ranks wrote."""
    if path.exists():
        return [path]
    return sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))


class _Recorder:
    """The choices of the ranks of this process: one, or several if they are threads."""

    def __init__(self, path: Path, max_steps: int) -> None:
        self._path = path
        self._max_steps = max_steps
        self._sizes: set[tuple[int, int]] = set()
        self._steps: dict[int, list[npt.NDArray[np.int32]]] = {}

    def add(self, rank: int, ranks: int, experts: int, ids: npt.NDArray[np.int32]) -> None:
        self._sizes.add((ranks, experts))
        steps = self._steps.setdefault(rank, [])
        if len(steps) < self._max_steps:
            steps.append(ids)

    def write(self) -> None:
        if not self._steps:
            return
        if len(self._sizes) > 1:
            said = ", ".join(f"{ranks} ranks with {experts}" for ranks, experts in self._sizes)
            msg = f"one recording cannot hold layers of different sizes (experts): {said}"
            raise ValueError(msg)
        ((ranks, experts),) = self._sizes
        arrays: dict[str, Any] = {
            KEY.format(rank=rank, step=step): ids
            for rank, steps in self._steps.items()
            for step, ids in enumerate(steps)
        }
        # Complete, or not there: a reader never finds a part of it.
        path = self._target(ranks)
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            np.savez_compressed(file, format=FORMAT, ranks=ranks, experts=experts, **arrays)
        part.replace(path)

    def _target(self, ranks: int) -> Path:
        path = self._path
        if len(self._steps) == ranks:
            return path
        which = "-".join(map(str, sorted(self._steps)))
        return path.with_name(f"{path.stem}.rank{which}{path.suffix}")
