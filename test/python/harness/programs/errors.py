# SPDX-License-Identifier: MIT
"""Bad input: what is refused, what the message says, and what the other ranks hear of it."""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import mscclpp_ep as ep
from harness import steps
from harness.backend import Cpu
from harness.cases import Case, Scales, World, world_of

CASE = Case(tokens=(9, 14, 6), hidden=64, experts=8, topk=3, scales=None, bias=1)
WITHOUT_TOPK = CASE.but(with_topk=False)
SCALED = CASE.but(dtype="uint8", scales=Scales("float32", 4))


@dataclass(frozen=True)
class Bad:
    """One mistake: `spoil` changes the arguments of a call; the message must match `says`."""

    name: str
    call: str
    spoil: Callable[[dict], dict]
    says: tuple[str, ...]
    case: Case = CASE


def replaced(**changes) -> Callable[[dict], dict]:
    """Arguments changed by functions of what they were."""
    return lambda given: given | {name: new(given.get(name)) for name, new in changes.items()}


def without(*names: str) -> Callable[[dict], dict]:
    return lambda given: {name: value for name, value in given.items() if name not in names}


def sparse(array: np.ndarray) -> np.ndarray:
    """The same values with gaps between them."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def longer(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array[:1]])


def wider(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array[:, :1]], axis=1)


def with_entry(at: tuple, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[at] = value
        return array

    return change


def as_type(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.astype(dtype)


def always(value) -> Callable:
    return lambda _: value


def scales_are(change: Callable) -> Callable[[dict], dict]:
    return lambda given: given | {"x": (given["x"][0], change(given["x"][1]))}


def off_by_one(counts: np.ndarray) -> np.ndarray:
    return counts + np.int32(1)


class Elsewhere:
    """A tensor whose DLPack capsule says that it is on a GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def __array_namespace__(self):
        return np

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_options):
        capsule = self.array.view(np.int16).__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # A DLTensor begins with the pointer to its data, and then the type of its device.
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2
        return capsule


def dispatch_mistakes() -> list[Bad]:
    contiguous, two = r"contiguous", r"\[.*,.*\]"
    table = {
        "x-one-dimension": (replaced(x=np.ravel), r"\bx\b", "bfloat16", two),
        "x-three-dimensions": (replaced(x=lambda x: x[None]), r"\bx\b", r"\[1, ", two),
        "x-with-gaps": (replaced(x=sparse), r"\bx\b", contiguous),
        "x-no-tensor": (replaced(x=always("rows")), r"\bx\b", "str|rows"),
        "x-missing": (replaced(x=always(None)), r"\bx\b", "None|missing|none"),
        "x-complex": (
            replaced(x=lambda x: np.zeros(x.shape, "complex64")),
            r"\bx\b",
            "complex|code 5",
        ),
        "x-three-parts": (replaced(x=lambda x: (x, x, x)), r"\bx\b", "3|three|tuple"),
        "x-elsewhere": (replaced(x=Elsewhere), r"\bx\b", "cuda", "cpu"),
        "x-no-columns": (replaced(x=lambda x: x[:, :0]), r"\bx\b", r", 0\]"),
        "idx-float": (replaced(topk_idx=as_type("float32")), "topk_idx", "float32", "int32.*int64"),
        "idx-int16": (replaced(topk_idx=as_type("int16")), "topk_idx", "int16", "int32.*int64"),
        "idx-longer": (replaced(topk_idx=longer), "topk_idx", two),
        "idx-one-dimension": (replaced(topk_idx=np.ravel), "topk_idx", two),
        "idx-with-gaps": (replaced(topk_idx=sparse), "topk_idx", contiguous),
        "idx-too-large": (
            *(replaced(topk_idx=with_entry((3, 1), 8)), "topk_idx", r"3, 1", r"\b8\b", r"\b7\b"),
        ),
        "idx-below-minus-one": (
            *(replaced(topk_idx=with_entry((2, 0), -2)), "topk_idx", r"2, 0", "-2", "-1"),
        ),
        "idx-without-weights": (without("topk_weights"), "topk_weights", "topk_idx"),
        "weights-without-idx": (without("topk_idx"), "topk_idx", "topk_weights"),
        "weights-double": (
            *(replaced(topk_weights=as_type("float64")), "topk_weights", "float64", "float32"),
        ),
        "weights-wider": (replaced(topk_weights=wider), "topk_weights", r", 4\]", "3"),
        "weights-with-gaps": (replaced(topk_weights=sparse), "topk_weights", contiguous),
        "in-rank-missing": (without("is_token_in_rank"), "is_token_in_rank"),
        "in-rank-int": (
            *(replaced(is_token_in_rank=as_type("int32")), "is_token_in_rank", "int32", "bool"),
        ),
        "in-rank-wider": (replaced(is_token_in_rank=wider), "is_token_in_rank", two),
        "in-rank-longer": (replaced(is_token_in_rank=longer), "is_token_in_rank", two),
        "in-rank-with-gaps": (replaced(is_token_in_rank=sparse), "is_token_in_rank", contiguous),
        "per-rank-missing": (without("num_tokens_per_rank"), "num_tokens_per_rank"),
        "per-rank-long": (
            *(replaced(num_tokens_per_rank=as_type("int64")), "num_tokens_per_rank", "int64"),
            "int32",
        ),
        "per-rank-longer": (replaced(num_tokens_per_rank=longer), "num_tokens_per_rank"),
        "per-rank-disagrees": (
            *(replaced(num_tokens_per_rank=off_by_one), "num_tokens_per_rank", "is_token_in_rank"),
        ),
        "per-rank-beyond-tokens": (
            replaced(num_tokens_per_rank=lambda counts: counts + np.int32(1000)),
            "num_tokens_per_rank",
            "is_token_in_rank",
        ),
        "per-expert-missing": (without("num_tokens_per_expert"), "num_tokens_per_expert"),
        "per-expert-long": (
            *(replaced(num_tokens_per_expert=as_type("int64")), "num_tokens_per_expert", "int64"),
            "int32",
        ),
        "per-expert-disagrees": (
            *(replaced(num_tokens_per_expert=off_by_one), "num_tokens_per_expert", "topk_idx"),
        ),
        "per-expert-negative": (
            *(replaced(num_tokens_per_expert=with_entry((5,), -3)), "num_tokens_per_expert", "-3"),
        ),
        "alignment-zero": (replaced(expert_alignment=always(0)), "expert_alignment", r"\b0\b"),
        "worst-negative": (replaced(num_worst_tokens=always(-4)), "num_worst_tokens", "-4"),
        "stream": (replaced(stream=always(7)), "stream"),
        "no-stream": (replaced(stream=always("main")), "stream", "main"),
    }
    mistakes = [Bad(name, "dispatch", spoil, says) for name, (spoil, *says) in table.items()]
    scaled = {
        "scales-longer": (scales_are(longer), "scale", two),
        "scales-one-dimension": (scales_are(np.ravel), "scale", two),
        "scales-double": (scales_are(as_type("float64")), "scale", "float64"),
        "scales-no-tensor": (scales_are(always("few")), "scale"),
    }
    mistakes += [Bad(n, "dispatch", spoil, says, SCALED) for n, (spoil, *says) in scaled.items()]
    spoil, *says = table["per-expert-negative"]
    mistakes += [Bad("per-expert-negative-without-topk", "dispatch", spoil, says, WITHOUT_TOPK)]
    return mistakes


def cached_mistakes() -> list[Bad]:
    idx = always(np.zeros((9, 3), np.int64))
    table = {
        "cached-with-idx": (replaced(topk_idx=idx), "topk_idx", "handle"),
        "cached-longer": (replaced(x=longer), r"\bx\b", "handle"),
        "cached-wider": (replaced(x=wider), r"\bx\b", "65", "64"),
        "cached-no-handle": (replaced(handle=always("junk")), "handle"),
        "cached-plain-tuple": (replaced(handle=lambda handle: tuple(handle)[:5]), "handle"),
    }
    return [Bad(name, "cached", spoil, says) for name, (spoil, *says) in table.items()]


def combine_mistakes() -> list[Bad]:
    two = r"\[.*,.*\]"
    table = {
        "combine-x-longer": (replaced(x=longer), r"\bx\b", two),
        "combine-x-wider": (replaced(x=wider), r"\bx\b", "65", "64"),
        "combine-x-one-dimension": (replaced(x=np.ravel), r"\bx\b", two),
        "combine-x-with-gaps": (replaced(x=sparse), r"\bx\b", "contiguous"),
        "combine-x-bytes": (replaced(x=lambda x: x.view(np.uint8)), r"\bx\b", "uint8", "bfloat16"),
        "combine-x-double": (replaced(x=as_type("float64")), r"\bx\b", "float64", "float32"),
        "combine-x-no-tensor": (replaced(x=always(3)), r"\bx\b"),
        "combine-weights-longer": (replaced(topk_weights=longer), "topk_weights", two),
        "combine-weights-wider": (replaced(topk_weights=wider), "topk_weights", "4", "3"),
        "combine-weights-double": (
            *(replaced(topk_weights=as_type("float64")), "topk_weights", "float64", "float32"),
        ),
        "bias-longer": (replaced(bias=longer), "bias", two),
        "bias-wider": (replaced(bias=wider), "bias", "65", "64"),
        "bias-float32": (replaced(bias=as_type("float32")), "bias", "float32", "bfloat16"),
        "bias-three": (replaced(bias=lambda bias: (bias, bias, bias)), "bias", "3|three|2|two"),
        "bias-no-tensor": (replaced(bias=always("much")), "bias"),
        "combine-no-handle": (replaced(handle=always(None)), "handle"),
        "combine-plain-tuple": (replaced(handle=lambda handle: tuple(handle)[1:]), "handle"),
    }
    return [Bad(name, "combine", spoil, says) for name, (spoil, *says) in table.items()]


def layout_mistakes() -> list[Bad]:
    two = r"\[.*,.*\]"
    table = {
        "layout-float": (replaced(topk_idx=as_type("float32")), "topk_idx", "float32", "int64"),
        "layout-one-dimension": (replaced(topk_idx=np.ravel), "topk_idx", two),
        "layout-with-gaps": (replaced(topk_idx=sparse), "topk_idx", "contiguous"),
        "layout-no-tensor": (replaced(topk_idx=always("ids")), "topk_idx"),
        "layout-too-large": (
            *(replaced(topk_idx=with_entry((1, 2), 800)), "topk_idx", "1, 2", "800", r"\b7\b"),
        ),
        "layout-below": (replaced(topk_idx=with_entry((0, 1), -9)), "topk_idx", "0, 1", "-9"),
        "layout-no-experts": (replaced(num_experts=always(0)), "num_experts", r"\b0\b"),
    }
    return [Bad(name, "layout", spoil, says) for name, (spoil, *says) in table.items()]


MISTAKES = {
    bad.name: bad
    for bad in dispatch_mistakes() + cached_mistakes() + combine_mistakes() + layout_mistakes()
}


# On a GPU a number is a stream, and nobody waits for a layout: see `noticed_later`.
CPU_MISTAKES = ["stream", "layout-too-large", "layout-below"]


def placed(context, value):
    """What a test gives to a call, with its arrays as tensors of the backend."""
    if isinstance(value, tuple) and not isinstance(value, ep.DispatchHandle):
        return tuple(placed(context, part) for part in value)
    if isinstance(value, Elsewhere) and context.backend.name != "cpu":
        return value.array  # which is on the CPU
    return context.backend.array(value) if isinstance(value, np.ndarray) else value


def call_of(context, buffer, world: World, call: str) -> tuple[Callable, dict]:
    """A method and its arguments, all sound, with arrays of NumPy. Collective if it needs a handle.

    The method places what it is given.
    """
    rank = context.rank
    plain = copy.copy(context)
    plain.backend = Cpu(rank)

    def placing(method: Callable) -> Callable:
        return lambda **given: method(**{n: placed(context, v) for n, v in given.items()})

    if call == "layout":
        arguments = {"topk_idx": world.sent[rank].topk_idx, "num_experts": world.case.experts}
        return placing(buffer.get_dispatch_layout), arguments
    if call == "dispatch":
        return placing(buffer.dispatch), steps.dispatch_arguments(plain, world)
    handle = steps.dispatch(context, buffer, world).handle
    if call == "cached":
        return placing(buffer.dispatch), {"x": world.payloads(1)[rank][0], "handle": handle}
    arguments = {"x": world.outputs()[rank], "handle": handle, "bias": world.biases(rank)[0]}
    return placing(buffer.combine), arguments | {"topk_weights": world.output_weights()[rank]}


def expect_refusal(method: Callable, arguments: dict, says: tuple[str, ...]) -> None:
    error = steps.raised(ep.InvalidArgument, method, **arguments)
    assert isinstance(error, ValueError)
    for pattern in says:
        assert re.search(pattern, str(error)), f"{pattern!r} is not in: {error}"


def expect_peer_failure(rank: int, method: Callable, arguments: dict) -> None:
    message = str(steps.raised(ep.PeerFailure, method, **arguments))
    assert steps.names_rank(message, rank), message


def refused(context, name: str, seed: int) -> None:
    """The last rank makes a mistake; it is told which, the others whose, and all go on."""
    mistake, culprit = MISTAKES[name], context.size - 1
    buffer = context.standing()
    world = world_of(mistake.case, seed, context.size)
    method, arguments = call_of(context, buffer, world, mistake.call)
    if context.rank == culprit:
        expect_refusal(method, mistake.spoil(arguments), mistake.says)
    elif mistake.call != "layout":
        expect_peer_failure(culprit, method, arguments)
    steps.round_trip(context, buffer, mistake.case, seed + 1)


# Of the ranks in turn: such as are noticed at once, and such as only a GPU finds out.
MISTAKES_OF_ALL = {
    "mixed": ["x-with-gaps", "idx-too-large", "weights-wider"],
    "in contents": ["per-rank-disagrees", "idx-below-minus-one", "per-expert-disagrees"],
}


def refused_by_all(context, names: str, seed: int) -> None:
    """Every rank makes a mistake of its own, and is told its own."""
    buffer, mistakes = context.standing(), MISTAKES_OF_ALL[names]
    mistake = MISTAKES[mistakes[context.rank % len(mistakes)]]
    world = world_of(mistake.case, seed, context.size)
    method, arguments = call_of(context, buffer, world, mistake.call)
    expect_refusal(method, mistake.spoil(arguments), mistake.says)
    steps.round_trip(context, buffer, mistake.case, seed + 1)


def refused_over_and_over(context, seed: int) -> None:
    """Ranks take turns at making mistakes."""
    left_out = [] if context.backend.name == "cpu" else CPU_MISTAKES
    buffer, names = context.standing(), sorted(MISTAKES.keys() - left_out)
    rng = np.random.default_rng(seed)
    for turn in range(30):
        mistake, culprit = MISTAKES[str(rng.choice(names))], turn % context.size
        world = world_of(mistake.case, seed, context.size)
        method, arguments = call_of(context, buffer, world, mistake.call)
        if context.rank == culprit:
            expect_refusal(method, mistake.spoil(arguments), mistake.says)
        elif mistake.call != "layout":
            expect_peer_failure(culprit, method, arguments)
    steps.round_trip(context, buffer, CASE, seed)


