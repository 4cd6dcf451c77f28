#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Measures dispatch and combine on the CPU, the limit of the memory, and peers, in one run."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from pathlib import Path

import peers
import report
from cases import BFLOAT16, Settings
from mscclpp_ep.cli.launch import RankError, run_ranks
from mscclpp_ep.cli.machine import memory_available
from results import Results
from worker import run_rank

# Arrays as large as the largest result that a rank has at one time, counted generously.
_ARRAYS = 13


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _megabytes(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=_positive, default=2, help="processes (default: 2)")
    parser.add_argument("--tokens", type=_positive, default=4096, help="of each rank")
    parser.add_argument(
        "--sizes",
        default="",
        help="numbers of tokens to compare (default: half, once and twice --tokens)",
    )
    parser.add_argument("--hidden", type=_positive, default=7168)
    parser.add_argument("--experts", type=_positive, default=256)
    parser.add_argument("--topk", type=_positive, default=8)
    parser.add_argument("--iters", type=_positive, default=20, help="timed calls (default: 20)")
    parser.add_argument(
        "--refresh", type=_positive, default=5, help="calls with the same inputs (default: 5)"
    )
    parser.add_argument(
        "--warmup", type=_positive, default=2, help="untimed calls when inputs change (default: 2)"
    )
    parser.add_argument("--threads", type=_positive, help="of each rank (default: cores // ranks)")
    parser.add_argument(
        "--flush",
        type=_megabytes,
        default=64,
        metavar="MB",
        help="other memory that is read before each timed call (default: 64)",
    )
    parser.add_argument(
        "--peers", default=",".join(peers.PEERS), help='names with commas, or "none"'
    )
    parser.add_argument("--seed", type=int, help="of all inputs (default: a fresh one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument(
        "--require", action="store_true", help="exit with 1 if a bound is missed or not measured"
    )
    return parser


def _settings(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Settings:
    if arguments.ranks < 2:
        parser.error("--ranks must be at least 2: one rank sends nothing")
    if arguments.experts < arguments.ranks:
        parser.error(f"--experts must be at least --ranks, which is {arguments.ranks}")
    if arguments.topk > arguments.experts:
        parser.error(f"--topk must be at most --experts, which is {arguments.experts}")
    if arguments.seed is not None and arguments.seed < 0:
        parser.error("--seed must not be negative")
    tokens = arguments.tokens
    try:
        given = [_positive(text) for text in arguments.sizes.split(",") if text]
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--sizes is {arguments.sizes!r}; it must be like 2048,4096,8192")
    sizes = tuple(sorted({tokens, *(given or (max(tokens // 2, 1), 2 * tokens))}))
    wanted = () if arguments.peers in {"", "none"} else tuple(arguments.peers.split(","))
    if unknown := set(wanted) - set(peers.PEERS):
        parser.error(f"--peers has {', '.join(sorted(unknown))}; known: {', '.join(peers.PEERS)}")
    settings = Settings(
        ranks=arguments.ranks,
        tokens=tokens,
        sizes=sizes,
        hidden=arguments.hidden,
        experts=arguments.experts,
        topk=arguments.topk,
        iters=arguments.iters,
        refresh=arguments.refresh,
        warmup=arguments.warmup,
        threads=arguments.threads or max(1, len(os.sched_getaffinity(0)) // arguments.ranks),
        flush=arguments.flush,
        seed=secrets.randbits(32) if arguments.seed is None else arguments.seed,
        peers=wanted,
    )
    needed = _ARRAYS * settings.ranks**2 * sizes[-1] * settings.hidden * BFLOAT16.itemsize
    available = memory_available()
    if available is not None and needed > available:
        parser.error(
            f"this may need {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
            "available: lower --tokens, --sizes, --hidden or --ranks"
        )
    return settings


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    settings = _settings(arguments, parser)
    reasons = {peer: peers.why_not(peer) for peer in settings.peers}
    not_measured = {peer: reason for peer, reason in reasons.items() if reason is not None}
    settings = settings.without_peers(set(not_measured))

    def show(rank: int, step: str) -> None:
        if rank == 0 and sys.stderr.isatty():
            print(f"\r\033[K{step}", end="", file=sys.stderr, flush=True)

    load = os.getloadavg()[0]
    try:
        measured = run_ranks(run_rank, settings, settings.ranks, on_step=show)
    except RankError as error:
        print(f"{error}\n{error.details}", file=sys.stderr)
        return 1
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for peer in set(peers.PEERS) - set(settings.peers) - set(not_measured):
        not_measured[peer] = "not asked for"
    results = Results(settings, measured, not_measured, load)
    report.print_report(results)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results.to_json(), indent=1) + "\n", encoding="utf-8")
    missed = [bound for bound in results.bounds if not bound.met]
    return 1 if arguments.require and missed else 0


if __name__ == "__main__":
    sys.exit(main())
