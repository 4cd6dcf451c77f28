# SPDX-License-Identifier: MIT
"""Runs one function on several rank processes of this host, and lets none of them outlive it."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import mscclpp_ep as ep

# How long to collect messages after the first failure: the ranks that a failure takes along often
# report before the one that caused it is found dead.
_GRACE_S = 0.3
# How long a process may take to end after its last message.
_LEAVE_S = 5.0
_THREAD_VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_CONSEQUENCES = frozenset({"PeerFailure", "Timeout"})


@dataclass(frozen=True)
class Rank:
    """What a rank process knows of the run it is part of."""

    index: int
    size: int
    meeting_point: str
    _pipe: Connection = field(repr=False)

    def join(self) -> ep.Group:
        """Return the group of all ranks, once each has called this."""
        return ep.Group.from_file(self.meeting_point, self.index, self.size)

    def report(self, step: str) -> None:
        """Tell the parent that this rank begins a step."""
        self._pipe.send(("step", step))


@dataclass(frozen=True)
class Failure:
    """How one rank failed.

    Attributes:
        rank: which.
        cause: 0 for a process that died, 1 for an exception, 2 for one that follows from another
            rank's failure.
        message: what happened, in a line.
        details: a traceback, if the exception was not one of the library's.
    """

    rank: int
    cause: int
    message: str
    details: str = ""


class RankError(Exception):
    """A rank failed, and the run was ended."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} {failure.message}; all ranks were ended")
        self.details = failure.details


def run_ranks(
    target: Callable[[Rank, Any], Any],
    argument: Any,
    ranks: int,
    *,
    on_step: Callable[[int, str], None] = lambda rank, step: None,
    timeout: float | None = None,
) -> list[Any]:
    """Call `target(rank, argument)` in `ranks` new processes and return their results by rank.

    Whatever ends the call (an error, Ctrl-C, SIGTERM) ends the processes, and so does the death
    of this process.

    Args:
        target: a function of a module, not a nested one.
        argument: is pickled, as results are.
        ranks: how many processes.
        on_step: called with the rank and its step at each `Rank.report`.
        timeout: seconds after which the run is ended; None waits for ever.

    Raises:
        RankError: if a rank raises, dies or, with `timeout`, takes too long.
    """
    crew = _Crew(on_step, None if timeout is None else time.monotonic() + timeout)
    with tempfile.TemporaryDirectory(prefix="mscclpp_ep-") as folder, sigterm_raises():
        try:
            with _rank_environment(ranks):
                for index in range(ranks):
                    crew.start(target, argument, index, ranks, folder)
            return crew.collect()
        finally:
            crew.end()


class _Crew:
    """The processes of a run, and what has been received from them."""

    def __init__(self, on_step: Callable[[int, str], None], deadline: float | None) -> None:
        self._on_step = on_step
        self._deadline = deadline
        self._processes: list[SpawnProcess] = []
        self._pipes: dict[Connection, int] = {}
        self._results: dict[int, Any] = {}
        self._failures: list[Failure] = []

    def start(
        self, target: Callable[[Rank, Any], Any], argument: Any, index: int, size: int, folder: str
    ) -> None:
        """Start one rank."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        rank = Rank(index, size, str(Path(folder) / "rendezvous"), theirs)
        process = context.Process(target=_rank_main, args=(target, rank, argument), daemon=True)
        process.start()
        # Only the child may hold the writing end, or its death is not seen as the end of the file.
        theirs.close()
        self._processes.append(process)
        self._pipes[ours] = index

    def collect(self) -> list[Any]:
        """Receive until all ranks have sent a result; raise for the likeliest culprit."""
        while self._pipes:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            for pipe in wait(list(self._pipes), left):
                assert isinstance(pipe, Connection)
                self._receive(pipe)
        if self._failures:
            raise RankError(min(self._failures, key=lambda failure: failure.cause))
        if self._pipes:
            slowest = min(self._pipes.values())
            raise RankError(Failure(slowest, 1, "has not finished in time"))
        for process in self._processes:
            process.join(_LEAVE_S)
        return [self._results[rank] for rank in range(len(self._processes))]

    def _receive(self, pipe: Connection) -> None:
        rank = self._pipes[pipe]
        try:
            kind, content = pipe.recv()
        except (EOFError, OSError):
            kind, content = "failure", self._death_of(rank)
        if kind == "step":
            self._on_step(rank, content)
            return
        del self._pipes[pipe]
        pipe.close()
        if kind == "result":
            self._results[rank] = content
            return
        if not self._failures:
            self._deadline = time.monotonic() + _GRACE_S
        self._failures.append(content)

    def _death_of(self, rank: int) -> Failure:
        process = self._processes[rank]
        process.join(_LEAVE_S)
        code = process.exitcode
        if code is not None and code < 0:
            return Failure(rank, 0, f"was killed by {signal.Signals(-code).name}")
        return Failure(rank, 0, f"ended early, with exit status {code}")

    def end(self) -> None:
        """End the processes that have not ended by themselves."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _rank_main(target: Callable[[Rank, Any], Any], rank: Rank, argument: Any) -> None:
    """The main function of a rank process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe = rank._pipe
    try:
        pipe.send(("result", target(rank, argument)))
    except Exception as error:
        name = type(error).__name__
        pipe.send(
            (
                "failure",
                Failure(
                    rank=rank.index,
                    cause=2 if name in _CONSEQUENCES else 1,
                    message=f"failed: {name}: {error}",
                    details="" if isinstance(error, ep.Error) else traceback.format_exc(),
                ),
            )
        )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _rank_environment(ranks: int) -> Iterator[None]:
    """What processes started inside inherit: a share of the cores, and no Ctrl-C of their own.

    SIGINT goes to every process of a terminal; the parent alone answers it, and ends the ranks.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    added = [name for name in _THREAD_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(added, threads))
    # Started with the first process otherwise, and its start ends with SIGINT unblocked.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM run the clean-up, unless the program has its own answer to it."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
