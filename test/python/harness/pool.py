# SPDX-License-Identifier: MIT
"""Pools of ranks: child processes that run the functions they are told to.

A rank is a process of its own ("process") or a thread of one process that it shares with the
other ranks ("thread"). Functions travel by import path, arguments by pickle, between this process
and its own children only. A pool that saw a failure is thrown away and started anew; one that
hangs has the stacks of all its ranks dumped first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

PATIENCE = float(os.environ.get("RANKS_PATIENCE", "1"))  # how much longer all is waited for
RUN_TIMEOUT = 90.0 * PATIENCE
GRACE = 10.0  # for the other ranks, once one has failed
EXIT_TIMEOUT = 30.0 * PATIENCE
SOURCES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Failure:
    """What ended a rank's function: an exception, or the end of its process."""

    kind: str
    message: str
    trace: str = ""

    def __str__(self) -> str:
        return self.trace or f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Outcome:
    value: Any = None
    failure: Failure | None = None


class RanksFailed(AssertionError):
    """At least one rank did not return."""


class Host:
    """A child process and the ranks in it."""

    def __init__(self, ranks: list[int], config: dict, base: Path) -> None:
        self.ranks = ranks
        self.log = base / f"rank{ranks[0]}.log"
        ours, theirs = socket.socketpair()
        self.connection = connection.Connection(ours.detach())
        config = {**config, "ranks": ranks}
        paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": config["scratch"],
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("wb") as log, theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.worker", str(theirs.fileno()), json.dumps(config)],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, *message) -> None:
        with contextlib.suppress(OSError):  # its end is noticed where its answer is read
            self.connection.send(message)

    def log_tail(self, limit: int = 20000) -> str:
        return self.log.read_bytes()[-limit:].decode(errors="replace")

    def ask_for_stacks(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.connection.close()

    def leave(self, deadline: float) -> str | None:
        """Lets the process end by itself; returns what went wrong, if anything did."""
        try:
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.ask_for_stacks()
            await_stacks([self])
            return f"ranks {self.ranks} did not exit\n{self.log_tail()}"
        return f"ranks {self.ranks} exited with {code}\n{self.log_tail()}" if code else None


def await_stacks(hosts: list[Host], limit: float = 5.0) -> None:
    """Waits until every host has written its stacks to its log, or cannot."""
    deadline, before = time.monotonic() + limit, []
    while time.monotonic() < deadline:
        logs = [host.log_tail() for host in hosts]
        if logs == before and all("most recent call first" in log for log in logs):
            return
        before = logs
        time.sleep(0.1)


class Run:
    """A function on its way through all ranks of a pool."""

    def __init__(self, pool: Pool, job: int, target: str) -> None:
        self.pool, self.job, self.target = pool, job, target
        self.outcomes: dict[int, Outcome] = {}
        self.reports: dict[int, deque] = defaultdict(deque)

    def send(self, rank: int, value: Any = None) -> None:
        """Gives `rank` what its next `context.receive()` returns."""
        self.pool.host_of(rank).send("mail", rank, value)

    def send_all(self, value: Any = None) -> None:
        for rank in range(self.pool.size):
            self.send(rank, value)

    def report(self, rank: int, timeout: float = RUN_TIMEOUT) -> Any:
        """The next value that `rank` reported."""
        deadline = time.monotonic() + timeout
        while not self.reports[rank] and rank not in self.outcomes:
            self._pump_or_give_up(f"rank {rank} reports nothing", deadline)
        if not self.reports[rank]:
            self.pool.broken = True
            raise RanksFailed(f"rank {rank} reported nothing\n{self.pool.describe(self)}")
        return self.reports[rank].popleft()

    def await_finished(self, ranks: Iterable[int], timeout: float = RUN_TIMEOUT) -> None:
        """Waits for some of the ranks only."""
        deadline = time.monotonic() + timeout
        while missing := set(ranks) - self.outcomes.keys():
            self._pump_or_give_up(f"ranks {sorted(missing)} do not finish", deadline)

    def _pump_or_give_up(self, trouble: str, deadline: float) -> None:
        if not self.pool.pump(self, deadline):
            self._give_up()
            self.pool.broken = True
            raise RanksFailed(f"{trouble}\n{self.pool.describe(self)}")

    def result(self, timeout: float = RUN_TIMEOUT) -> list[Outcome]:
        """Waits for all ranks. On a hang, stacks are dumped and the ranks killed."""
        deadline = time.monotonic() + timeout
        while len(self.outcomes) < self.pool.size and self.pool.pump(self, deadline):
            if self.failed and not self.pool.patient:
                deadline = min(deadline, time.monotonic() + GRACE)
        if len(self.outcomes) < self.pool.size:
            self._give_up()
        self.pool.broken |= self.failed
        return [self.outcomes[rank] for rank in range(self.pool.size)]

    @property
    def failed(self) -> bool:
        return any(o.failure for o in self.outcomes.values())

    def _give_up(self) -> None:
        stuck = [h for h in self.pool.hosts if not set(h.ranks) <= self.outcomes.keys()]
        for host in stuck:
            host.ask_for_stacks()
        await_stacks(stuck)
        for host in stuck:
            failure = Failure("Hang", f"ranks {host.ranks} hang in {self.target}", host.log_tail())
            for rank in host.ranks:
                self.outcomes.setdefault(rank, Outcome(failure=failure))
            host.kill()


class Pool:
    """R ranks. `patient`: a failure of one rank is no reason to hurry the others."""

    def __init__(self, size: int, mode: str, backend: str = "cpu", patient: bool = False) -> None:
        self.size, self.mode, self.backend, self.patient = size, mode, backend, patient
        self.broken = False
        self.jobs = itertools.count()
        self.base = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.scratch = self.base / "tmp"
        self.scratch.mkdir()
        self.hosts: list[Host] = []

    def __repr__(self) -> str:
        return f"{self.backend}-{self.mode}-{self.size}"

    def run(self, function, *args, timeout: float = RUN_TIMEOUT) -> list[Outcome]:
        return self.start(function, *args).result(timeout)

    def check(self, function, *args, timeout: float = RUN_TIMEOUT) -> list[Any]:
        """Runs `function(context, *args)` on every rank; all must return."""
        run = self.start(function, *args)
        outcomes = run.result(timeout)
        if run.failed:
            raise RanksFailed(f"{run.target}{args}\n{self.describe(run)}")
        return [o.value for o in outcomes]

    def start(self, function, *args) -> Run:
        if self.broken:
            self.kill()
        if not self.hosts:
            self._spawn()
        target = f"{function.__module__}:{function.__qualname__}"
        run = Run(self, next(self.jobs), target)
        for host in self.hosts:
            host.send("run", run.job, target, args)
        return run

    def host_of(self, rank: int) -> Host:
        return next(h for h in self.hosts if rank in h.ranks)

    def pids(self) -> list[int]:
        return [self.host_of(rank).pid for rank in range(self.size)]

    def pump(self, run: Run, deadline: float) -> bool:
        """Takes in what arrives next; False if nothing did until the deadline."""
        finished = run.outcomes.keys()
        waiting = {h.connection: h for h in self.hosts if not set(h.ranks) <= finished}
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        for end in ready:
            self._take(run, waiting[end])
        return bool(ready)

    def _take(self, run: Run, host: Host) -> None:
        try:
            kind, job, rank, value = host.connection.recv()
        except (EOFError, OSError):
            code = host.process.wait()
            failure = Failure("Died", f"process ended with {code}", host.log_tail())
            for rank in host.ranks:
                run.outcomes.setdefault(rank, Outcome(failure=failure))
            return
        if job == run.job and kind == "report":
            run.reports[rank].append(value)
        elif job == run.job:
            run.outcomes[rank] = value

    def describe(self, run: Run) -> str:
        failed = [(r, o.failure) for r, o in sorted(run.outcomes.items()) if o.failure]
        return "\n".join(f"--- rank {r} of {self}: {f.kind}: {f.message}\n{f}" for r, f in failed)

    def close(self) -> None:
        """Ends the ranks in good order; raises if one of them cannot."""
        deadline = time.monotonic() + EXIT_TIMEOUT
        hosts = [] if self.broken else self.hosts
        for host in hosts:
            host.send("exit")
        wrong = [w for h in hosts if (w := h.leave(deadline))]
        self.kill()
        shutil.rmtree(self.base)
        if wrong:
            raise RanksFailed("\n".join(wrong))

    def kill(self) -> None:
        for host in self.hosts:
            host.kill()
        self.hosts, self.broken = [], False

    def _spawn(self) -> None:
        ranks = list(range(self.size))
        shares = [[rank] for rank in ranks] if self.mode == "process" else [ranks]
        config = {"size": self.size, "backend": self.backend, "scratch": str(self.scratch)}
        self.hosts = [Host(share, {**config, "mode": self.mode}, self.base) for share in shares]


class Pools:
    """The pools of a test session, started when first used."""

    def __init__(self) -> None:
        self.pools: dict[tuple, Pool] = {}

    def get(self, size: int, mode: str, backend: str) -> Pool:
        key = (size, mode, backend)
        if key not in self.pools:
            self.pools[key] = Pool(size, mode, backend)
        return self.pools[key]

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for pool in self.pools.values():
                stack.callback(pool.close)
