# SPDX-License-Identifier: MIT
"""Routing recorded from running models, and measured with."""

import json

import numpy as np
import pytest

import mscclpp_ep as ep
from harness.cli import run
from harness.threads import on_ranks
from mscclpp_ep.bench.cases import Case
from mscclpp_ep.bench.routing import read_routing
from mscclpp_ep.bench.settings import Settings
from mscclpp_ep.cli import InputError
from mscclpp_ep.recording import FORMAT, note_choices

SMALL = ("--hidden=64", "--iters=3", "--refresh=1", "--flush=1", "--chain=4", "--peers=none")
EXPERTS = 6
# Two ranks, three steps, unlike numbers of tokens, choices that are none, and a token of no expert.
STEPS = [
    ([[0, 5], [-1, 3], [-1, -1]], [[2, 4]]),
    ([[1, 2]], [[3, 4], [0, 1], [5, -1], [0, 3]]),
    ([[4, 0], [5, 3]], np.empty((0, 2), np.int64)),
]


def arrays(**changes):
    named = {"format": FORMAT, "ranks": 2, "experts": EXPERTS}
    for number, step in enumerate(STEPS):
        for rank, ids in enumerate(step):
            named[f"rank{rank}/step{number}"] = np.array(ids)
    named |= changes
    return {name: value for name, value in named.items() if value is not None}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "routing.npz"
    np.savez(path, **arrays())
    return path


def serve(group):
    """A model of three layers, as each rank runs it."""
    with ep.Buffer(group) as buffer:
        for step in STEPS:
            topk_idx = np.array(step[group.rank], np.int64)
            x = np.ones((len(topk_idx), 8), np.float32)
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
            buffer.dispatch(
                x,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=topk_idx,
                topk_weights=np.ones(topk_idx.shape, np.float32),
            )


def expect_steps(routing):
    assert (routing.ranks, routing.experts, routing.topk) == (2, EXPERTS, 2)
    assert routing.most_tokens == 4
    assert len(routing.steps) == len(STEPS)
    for step, expected in zip(routing.steps, STEPS, strict=True):
        for ids, choices in zip(step, expected, strict=True):
            np.testing.assert_array_equal(ids, np.array(choices))


def test_dispatches_are_recorded(tmp_path):
    path = tmp_path / "model.npz"
    with ep.record_routing(path):
        on_ranks(2, serve)
    assert [each.name for each in tmp_path.iterdir()] == ["model.npz"]
    expect_steps(read_routing(path))
    # What follows the block is not recorded.
    before = path.read_bytes()
    on_ranks(2, serve)
    assert path.read_bytes() == before


def test_each_process_writes_its_rank_beside_the_file(tmp_path):
    path = tmp_path / "model.npz"
    for rank in range(2):
        with ep.record_routing(path):
            for step in STEPS:
                note_choices(rank, 2, EXPERTS, np.array(step[rank], np.int32))
    assert {each.name for each in tmp_path.iterdir()} == {"model.rank0.npz", "model.rank1.npz"}
    expect_steps(read_routing(path))


def test_recording_is_bounded_and_can_be_nested(tmp_path):
    with ep.record_routing(tmp_path / "all.npz"), ep.record_routing(tmp_path / "one.npz", 1):
        for step in STEPS:
            for rank in range(2):
                note_choices(rank, 2, EXPERTS, np.array(step[rank]))
    assert len(read_routing(tmp_path / "all.npz").steps) == 3
    assert len(read_routing(tmp_path / "one.npz").steps) == 1


def test_what_was_recorded_before_an_error_is_kept(tmp_path):
    path = tmp_path / "model.npz"
    with pytest.raises(RuntimeError, match="the model"), ep.record_routing(path):
        for rank in range(2):
            note_choices(rank, 2, EXPERTS, np.array(STEPS[0][rank]))
        raise RuntimeError("the model")
    assert len(read_routing(path).steps) == 1


def test_nothing_recorded_writes_nothing(tmp_path):
    with ep.record_routing(tmp_path / "model.npz"):
        pass
    assert not list(tmp_path.iterdir())


def test_layers_of_different_sizes_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="layers of different sizes"),
        ep.record_routing(tmp_path / "model.npz"),
    ):
        note_choices(0, 1, 4, np.array([[0]]))
        note_choices(0, 1, 8, np.array([[0]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "it is no recording"),
        ({"format": "other"}, "it is no recording"),
        ({"ranks": None}, "'ranks' must be a positive integer"),
        ({"experts": 0}, "'experts' must be a positive integer"),
        ({"experts": 5}, "ids from -1 to 5; they must be -1 or of one of 5 experts"),
        ({"rank0/step0": np.array([[-2, 0]])}, "ids from -2 to 0"),
        ({"rank0/step0": np.array([0, 1])}, r"it must be integers \[T, K\]"),
        ({"rank0/step0": np.array([[0.5, 1]])}, r"float64 \[1, 2\]; it must be integers"),
        ({"rank0/step0": np.array([[0]])}, "choices a token differ: 1, 2"),
        ({"rank1/step0": None}, "no choices of rank 1 of 2"),
        ({"rank2/step0": np.array([[0, 1]])}, "'rank2/step0' is not the choices of one of 2 ranks"),
        ({"weights": np.array([[0, 1]])}, "'weights' is not the choices"),
        ({"rank0/step0": np.array([[None, 1]], object)}, "is not an .npz file of NumPy"),
    ],
)
def test_bad_recordings_are_refused(file, changes, message):
    np.savez(file, **arrays(**changes))
    with pytest.raises(InputError, match=message):
        read_routing(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"text", b"\x93NUMPY\x01\x00"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "routing.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not an \.npz file of NumPy"):
        read_routing(path)


