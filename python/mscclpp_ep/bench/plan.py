# SPDX-License-Identifier: MIT
"""Decides what a run measures, and refuses what makes no sense or does not fit."""

from __future__ import annotations

import dataclasses
import os
import secrets

from mscclpp_ep.bench.peers import PEERS
from mscclpp_ep.bench.routing import Routing
from mscclpp_ep.bench.settings import BFLOAT16, HT, LL, Settings
from mscclpp_ep.cli import InputError
from mscclpp_ep.cli.machine import memory_available

# Arrays as large as the largest result that a rank has at one time, counted generously.
_HT_ARRAYS = 13
_LL_ARRAYS = 5
_DEFAULT_RANKS, _DEFAULT_EXPERTS, _DEFAULT_TOPK = 2, 256, 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; None where the default depends on something else."""

    ranks: int | None
    tokens: int
    sizes: str
    ll_tokens: int
    ll_sizes: str
    hidden: int
    experts: int | None
    topk: int | None
    iters: int
    refresh: int
    warmup: int
    chain: int
    threads: int | None
    flush: int
    seed: int | None
    peers: str | None
    routing: Routing | None


def plan(options: Options, mode: str) -> Settings:
    """The settings of a mode.

    Raises:
        InputError: with what would do.
    """
    routing = options.routing
    ranks = _chosen(
        "--ranks", options.ranks, None if routing is None else routing.ranks, _DEFAULT_RANKS
    )
    experts = _chosen(
        "--experts", options.experts, None if routing is None else routing.experts, _DEFAULT_EXPERTS
    )
    topk = _chosen("--topk", options.topk, None if routing is None else routing.topk, _DEFAULT_TOPK)
    if ranks < 2:
        raise InputError("--ranks must be at least 2: one rank sends nothing")
    if experts < ranks:
        raise InputError(f"--experts must be at least --ranks, which is {ranks}")
    if topk > experts:
        raise InputError(f"--topk must be at most --experts, which is {experts}")
    tokens, sizes = _sizes(options, mode)
    settings = Settings(
        mode=mode,
        ranks=ranks,
        tokens=tokens,
        sizes=sizes,
        hidden=options.hidden,
        experts=experts,
        topk=topk,
        iters=options.iters,
        refresh=options.refresh,
        warmup=options.warmup,
        threads=options.threads or max(1, len(os.sched_getaffinity(0)) // ranks),
        flush=options.flush,
        chain=options.chain,
        seed=secrets.randbits(32) if options.seed is None else options.seed,
        peers=chosen_peers(options.peers, PEERS),
        routing=routing,
    )
    _check_memory(settings)
    return settings


def _chosen(name: str, given: int | None, recorded: int | None, default: int) -> int:
    """What the user gave, else what was recorded; they must agree if there are both."""
    if given is not None and recorded is not None and given != recorded:
        raise InputError(
            f"{name} is {given}, but {recorded} in the file of --routing: leave it out"
        )
    return given or recorded or default


def _sizes(options: Options, mode: str) -> tuple[int, tuple[int, ...]]:
    """The headline number of tokens, and all of them."""
    if options.routing is not None:
        most = options.routing.most_tokens
        if mode == LL and most > options.ll_tokens:
            raise InputError(
                f"the file of --routing has steps of {most} tokens, more than --ll-tokens, which "
                f"is {options.ll_tokens}"
            )
        return most, (most,)
    if mode == HT:
        tokens = options.tokens
        default = (max(tokens // 2, 1), 2 * tokens)
        given = _numbers("--sizes", options.sizes)
    else:
        tokens = options.ll_tokens
        default = (max(tokens // 16, 1), max(tokens // 4, 1))
        given = _numbers("--ll-sizes", options.ll_sizes)
        if given and max(given) > tokens:
            raise InputError(f"--ll-sizes must be at most --ll-tokens, which is {tokens}")
    return tokens, tuple(sorted({tokens, *(given or default)}))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise InputError(f"{name} is {text!r}; it must be like 2048,4096,8192")
    return numbers


def chosen_peers(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Those that --peers names; all, if it is left out.

    Raises:
        InputError: one is not known.
    """
    if text is None:
        return known
    wanted = () if text in {"", "none"} else tuple(dict.fromkeys(text.split(",")))
    if unknown := set(wanted) - set(known):
        raise InputError(f"--peers has {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return wanted


def _check_memory(settings: Settings) -> None:
    ranks, row = settings.ranks, settings.hidden * int(BFLOAT16.itemsize)
    if settings.mode == HT:
        needed = _HT_ARRAYS * ranks**2 * settings.sizes[-1] * row
    else:
        # Every expert has room for all tokens of all ranks.
        experts = settings.experts_held * ranks
        needed = _LL_ARRAYS * experts * ranks * settings.tokens * row
    available = memory_available()
    if available is not None and needed > available:
        raise InputError(
            f"this may need {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
            "available: lower the numbers of tokens, --hidden or --ranks"
        )