def noticed_later(context, seed: int) -> None:
    """On a GPU, ids out of range are no choices, where no call waits, and the next check tells."""
    buffer, rank = context.standing(), context.rank
    world = world_of(CASE, seed, context.size)
    steps.forget_drops(buffer)
    idx = world.sent[rank].topk_idx.copy()
    idx[0, 0] = CASE.experts
    _, _, per_expert, _, _ = buffer.get_dispatch_layout(context.backend.array(idx), CASE.experts)
    assert int(context.backend.host(per_expert).sum()) == int((idx >= 0).sum()) - 1
    message = str(steps.raised(ep.InvalidArgument, buffer.check))
    assert f"{CASE.experts}" in message
    buffer.check()

    # Far beyond any array that the id is an index of.
    idx[0, 0] = 2**40
    arguments = steps.dispatch_arguments(context, world)
    arguments["topk_idx"] = context.backend.array(idx)
    arguments["num_worst_tokens"] = world.capacity
    result = steps.unpack(buffer.dispatch(**arguments))
    assert (context.backend.host(result.topk_idx) < CASE.experts).all()
    steps.raised(ep.InvalidArgument, buffer.check)

    for counts, change in (("num_tokens_per_rank", 1), ("num_tokens_per_expert", -1000)):
        arguments = steps.dispatch_arguments(context, world)
        arguments["num_worst_tokens"] = world.capacity
        arguments[counts] += change
        buffer.dispatch(**arguments)
        assert counts in str(steps.raised(ep.InvalidArgument, buffer.check))
    steps.round_trip(context, buffer, CASE, seed)


def foreign_handle(context, destroyed: bool, call: str, seed: int) -> None:
    """Handles of another buffer, one that lives or one that does not, are refused."""
    world = world_of(CASE, seed, context.size)
    stranger, buffer = context.buffer(), context.standing()
    method, arguments = call_of(context, buffer, world, call)
    _, foreign = call_of(context, stranger, world, call)
    if destroyed:
        stranger.destroy()
    arguments["handle"] = foreign["handle"]
    expect_refusal(method, arguments, ("handle", "buffer"))
    steps.round_trip(context, buffer, CASE, seed)


DISAGREEMENTS = {
    "hidden": CASE.but(hidden=72),
    "dtype": CASE.but(dtype="float32"),
    "experts": CASE.but(experts=12),
    "topk": CASE.but(topk=5),
    "index": CASE.but(index="int32"),
    "topk-missing": CASE.but(with_topk=False),
    "scales": CASE.but(scales=Scales("float32", 3)),
    "cached": CASE,
    "combine": CASE,
}


def disagree(context, what: str, seed: int) -> None:
    """Rank 1 calls another operation than the others, or means other sizes: an error everywhere."""
    buffer, odd = context.standing(), 1
    world = world_of(CASE, seed, context.size)
    other = world_of(DISAGREEMENTS[what], seed, context.size)
    call = what if what in ("cached", "combine") else "dispatch"
    theirs, given = call_of(context, buffer, world, "dispatch")
    method, arguments = call_of(context, buffer, other, call)
    if context.rank != odd:
        method, arguments = theirs, given
    message = str(steps.raised(ep.Error, method, **arguments))
    named = [rank for rank in range(context.size) if steps.names_rank(message, rank)]
    assert named if context.rank == odd or context.size == 2 else odd in named, message
    steps.round_trip(context, buffer, CASE, seed)


def combines_differ(context, what: str, seed: int) -> None:
    """As `disagree`, for what ranks give to combine."""
    buffer, odd = context.standing(), 1
    world = world_of(CASE, seed, context.size)
    other = world_of(CASE.but(combine_dtype="float32"), seed, context.size)
    first = steps.dispatch(context, buffer, world).handle
    second = steps.dispatch(context, buffer, world).handle
    mine = other if what == "dtype" and context.rank == odd else world
    handle = second if what == "handle" and context.rank == odd else first
    array = context.backend.array
    arguments = {"x": array(mine.outputs()[context.rank]), "handle": handle}
    if what == "weights" and context.rank == odd:
        arguments["topk_weights"] = array(world.output_weights()[context.rank])
    message = str(steps.raised(ep.Error, buffer.combine, **arguments))
    assert "rank" in message, message
    steps.round_trip(context, buffer, CASE, seed)