def test_a_single_array_and_a_folder_are_refused(tmp_path):
    path = tmp_path / "routing.npy"
    np.save(path, np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"is not an \.npz file of NumPy"):
        read_routing(path)
    with pytest.raises(InputError, match="Is a directory"):
        read_routing(tmp_path)


def test_a_step_that_some_rank_lacks_is_left_out(file):
    np.savez(file, **arrays(**{"rank1/step2": None}))
    assert len(read_routing(file).steps) == 2


def test_files_of_different_recordings_are_refused(tmp_path):
    for rank, experts in ((0, 4), (1, 8)):
        with ep.record_routing(tmp_path / "model.npz"):
            note_choices(rank, 2, experts, np.array([[0]]))
    with pytest.raises(InputError, match="not of one recording"):
        read_routing(tmp_path / "model.npz")


def test_sets_of_inputs_are_spread_over_the_steps(file):
    routing = read_routing(file)

    def replayed(count):
        numbers = {id(step): number for number, step in enumerate(routing.steps)}
        return [numbers[id(routing.at(number, count))] for number in range(count)]

    assert replayed(1) == [0]
    assert replayed(2) == [0, 1]
    assert replayed(3) == [0, 1, 2]
    assert replayed(7) == [0, 1, 2, 0, 1, 2, 0]


def test_who_gets_what_follows_from_the_recorded_choices(file):
    routing = read_routing(file)
    fields = {"mode": "ht", "ranks": 2, "tokens": 4, "sizes": (4,), "hidden": 8, "experts": 6}
    fields |= {"topk": 2, "iters": 3, "refresh": 1, "warmup": 1, "threads": 1, "flush": 0}
    settings = Settings(**fields, chain=0, seed=0, peers=(), routing=routing)
    case = Case(settings, 0, 4, 0)
    assert case.counts == (3, 1)
    # Three experts a rank. Rank 0 sends 0 to both and 1 to rank 1; rank 1 sends 0 to both.
    assert [case.received_by(rank) for rank in range(2)] == [2, 3]
    assert [case.received_from_others(rank) for rank in range(2)] == [1, 2]
    assert [case.choices_received_by(rank) for rank in range(2)] == [2, 3]
    assert case.expected_rows().shape == (2, 8)
    assert case.expected_sums().shape == (3, 8)
    assert not case.expected_sums()[2].any()


@pytest.mark.multirank
def test_recorded_choices_are_measured_with(tmp_path, file):
    figures_file = tmp_path / "figures.json"
    arguments = (*SMALL, "--mode=ht", f"--routing={file}", f"--json={figures_file}")
    done = run("bench", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"3 of the 3 steps of {file}" in done.stdout
    figures = json.loads(figures_file.read_text(encoding="utf-8"))
    config = figures["config"]["ht"]
    assert (config["ranks"], config["experts"], config["topk"]) == (2, EXPERTS, 2)
    assert (config["tokens"], config["sizes"]) == (4, [4])
    assert config["routing"] == {"file": str(file), "steps": 3}
    ranks_of = [
        [({e // 3 for e in token if e >= 0}, rank) for token in ids]
        for step in STEPS
        for rank, ids in enumerate(step)
    ]
    tokens = [token for tokens in ranks_of for token in tokens]
    logical = sum(len(to) for to, _ in tokens) / 3 / 2 * 128
    wire = sum(len(to - {rank}) for to, rank in tokens) / 3 / 2 * 128
    for row in figures["results"]:
        assert row["logical_bytes"] == pytest.approx(logical)
        assert row["wire_bytes"] == pytest.approx(wire)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks=3"], "--ranks is 3, but 2 in the file of --routing"),
        (["--topk=3"], "--topk is 3, but 2 in the file of --routing"),
        (["--experts=8"], "--experts is 8, but 6 in the file of --routing"),
        (["--mode=ll", "--ll-tokens=3"], "steps of 4 tokens, more than --ll-tokens, which is 3"),
    ],
)
def test_options_that_contradict_a_recording_are_refused(file, arguments, message):
    done = run("bench", *SMALL, f"--routing={file}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout
