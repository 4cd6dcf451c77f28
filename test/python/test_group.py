# SPDX-License-Identifier: MIT
"""Groups of threads, and what counts as a group."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mscclpp_ep import Error, Group, GroupLike, InvalidArgument, PeerFailure, Timeout, as_group

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
PATIENCE = 60


def on_threads(size: int, body: Callable[[int], T]) -> list[T]:
    """Return what the ranks return that run as threads."""
    with ThreadPoolExecutor(size) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(body, r) for r in range(size)]]


def outcome(call: Callable[[], object]) -> str:
    """Return the type and message of the error that a call raises."""
    try:
        call()
    except Error as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ------------------------------------------------------------------------------------------ threads


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.binary(max_size=40), min_size=3, max_size=3), max_size=4))
def test_threads_gather_what_all_gave(rounds: list[list[bytes]]) -> None:
    groups = Group.local(3)
    results = on_threads(3, lambda rank: [groups[rank].all_gather(row[rank]) for row in rounds])
    assert results == [rounds] * 3


def test_threads_stay_in_step() -> None:
    groups = Group.local(8)
    rounds = 200

    def body(rank: int) -> None:
        for number in range(rounds):
            parts = groups[rank].all_gather(b"%d %d" % (number, rank))
            assert parts == [b"%d %d" % (number, other) for other in range(8)]

    on_threads(8, body)


def test_barrier_waits_for_all() -> None:
    groups = Group.local(3)
    arrived: list[int] = []

    def body(rank: int) -> list[int]:
        for turn in range(3):
            if turn == rank:
                arrived.append(rank)
            groups[rank].barrier()
        return list(arrived)

    assert on_threads(3, body) == [[0, 1, 2]] * 3


def test_group_knows_its_rank() -> None:
    groups = Group.local(3)
    assert [(group.rank, group.size) for group in groups] == [(0, 3), (1, 3), (2, 3)]
    assert repr(groups[1]) == "<mscclpp_ep.Group rank=1 size=3>"


def test_absent_thread_is_named() -> None:
    groups = Group.local(3, timeout=0.2)
    said = on_threads(3, lambda rank: outcome(groups[rank].barrier) if rank != 1 else "")
    assert said[0] == said[2] == "Timeout: rank 1 did not come to gather 1 within 0.2 s"
    assert outcome(groups[1].barrier) == said[0]


def test_thread_that_closed_is_named() -> None:
    groups = Group.local(3, timeout=PATIENCE)

    def body(rank: int) -> str:
        groups[rank].barrier()
        return outcome(groups[rank].close if rank == 2 else groups[rank].barrier)

    assert on_threads(3, body)[:2] == ["PeerFailure: rank 2 closed its group"] * 2


def test_close_after_a_round_does_not_spoil_it() -> None:
    for _ in range(50):
        groups = Group.local(4, timeout=PATIENCE)

        def body(rank: int, groups: list[Group] = groups) -> list[bytes]:
            with groups[rank] as group:
                return group.all_gather(bytes([rank]))

        assert on_threads(4, body) == [[b"\0", b"\1", b"\2", b"\3"]] * 4


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True, None])
def test_number_of_threads_is_checked(n: int) -> None:
    with pytest.raises(InvalidArgument, match=r"^n is .*allowed is an integer of at least 1"):
        Group.local(n)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True, None])
def test_timeout_is_checked(timeout: float, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^timeout is .*; give a positive number"):
        Group.local(1, timeout=timeout)
    with pytest.raises(InvalidArgument, match=r"^timeout is "):
        Group.from_file(tmp_path / "x", 0, 1, timeout=timeout)


@pytest.mark.parametrize("data", [5, "text", None, [1]])
def test_data_is_checked(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^data is a .*bytes, bytearray and memoryview"):
        Group.local(1)[0].all_gather(data)


def test_closed_group_refuses() -> None:
    group = Group.local(1)[0]
    with group as entered:
        assert entered.all_gather(cast("bytes", memoryview(b"x"))) == [b"x"]
    group.close()
    with pytest.raises(InvalidArgument, match="closed"):
        group.barrier()


# -------------------------------------------------------------------------------------- group-likes


class Plain:
    """A user's own group."""

    rank = 1
    size = 2

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data, data]

    def barrier(self) -> None:
        pass


def test_anything_with_four_members_is_a_group() -> None:
    for group in (Plain(), Group.local(2)[1]):
        assert as_group(group) is group
        assert isinstance(group, GroupLike)


def test_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Either 'group' or 'comm' must be provided\.$"):
        as_group(None)


@pytest.mark.parametrize(
    "thing",
    [3, "group", object(), SimpleNamespace(rank=0, size=1, barrier=print), Plain],
)
def test_other_things_are_refused(thing: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        as_group(thing)
    assert str(caught.value).startswith("group is ")
    assert "torch.distributed.ProcessGroup" in str(caught.value)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0), ("0", 1), (0, None)])
def test_group_like_with_bad_numbers_is_refused(rank: object, size: object) -> None:
    thing = SimpleNamespace(rank=rank, size=size, all_gather=print, barrier=print)
    with pytest.raises(InvalidArgument, match=r"^group\.(rank|size) is "):
        as_group(thing)


def test_frameworks_are_not_imported() -> None:
    script = """
import sys
from mscclpp_ep import Group, InvalidArgument, as_group
for call in (Group.from_torch, lambda: as_group(3)):
    try:
        call()
    except InvalidArgument as error:
        print(error)
print([name for name in ("torch", "mpi4py", "jax", "cupy") if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    lines = run.stdout.splitlines()
    assert lines[0].startswith("from_torch needs torch, which this program has not imported")
    assert lines[-1] == "[]"


def test_errors_are_of_builtin_kinds_too() -> None:
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(Timeout, TimeoutError)
    assert issubclass(PeerFailure, Error)
