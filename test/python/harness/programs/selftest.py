# SPDX-License-Identifier: MIT
"""Programs that try the pools themselves, without the library."""

from __future__ import annotations

import os


def square(context, number: int) -> tuple[int, int]:
    return context.rank, number * number + context.rank


def refuse(context) -> None:
    if context.rank == 0:
        raise ValueError("no such thing")


def wait_for_mail_that_never_comes(context) -> None:
    context.report("waiting")
    context.receive()


def exit_on_rank(context, rank: int) -> None:
    if context.rank == rank:
        os._exit(3)


def echo(context) -> None:
    context.report(context.receive() + context.rank)
