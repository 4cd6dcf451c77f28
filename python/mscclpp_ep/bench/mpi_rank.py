# SPDX-License-Identifier: MIT
"""The program that `mpirun` starts: `python -m mscclpp_ep.bench.mpi_rank FOLDER PROCESS`.

The folder has the settings; each rank leaves there what it measured, or what went wrong. It ends
with the process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import sys
import threading
from pathlib import Path

from mscclpp_ep.bench.cases import Case
from mscclpp_ep.bench.checks import WrongResultError
from mscclpp_ep.bench.clock import Clock, SpinBarrier
from mscclpp_ep.bench.mpi import Mpi

SETTINGS = "settings"
WRONG = "wrong"


def spans_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves what it measured."""
    return folder / f"spans{rank}"


def _end_with(process: int) -> None:
    """Ends this rank once the process that started mpirun is gone, which mpirun does not notice."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])
    os._exit(1)


def main() -> None:
    """Measures on one rank."""
    from mpi4py import MPI

    folder = Path(sys.argv[1])
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    settings = pickle.loads((folder / SETTINGS).read_bytes())
    if size != settings.ranks:
        sys.exit(f"{size} ranks were started, not {settings.ranks}")
    clock = Clock(SpinBarrier(folder / "barrier", rank, size), settings)
    peer = Mpi(clock, settings)
    gc.disable()
    try:
        for number, iterations in enumerate(settings.rounds()):
            if rank == 0:
                print(f"mpi: inputs {number + 1}", flush=True)
            peer.measure(Case(settings, rank, settings.tokens, number), iterations)
            gc.collect()
    except WrongResultError as error:
        (folder / WRONG).write_text(f"rank {rank}: {error}", encoding="utf-8")
        MPI.COMM_WORLD.Abort(1)
    spans_file(folder, rank).write_bytes(pickle.dumps(dict(clock.spans)))


if __name__ == "__main__":
    main()
