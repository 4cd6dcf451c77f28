# SPDX-License-Identifier: MIT
"""A child process of a pool, and what the functions that run in it are given."""

from __future__ import annotations

import copy
import faulthandler
import functools
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from harness.backend import BACKENDS
from harness.pool import PATIENCE, Failure, Outcome

BUFFER_TIMEOUT = 40.0 * PATIENCE


class Context:
    """One rank's view of the run: who it is, its groups and buffers, and a line to the test."""

    def __init__(self, host: Server, rank: int) -> None:
        self.server, self.rank = host, rank
        self.size, self.mode = host.config["size"], host.config["mode"]
        self.members = list(range(self.size))
        self.scratch = Path(host.config["scratch"])
        self.backend = BACKENDS[host.config["backend"]](rank)
        self.job = -1
        self.num_groups: Counter = Counter()
        self.standing_buffers: dict = {}
        self.opened: list = []

    def member_of(self, members: Sequence[int]) -> Context:
        """This rank as the group of `members` numbers it."""
        member = copy.copy(self)
        member.members = list(members)
        member.rank, member.size = member.members.index(self.rank), len(member.members)
        return member

    def group(self, members: list[int] | None = None):
        """A new group of the ranks `members`, in that order; each of them makes this call."""
        import mscclpp_ep as ep

        members = tuple(range(self.size) if members is None else members)
        number = self.num_groups[members]
        self.num_groups[members] += 1
        index = members.index(self.rank)
        if self.mode == "thread":
            return self.server.local_groups((self.job, members, number), len(members))[index]
        name = f"group-{self.job}-{'.'.join(map(str, members))}-{number}"
        return ep.Group.from_file(str(self.scratch / name), index, len(members))

    def buffer(self, group=None, **options):
        """A new Buffer over `group`, or over all ranks; destroyed when the function returns."""
        self.opened.append(self._make_buffer(group, options))
        return self.opened[-1]

    def _make_buffer(self, group, options: dict):
        import mscclpp_ep as ep

        defaults = {"num_nvl_bytes": 1 << 20, "timeout": BUFFER_TIMEOUT, **self.backend.options()}
        if group is not None:
            return ep.Buffer(group, **{**defaults, **options})
        with self.group() as fresh:  # which a buffer needs no longer than it is being made
            return ep.Buffer(fresh, **{**defaults, **options})

    def standing(self, **options):
        """The Buffer with these options that all runs of this pool share, used and dirty."""
        key = repr(sorted(options.items()))
        if key not in self.standing_buffers:
            self.standing_buffers[key] = self._make_buffer(None, options)
        return self.standing_buffers[key]

    def report(self, value: Any = None) -> None:
        """Gives the test what its next `run.report(rank)` returns."""
        self.server.send("report", self.job, self.rank, value)

    def receive(self) -> Any:
        """What the test sent to this rank next."""
        return self.server.mail[self.rank].get()

    def run(self, job: int, function: Callable, args: tuple) -> Any:
        self.job = job
        self.num_groups.clear()
        self.opened.clear()
        value = function(self, *args)
        for buffer in self.opened:
            buffer.destroy()
        return value

    def close(self) -> None:
        for buffer in self.standing_buffers.values():
            buffer.destroy()


class Server:
    """Takes jobs from the pool and runs them on the ranks of this process."""

    def __init__(self, connection: Connection, config: dict) -> None:
        self.connection, self.config = connection, config
        self.sending = threading.Lock()
        self.jobs: dict[int, SimpleQueue] = {rank: SimpleQueue() for rank in config["ranks"]}
        self.mail: dict[int, SimpleQueue] = {rank: SimpleQueue() for rank in config["ranks"]}
        self.grouping = threading.Lock()

    def local_groups(self, key: tuple, size: int) -> list:
        with self.grouping:
            return _make_local_groups(key, size)

    def send(self, *message) -> None:
        with self.sending:
            self.connection.send(message)

    def listen(self) -> None:
        """Hands messages to ranks; ends the process at once if the pool is gone."""
        try:
            while self._sort(self.connection.recv()):
                pass
        except (EOFError, OSError):
            os._exit(1)

    def _sort(self, message: tuple) -> bool:
        kind, *rest = message
        if kind == "mail":
            rank, value = rest
            self.mail[rank].put(value)
            return True
        for queue in self.jobs.values():
            queue.put(rest)
        return kind != "exit"

    def serve(self, rank: int) -> None:
        context = Context(self, rank)
        while job := self.jobs[rank].get():
            self.send("done", job[0], rank, call(context, *job))
        context.close()

    def serve_all(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        first, *others = self.config["ranks"]
        threads = [threading.Thread(target=self.serve, args=[rank]) for rank in others]
        for thread in threads:
            thread.start()
        self.serve(first)
        for thread in threads:
            thread.join()


@functools.lru_cache(maxsize=16)
def _make_local_groups(_key: tuple, size: int) -> list:
    import mscclpp_ep as ep

    return list(ep.Group.local(size))


def call(context: Context, job: int, target: str, args: tuple) -> Outcome:
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        return Outcome(context.run(job, function, args))
    except BaseException as error:
        trace = traceback.format_exc()
        return Outcome(failure=Failure(type(error).__name__, str(error), trace))


def main() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    Server(Connection(int(sys.argv[1])), json.loads(sys.argv[2])).serve_all()


if __name__ == "__main__":
    main()
