"""Traces of operations: files that a viewer of Chrome traces can read."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import mscclpp_ep as ep
from harness.programs import traced
from harness.threads import on_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from harness.pool import Pool


def read(path: Path) -> tuple[dict[tuple[int, int], str], dict[str, list[dict[str, Any]]]]:
    """The names of the tracks, and the events by name of track, in the order of the file."""
    entries = json.loads(path.read_text().rstrip().removesuffix(",") + "]")
    names = {
        (entry["pid"], entry["tid"]): entry["args"]["name"]
        for entry in entries
        if entry["ph"] == "M" and entry["name"] == "thread_name"
    }
    events = defaultdict(list)
    for entry in entries:
        if entry["ph"] == "X":
            events[names[entry["pid"], entry["tid"]]].append(entry)
    return names, events


def ends(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


def nested(events: list[dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    """Each operation of a track, its epoch and its phases; checks that they nest."""
    operations: list[tuple[str, int, list[str]]] = []
    open_events: list[dict[str, Any]] = []
    for event in events:
        while open_events and event["ts"] >= ends(open_events[-1]):
            open_events.pop()
        if open_events:
            assert ends(event) <= ends(open_events[-1]) + 1e-3
            assert event["args"] == open_events[0]["args"]
            operations[-1][2].append(event["name"])
        else:
            operations.append((event["name"], event["args"]["epoch"], []))
        open_events.append(event)
    return operations


def check(path: Path, ranks: int, rounds: int, processes: int) -> None:
    names, events = read(path)
    assert sorted(names.values()) == [f"rank {rank} of {ranks}" for rank in range(ranks)]
    assert len({pid for pid, _ in names}) == processes
    for track in events.values():
        assert all(event["dur"] >= 0 for event in track)
        operations = nested(track)
        kinds = [(name, epoch) for name, epoch, _ in operations]
        expected = [("dispatch", "combine")[i % 2] for i in range(2 * rounds)]
        assert kinds == [(name, 1 + i) for i, name in enumerate(expected)]
        for name, _, phases in operations:
            if name == "dispatch":
                assert phases == ["entry", "publish", "send rows", "await rows"]
            else:
                assert phases[0] == "entry"
                assert phases[-1] == "await readers"
                assert "reduce" in phases
                assert ("stage rows" in phases) == (ranks > 1)
    # The clocks of ranks agree: no combine ends before all have begun it.
    combines = [[e for e in track if e["name"] == "combine"] for track in events.values()]
    for same in zip(*combines, strict=True):
        assert max(event["ts"] for event in same) <= min(map(ends, same))


@pytest.mark.ranks(1, 3)
def test_every_rank_has_a_track(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    ranks.check(traced.twice, str(path))
    check(path, ranks.size, rounds=2, processes=1 if ranks.mode == "thread" else ranks.size)


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSCCLPP_EP_TRACE", str(tmp_path / "trace.json"))

    def body(group: ep.Group) -> None:
        with ep.Buffer(group, timeout=30) as buffer:
            traced.exchange(buffer)
        with ep.Buffer(group, timeout=30, trace=tmp_path / "other.json") as buffer:
            traced.exchange(buffer)

    on_ranks(2, body)
    check(tmp_path / "trace.json", 2, rounds=1, processes=1)
    check(tmp_path / "other.json", 2, rounds=1, processes=1)


def test_rows_that_land_are_copied_out_within_other_phases(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def body(group: ep.Group) -> None:
        with ep.Buffer(group, timeout=30, trace=path, max_arena_bytes=1 << 23) as buffer:
            held = [buffer.empty((1 << 20,), np.uint8) for _ in range(7)]
            traced.exchange(buffer, hidden=4096, tokens=200)
            assert buffer.stats().landed_rows > 0
            del held

    on_ranks(2, body)
    _, events = read(path)
    for track in events.values():
        phases = nested(track)[0][2]
        assert "copy out" in phases
        assert phases.index("copy out") > phases.index("send rows")


def test_many_experts_have_a_round_of_counts(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def body(group: ep.Group) -> None:
        with ep.Buffer(group, timeout=30, trace=path) as buffer:
            topk_idx = np.zeros((3, 1), np.int64)
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 50_000)
            buffer.dispatch(
                np.ones((3, 4), np.float32),
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )

    on_ranks(2, body)
    for track in read(path)[1].values():
        assert nested(track)[0][2][:3] == ["entry", "counts", "publish"]


def test_refused_operations_are_in_the_trace_and_the_next_follow(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def body(group: ep.Group) -> None:
        with ep.Buffer(group, timeout=30, trace=path) as buffer:
            with pytest.raises(ep.Error):
                buffer.combine(None, None)
            traced.exchange(buffer)

    on_ranks(2, body)
    for track in read(path)[1].values():
        assert [name for name, *_ in nested(track)] == ["combine", "dispatch", "combine"]


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ("{tmp}/no/trace.json", "no/trace.json, which cannot be opened: No such file"),
        ("{tmp}", "cannot be opened: Is a directory"),
        ("{tmp}/other", "exists and is no trace"),
        ("", "trace is ''; it must be the path of a file"),
        (7, "trace is 7; it must be the path of a file"),
        ("a\ud800", "it must be the path of a file, in UTF-8"),
        ("a\0b", "trace has a zero byte"),
    ],
)
def test_a_trace_that_cannot_be_is_an_error_on_every_rank(
    tmp_path: Path, trace: Any, message: str
) -> None:
    (tmp_path / "other").write_text("something else")
    named = trace.replace("{tmp}", str(tmp_path)) if isinstance(trace, str) else trace

    def body(group: ep.Group) -> None:
        refused = group.rank == 1
        expected = ep.InvalidArgument if refused else ep.PeerFailure
        with pytest.raises(expected) as caught:
            ep.Buffer(group, timeout=30, trace=named if refused else None)
        assert message in str(caught.value)
        assert refused or str(caught.value).startswith("rank 1 refused its arguments")

    on_ranks(2, body)
    assert (tmp_path / "other").read_text() == "something else"
