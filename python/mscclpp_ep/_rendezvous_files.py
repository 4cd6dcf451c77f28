# SPDX-License-Identifier: MIT
"""Ranks that find each other, and gather, through files.

Every file appears complete, by a rename. To meet:

1. each rank writes a hello with a fresh nonce;
2. rank 0 publishes a roster with a fresh id and the nonces it read; whenever a nonce changes, for
   the earlier one was left by another run, it publishes another;
3. a rank acknowledges, by its id, a roster that holds its own nonce, and no other;
4. rank 0 marks the roster as final when all have acknowledged it.

All later files carry the roster's id.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mscclpp_ep._core import Error, InvalidArgument, PeerFailure, SystemError, Timeout
from mscclpp_ep._rendezvous_wire import Deadline, name_ranks, same_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_live: set[str] = set()
"""Roster ids of the groups of this process, whose files are not stale."""


class _Folder:
    """The files of one rendezvous: those whose names start with the caller's path."""

    def __init__(self, path: Path, nonce: str) -> None:
        base = path / "group" if path.is_dir() else path
        if not base.parent.is_dir():
            msg = f"path is {str(path)!r}, whose folder does not exist; create it first"
            raise InvalidArgument(msg)
        self._parent = base.parent
        self._prefix = f"{base.name}.mscclpp_ep-"
        self._temporary = self._parent / f"{self._prefix}tmp-{nonce}"

    @contextmanager
    def _access(self, name: str) -> Iterator[Path]:
        """Yield the path of a file; what the file system refuses becomes SystemError."""
        target = self._parent / (self._prefix + name)
        try:
            yield target
        except OSError as error:
            msg = (
                f"no access to {str(target)!r}: {error.strerror}; "
                "give a path that all ranks can read and write"
            )
            raise SystemError(msg) from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file that others see complete or not at all.

        Raises:
            SystemError: The file system refused.
        """
        with self._access(name) as target:
            self._temporary.write_bytes(data)
            self._temporary.replace(target)

    def read(self, name: str) -> bytes | None:
        """Return what a file holds, or None if it is not there.

        Raises:
            SystemError: The file system refused.
        """
        with self._access(name) as target:
            try:
                return target.read_bytes()
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ESTALE}:
                    raise
        return None

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a file, empty if there is none."""
        try:
            found = json.loads(self.read(name) or b"{}")
        except (RecursionError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write an object; errors as `write`."""
        self.write(name, json.dumps(content).encode())

    def names(self) -> list[str]:
        """Return the names of all files, without the prefix; errors as `write`."""
        with self._access(""):
            found = [entry.name for entry in self._parent.iterdir()]
        return [name[len(self._prefix) :] for name in found if name.startswith(self._prefix)]

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that may have gone already; errors as `write`."""
        for name in names:
            with self._access(name) as target:
                target.unlink(missing_ok=True)


def _pauses(deadline: Deadline) -> Iterator[None]:
    """Yield until the deadline, with pauses that grow from 1 ms to 50 ms."""
    pause = 0.001
    while not deadline.expired():
        yield
        time.sleep(min(pause, deadline.left()))
        pause = min(1.5 * pause, 0.05)
    yield


class FileChannel:
    """One rank's side of a group that meets at a path."""

    def __init__(self, path: Path, rank: int, size: int, timeout: float) -> None:
        """Meet the others.

        Raises:
            InvalidArgument: The path's folder does not exist, or another process took this rank.
            SystemError: The file system refused.
            Timeout: Ranks are missing; the message names them.
        """
        self._nonce = secrets.token_hex(16)
        self._folder = _Folder(path, self._nonce)
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._nonces: list[object] = []
        self._id = self._nonce
        self._sequence = 0
        self._error: Error | None = None
        self._closed = False
        try:
            self._meet(Deadline(timeout))
        except BaseException:
            self._abandon()
            raise

    def _meet(self, deadline: Deadline) -> None:
        self._folder.write_json(f"hello-{self._rank}", {"nonce": self._nonce, "size": self._size})
        self._id = self._lead(deadline) if self._rank == 0 else self._follow(deadline)
        _live.add(self._id)
        self._folder.remove([f"hello-{self._rank}", f"ack-{self._rank}"])
        if self._rank == 0:
            self._folder.remove(name for name in self._folder.names() if self._is_stale(name))
        self._gather(b"", deadline)
        if self._rank == 0:
            self._folder.remove(["roster"])

    def _abandon(self) -> None:
        """Remove what this rank wrote, unless another process took the rank."""
        self._closed = True
        _live.discard(self._id)
        with suppress(SystemError):
            if self._owns_rank():
                self._folder.remove([f"hello-{self._rank}", f"ack-{self._rank}"])
                self._folder.remove(["roster"] if self._rank == 0 else [])
            self._folder.remove([f"{self._id}-0-{self._rank}"])

    def _owns_rank(self) -> bool:
        return bool(self._folder.read_json(f"hello-{self._rank}").get("nonce") == self._nonce)

    def _check_rank(self) -> None:
        if not self._owns_rank():
            msg = (
                f"rank {self._rank} was taken by another process that came later; give each its own"
            )
            raise InvalidArgument(msg)

    def _lead(self, deadline: Deadline) -> str:
        """Rank 0: return the id of the roster that all acknowledged."""
        roster: dict[str, Any] = {}
        missing: list[int] = []
        for _ in _pauses(deadline):
            self._check_rank()
            hellos = [self._folder.read_json(f"hello-{rank}") for rank in range(self._size)]
            missing = [r for r, hello in enumerate(hellos) if hello.get("size") != self._size]
            if missing:
                continue
            nonces = [hello.get("nonce") for hello in hellos]
            published = self._folder.read_json("roster").get("id") == roster.get("id")
            if nonces != roster.get("nonces") or not published:
                roster = {"id": secrets.token_hex(16), "nonces": nonces, "final": False}
                self._folder.write_json("roster", roster)
            missing = [r for r in range(1, self._size) if self._ack(r) != roster["id"]]
            if not missing:
                self._folder.write_json("roster", {**roster, "final": True})
                self._nonces = nonces
                return str(roster["id"])
        raise self._missed(missing, "the rendezvous", deadline)

    def _ack(self, rank: int) -> object:
        return self._folder.read_json(f"ack-{rank}").get("id")

    def _follow(self, deadline: Deadline) -> str:
        """Return the id of the final roster that holds the nonce of this rank."""
        acknowledged = None
        for _ in _pauses(deadline):
            self._check_rank()
            roster = self._folder.read_json("roster")
            if not self._is_ours(roster):
                continue
            if roster.get("final"):
                return str(roster["id"])
            if roster["id"] != acknowledged:
                acknowledged = roster["id"]
                self._folder.write_json(f"ack-{self._rank}", {"id": acknowledged})
        here = {int(name[6:]) for name in self._folder.names() if re.fullmatch(r"hello-\d+", name)}
        missing = set(range(self._size)) - here
        raise self._missed(missing or {0}, "the rendezvous", deadline)

    def _is_ours(self, roster: dict[str, Any]) -> bool:
        """Tell whether a roster holds this rank's nonce, and an id, of which names are made."""
        nonces, found = roster.get("nonces"), roster.get("id")
        return (
            isinstance(nonces, list)
            and len(nonces) == self._size
            and nonces[self._rank] == self._nonce
            and isinstance(found, str)
            and re.fullmatch("[0-9a-f]{32}", found) is not None
        )

    def _missed(self, missing: Iterable[int], what: str, deadline: Deadline) -> Timeout:
        return Timeout(f"{name_ranks(missing)} did not come to {what} in {deadline.seconds:g} s")

    def _is_stale(self, name: str) -> bool:
        """Tell, once all ranks are known, whether an earlier run left this file."""
        if tagged := re.match(r"([0-9a-f]{32})-", name):
            return tagged[1] not in _live
        if name.startswith("tmp-"):
            return name[4:] not in self._nonces
        numbered = re.fullmatch(r"(?:hello|ack)-(\d+)", name)
        return bool(numbered and int(numbered[1]) >= self._size)

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in the order of ranks.

        Raises:
            PeerFailure: A rank closed its group.
            SystemError: The file system refused.
            Timeout: Ranks are missing; the message names them.
        """
        if self._error is not None:
            raise same_error(self._error)
        try:
            return self._gather(data, Deadline(self._timeout))
        except Error as error:
            self._error = same_error(error)
            raise
        except BaseException:
            self._error = PeerFailure(f"rank {self._rank} was interrupted in an earlier gather")
            raise

    def _gather(self, data: bytes, deadline: Deadline) -> list[bytes]:
        number, self._sequence = self._sequence, self._sequence + 1
        self._folder.write(f"{self._id}-{number}-{self._rank}", data)
        parts = {self._rank: data}
        for _ in _pauses(deadline):
            self._take(parts, number)
            if len(parts) == self._size:
                # All have come here, so nobody reads the files of the gather before.
                self._folder.remove([f"{self._id}-{number - 1}-{self._rank}"])
                return [parts[rank] for rank in range(self._size)]
        missing = set(range(self._size)) - parts.keys()
        raise self._missed(missing, f"gather {number}", deadline)

    def _take(self, parts: dict[int, bytes], number: int) -> None:
        """Read the parts that have come; a rank that closed its group will send none."""
        for rank in set(range(self._size)) - parts.keys():
            closed = self._folder.read(f"{self._id}-bye-{rank}") is not None
            part = self._folder.read(f"{self._id}-{number}-{rank}")
            if part is not None:
                parts[rank] = part
            elif closed:
                msg = f"rank {rank} closed its group"
                raise PeerFailure(msg)

    def close(self) -> None:
        """Leave; the last rank to leave removes what is left of the group."""
        if self._closed:
            return
        self._closed = True
        _live.discard(self._id)
        with suppress(SystemError):  # The folder may have gone, and the files with it.
            self._folder.write(f"{self._id}-bye-{self._rank}", b"")
            names = self._folder.names()
            if all(f"{self._id}-bye-{rank}" in names for rank in range(self._size)):
                self._folder.remove(name for name in names if name.startswith(self._id))
