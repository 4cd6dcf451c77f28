# SPDX-License-Identifier: MIT
"""Bad input to low-latency operations: who refuses it, what is said, and that all ranks go on."""

from __future__ import annotations

import functools
import re
import time

import numpy as np

import mscclpp_ep as ep
from harness import cases, steps
from harness import low_latency as ll
from harness.low_latency import Case, World, world_of
from harness.programs.errors import (
    Bad,
    Elsewhere,
    always,
    as_type,
    expect_peer_failure,
    expect_refusal,
    longer,
    replaced,
    sparse,
    wider,
    with_entry,
)

CASE = Case(tokens=(9, 14, 6), room=0, hidden=64, experts=8, topk=3)
QUANTISED = CASE.but(kind="fp8")
TWO, THREE = r"\[.*,.*\]", r"\[.*,.*,.*\]"
MOST = "num_max_dispatch_tokens_per_rank"
RECV_STATS = "cumulative_local_expert_recv_stats"
WAIT_STATS = "dispatch_wait_recv_cost_stats"
COMBINE_STATS = "combine_wait_recv_cost_stats"


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def stats_mistakes(name: str, dtype: str, other: str) -> dict:
    short = name.split("_", maxsplit=1)[0]
    return {
        f"{short}-stats-dtype": (replaced(**{name: always(np.zeros(99, other))}), name, other),
        f"{short}-stats-longer": (replaced(**{name: always(np.zeros(99, dtype))}), name, "99"),
        f"{short}-stats-read-only": (
            replaced(**{name: always(frozen(np.zeros(99, dtype)))}),
            name,
            "writ",
        ),
        f"{short}-stats-no-tensor": (replaced(**{name: always("some")}), name),
    }


def dispatch_mistakes() -> list[Bad]:
    table = {
        "x-one-dimension": (replaced(x=np.ravel), r"\bx\b", "bfloat16", TWO),
        "x-three-dimensions": (replaced(x=lambda x: x[None]), r"\bx\b", TWO),
        "x-no-dimension": (replaced(x=lambda x: x[0, 0:1].reshape(())), r"\bx\b", "0 dim"),
        "x-with-gaps": (replaced(x=sparse), r"\bx\b", "contiguous"),
        "x-no-tensor": (replaced(x=always("rows")), r"\bx\b"),
        "x-missing": (replaced(x=always(None)), r"\bx\b", "missing"),
        "x-elsewhere": (replaced(x=Elsewhere), r"\bx\b", "cuda", "cpu"),
        "x-no-columns": (replaced(x=lambda x: x[:, :0]), r"\bx\b", r", 0\]"),
        "x-shorter": (replaced(x=lambda x: x[1:]), "topk_idx", TWO),
        "too-many-tokens": (replaced(**{MOST: always(3)}), r"\bx\b", MOST, r"\b3\b"),
        "most-zero": (replaced(**{MOST: always(0)}), MOST, r"\b0\b"),
        "most-negative": (replaced(**{MOST: always(-7)}), MOST, "-7"),
        "most-beyond-int32": (replaced(**{MOST: always(2**31)}), MOST, "2147483648"),
        "most-just-within-int64": (replaced(**{MOST: always(2**62)}), MOST, str(2**62)),
        "experts-beyond-memory": (replaced(num_experts=always(2**62)), "experts"),
        "most-beyond-int64": (replaced(**{MOST: always(2**70)}), MOST),
        "most-no-number": (replaced(**{MOST: always("many")}), MOST, "many"),
        "experts-zero": (replaced(num_experts=always(0)), "num_experts", r"\b0\b"),
        "experts-negative": (replaced(num_experts=always(-1)), "num_experts", "-1"),
        "experts-no-number": (replaced(num_experts=always(None)), "num_experts"),
        "idx-missing": (replaced(topk_idx=always(None)), "topk_idx", "missing"),
        "idx-float": (replaced(topk_idx=as_type("float32")), "topk_idx", "float32", "int32.*int64"),
        "idx-int16": (replaced(topk_idx=as_type("int16")), "topk_idx", "int16"),
        "idx-longer": (replaced(topk_idx=longer), "topk_idx", TWO),
        "idx-one-dimension": (replaced(topk_idx=np.ravel), "topk_idx", TWO),
        "idx-with-gaps": (replaced(topk_idx=sparse), "topk_idx", "contiguous"),
        "idx-too-large": (
            *(replaced(topk_idx=with_entry((3, 1), 8)), "topk_idx", r"3, 1", r"\b8\b", r"\b7\b"),
        ),
        "idx-beyond-int32": (
            *(replaced(topk_idx=with_entry((1, 1), 2**32)), "topk_idx", "1, 1", "4294967296"),
        ),
        "idx-below": (replaced(topk_idx=with_entry((2, 0), -2)), "topk_idx", "2, 0", "-2"),
        "weights-double": (
            replaced(topk_weights=always(np.zeros((6, 3)))),
            *("topk_weights", "float64", "float32"),
        ),
        "weights-wider": (
            replaced(topk_weights=always(np.zeros((6, 4), np.float32))),
            *("topk_weights", "4", "3"),
        ),
        "weights-no-tensor": (replaced(topk_weights=always([1.0])), "topk_weights"),
        "exponents-unrounded": (
            replaced(use_fp8=always(True), use_ue8m0=always(True), round_scale=always(False)),
            *("use_ue8m0", "round_scale"),
        ),
        "event-and-hook": (
            replaced(async_finish=always(True), return_recv_hook=always(True)),
            *("async_finish", "return_recv_hook"),
        ),
        "stream": (replaced(stream=always(7)), "stream", "7"),
        **stats_mistakes(RECV_STATS, "int32", "int64"),
        **stats_mistakes(WAIT_STATS, "int64", "int32"),
    }
    mistakes = [Bad(name, "dispatch", spoil, says, CASE) for name, (spoil, *says) in table.items()]
    quantised = {
        "fp8-of-float16": (replaced(x=as_type("float16")), r"\bx\b", "float16", "bfloat16"),
        "fp8-of-float32": (replaced(x=as_type("float32")), r"\bx\b", "float32", "use_fp8"),
        "fp8-of-bytes": (replaced(x=lambda x: x.view(np.uint8)), r"\bx\b", "uint8", "bfloat16"),
    }
    mistakes += [
        Bad(n, "dispatch", spoil, says, QUANTISED) for n, (spoil, *says) in quantised.items()
    ]
    return mistakes


def combine_mistakes() -> list[Bad]:
    out = {
        "out-longer": (always(np.zeros((99, 64), "float16")), "99"),
        "out-dtype": (always(np.zeros((6, 64), "int8")), "int8"),
        "out-with-gaps": (always(np.zeros((6, 128), "float16")[:, ::2]), ""),
        "out-read-only": (always(frozen(np.zeros((6, 64), "float16"))), "writ"),
        "out-no-tensor": (always("there"), ""),
    }
    table = {
        "combine-x-missing": (replaced(x=always(None)), r"\bx\b", "missing"),
        "combine-x-no-tensor": (replaced(x=always(3)), r"\bx\b"),
        "combine-x-two-dimensions": (
            *(replaced(x=lambda x: x.reshape(-1, x.shape[2])), r"\bx\b", THREE),
        ),
        "combine-x-no-dimension": (replaced(x=lambda _: np.float32(1) * np.ones(())), r"\bx\b"),
        "combine-x-longer": (
            *(replaced(x=lambda x: np.concatenate([x, x], axis=1)), r"\bx\b", THREE),
        ),
        "combine-x-wider": (
            *(replaced(x=lambda x: np.concatenate([x, x], axis=2)), r"\bx\b", "128", "64"),
        ),
        "combine-x-with-gaps": (replaced(x=sparse), r"\bx\b", "contiguous"),
        "combine-x-double": (replaced(x=as_type("float64")), r"\bx\b", "float64", "float32"),
        "combine-x-bytes": (replaced(x=lambda x: x.view(np.uint8)), r"\bx\b", "uint8"),
        "combine-idx-missing": (replaced(topk_idx=always(None)), "topk_idx"),
        "combine-idx-no-tensor": (replaced(topk_idx=always("ids")), "topk_idx"),
        "combine-idx-no-dimension": (
            replaced(topk_idx=lambda i: i[0, 0:1].reshape(())),
            "topk_idx",
        ),
        "combine-idx-longer": (replaced(topk_idx=longer), "topk_idx", TWO),
        "combine-idx-wider": (replaced(topk_idx=wider), "topk_idx", "4", "3"),
        "combine-idx-float": (replaced(topk_idx=as_type("float32")), "topk_idx", "float32"),
        "combine-idx-other": (
            replaced(topk_idx=lambda idx: np.where(idx == 0, 1, (idx + 1) % 8)),
            *("topk_idx", "0, 0"),
        ),
        "combine-idx-beyond-int32": (replaced(topk_idx=lambda i: i + 2**32), "topk_idx", "0, 0"),
        "combine-weights-missing": (replaced(topk_weights=always(None)), "topk_weights"),
        "combine-weights-longer": (replaced(topk_weights=longer), "topk_weights", TWO),
        "combine-weights-double": (
            *(replaced(topk_weights=as_type("float64")), "topk_weights", "float64", "float32"),
        ),
        "combine-weights-with-gaps": (replaced(topk_weights=sparse), "topk_weights", "contiguous"),
        "combine-no-handle": (replaced(handle=always(None)), "handle"),
        "combine-handle-left-out": (replaced(handle=always("mine")), "handle"),
        "combine-plain-tuple": (replaced(handle=tuple), "handle"),
        "combine-zero-copy-unasked": (
            *(replaced(zero_copy=always(True)), "zero_copy", "get_next_low_latency"),
        ),
        "combine-event-and-hook": (
            replaced(async_finish=always(True), return_recv_hook=always(True)),
            *("async_finish", "return_recv_hook"),
        ),
        "combine-stream": (replaced(stream=always(7)), "stream", "7"),
        **{
            n: (replaced(out=new), r"\bout", *filter(None, says)) for n, (new, *says) in out.items()
        },
        **stats_mistakes(COMBINE_STATS, "int64", "int32"),
    }
    mistakes = [Bad(name, "combine", spoil, says, CASE) for name, (spoil, *says) in table.items()]
    early = replaced(topk_weights=lambda w: w + np.float32(1))
    says = ("topk_weights", "dispatch")
    mistakes.append(Bad("weights-not-those", "combine", early, says, CASE.but(early_weights=True)))
    return mistakes


MISTAKES = {bad.name: bad for bad in dispatch_mistakes() + combine_mistakes()}


def call_of(context, buffer, world: World, call: str) -> tuple:
    """A method and its arguments, all sound. Collective if it needs a handle."""
    if call == "dispatch":
        return buffer.low_latency_dispatch, ll.dispatch_arguments(context, world)
    handle = ll.dispatch(context, buffer, world).handle
    return buffer.low_latency_combine, ll.combine_arguments(context, world, handle)


def refused(context, name: str, hook: bool, seed: int) -> None:
    """The last rank makes a mistake; it is told which, the others whose, and all go on."""
    mistake, culprit = MISTAKES[name], context.size - 1
    buffer = context.standing()
    world = world_of(mistake.case, seed, context.size)
    method, arguments = call_of(context, buffer, world, mistake.call)
    if context.rank == culprit:
        expect_refusal(method, mistake.spoil(arguments), mistake.says)
    else:
        expect_peer_failure(culprit, with_hook(method) if hook else method, arguments)
    ll.round_trip(context, buffer, mistake.case, seed + 1)


def with_hook(method):
    """The call in two halves."""

    def call(**arguments) -> None:
        method(**arguments, return_recv_hook=True)[-1]()

    return call


def refused_by_all(context, seed: int) -> None:
    """Every rank makes a mistake of its own, and is told its own."""
    buffer, names = context.standing(), ["x-with-gaps", "idx-too-large", "too-many-tokens"]
    mistake = MISTAKES[names[context.rank % 3]]
    world = world_of(CASE, seed, context.size)
    method, arguments = call_of(context, buffer, world, "dispatch")
    expect_refusal(method, mistake.spoil(arguments), mistake.says)
    ll.round_trip(context, buffer, CASE, seed + 1)


def refused_over_and_over(context, seed: int) -> None:
    """Ranks take turns at making mistakes, while other operations are out."""
    buffer, names = context.standing(), sorted(MISTAKES)
    rng = np.random.default_rng(seed)
    for turn in range(30):
        mistake, culprit = MISTAKES[str(rng.choice(names))], turn % context.size
        world = world_of(mistake.case, seed, context.size)
        method, arguments = call_of(context, buffer, world, mistake.call)
        waiting = ll.dispatch(context, buffer, world, turn, return_recv_hook=True)
        if context.rank == culprit:
            expect_refusal(method, mistake.spoil(arguments), mistake.says)
        else:
            expect_peer_failure(culprit, method, arguments)
        waiting.hook()
        ll.verify_dispatch(context, world, waiting, turn)
    ll.round_trip(context, buffer, CASE, seed)


def refuses_alone_many_times(context, seed: int) -> None:
    """One rank runs ahead with mistakes; each of them fails one operation of the others."""
    buffer, culprit = context.standing(), context.size - 1
    world = world_of(CASE, seed, context.size)
    mistake = MISTAKES["too-many-tokens"]
    for _ in range(12):
        method, arguments = call_of(context, buffer, world, "dispatch")
        if context.rank == culprit:
            expect_refusal(method, mistake.spoil(arguments), mistake.says)
        else:
            expect_peer_failure(culprit, method, arguments)
    ll.round_trip(context, buffer, CASE, seed)


def foreign_handle(context, what: str, seed: int) -> None:
    """Handles of another buffer, or of the other mode, are refused."""
    world = world_of(CASE, seed, context.size)
    stranger, buffer = context.buffer(), context.standing()
    method, arguments = call_of(context, buffer, world, "combine")
    if what == "other-mode":
        other = cases.world_of(cases.Case(), seed, context.size)
        arguments["handle"] = steps.dispatch(context, buffer, other).handle
        expect_refusal(method, arguments, ("handle", "low_latency_dispatch"))
        ordinary = {
            "x": other.outputs()[context.rank],
            "handle": ll.dispatch(context, buffer, world).handle,
        }
        expect_refusal(buffer.combine, ordinary, ("handle",))
        steps.raised(
            ep.InvalidArgument, buffer.get_next_low_latency_combine_buffer, arguments["handle"]
        )
    else:
        arguments["handle"] = call_of(context, stranger, world, "combine")[1]["handle"]
        if what == "destroyed":
            stranger.destroy()
        expect_refusal(method, arguments, ("handle", "buffer"))
    ll.round_trip(context, buffer, CASE, seed)


DISAGREEMENTS = {
    "hidden": (CASE.but(hidden=72), r"\(H\)"),
    "dtype": (CASE.but(dtype="float32"), "dtype of x"),
    "experts": (CASE.but(experts=12), r"\(E\)"),
    "topk": (CASE.but(topk=5), r"\(K\)"),
    "most": (CASE.but(room=4), r"\(M\)"),
    "weights": (CASE.but(early_weights=True), "topk_weights"),
    "quantised": (QUANTISED, "quantised"),
    "scales": (QUANTISED.but(kind="ue8m0"), "quantised"),
}


def disagree(context, what: str, seed: int) -> None:
    """Rank 1 means other sizes than the others: every rank is told what, and who."""
    buffer, odd = context.standing(), 1
    case, says = DISAGREEMENTS[what]
    common = QUANTISED if what == "scales" else CASE
    mine = world_of(case if context.rank == odd else common, seed, context.size)
    message = str(steps.raised(ep.InvalidArgument, ll.dispatch, context, buffer, mine))
    assert re.search(says, message), message
    assert all(re.search(rf"\b{rank}\b", message) for rank in range(context.size)), message
    ll.round_trip(context, buffer, common, seed)


def modes_differ(context, seed: int) -> None:
    """Rank 1 calls the other mode: every rank is told, long before the timeout."""
    buffer = context.buffer(timeout=60)
    ll.round_trip(context, buffer, CASE, seed)
    if context.rank == 1:
        world = cases.world_of(cases.Case("small"), seed, context.size)
        call = functools.partial(steps.dispatch, context, buffer, world)
    else:
        world = world_of(CASE, seed, context.size)
        call = functools.partial(ll.dispatch, context, buffer, world)
    start = time.monotonic()
    message = str(steps.raised(ep.PeerFailure, call))
    assert time.monotonic() - start < 30
    # Of more ranks than two, one may hear first that another has given up.
    assert "disagree on the operation" in message or "gave up" in message, message
    assert context.size > 2 or "disagree" in message, message
    buffer.destroy()


def combines_differ(context, what: str, seed: int) -> None:
    """As `disagree`, for what ranks give to combine, and for another operation."""
    buffer, odd = context.standing(), context.rank == 1
    world = world_of(CASE, seed, context.size)
    other = world_of(CASE.but(combine_dtype="float32"), seed, context.size)
    first, second = (ll.dispatch(context, buffer, world).handle for _ in range(2))
    if what == "operation" and odd:
        error = steps.raised(ep.InvalidArgument, ll.dispatch, context, buffer, world)
    else:
        mine = other if what == "dtype" and odd else world
        handle = second if what == "handle" and odd else first
        extra = {"exact": what == "exact" and odd}
        error = steps.raised(ep.InvalidArgument, ll.combine, context, buffer, mine, handle, **extra)
    says = {"operation": "operation", "dtype": "dtype", "handle": "handle", "exact": "exact"}
    assert says[what] in str(error), error
    assert "rank" in str(error), error
    ll.round_trip(context, buffer, CASE, seed)


def clean_checks_its_arguments(context, seed: int) -> None:
    """`clean_low_latency_buffer` takes integers, and is local."""
    buffer = context.standing()
    buffer.clean_low_latency_buffer(128, np.int64(7168), 256)
    for bad in ({"hidden": "wide"}, {"num_experts": None}, {MOST: 1.5}):
        given = {MOST: 8, "hidden": 64, "num_experts": 8} | bad
        error = steps.raised(ep.InvalidArgument, buffer.clean_low_latency_buffer, **given)
        assert next(iter(bad)) in str(error)
    ll.round_trip(context, buffer, CASE, seed)


def no_room(context, seed: int) -> None:
    """What no machine has memory for is an error on all ranks, and the buffer goes on."""
    buffer, culprit = context.standing(), context.size - 1
    world = world_of(CASE.but(hidden=64), seed, context.size)
    arguments = ll.dispatch_arguments(context, world)
    arguments[MOST] = (2**31 - 1) // (context.size * CASE.experts)
    if context.rank == culprit:
        arguments["x"] = np.zeros((0, 2**20), np.uint8)
        arguments["topk_idx"] = arguments["topk_idx"][:0]
        error = steps.raised(ep.Error, buffer.low_latency_dispatch, **arguments)
        assert steps.largest_size(str(error)) > 2**40, error
    else:
        arguments[MOST] = world.most
        expect_peer_failure(culprit, buffer.low_latency_dispatch, arguments)
    ll.round_trip(context, buffer, CASE, seed)
