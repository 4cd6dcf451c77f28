# SPDX-License-Identifier: MIT
"""Ranks as threads of the test's own process, for tests of one framework."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import mscclpp_ep as ep

if TYPE_CHECKING:
    from collections.abc import Callable


def on_ranks(ranks: int, body: Callable[[ep.Group], Any]) -> list[Any]:
    """Runs `body` on every rank; returns what each did, or raises the first error."""
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def run(group: ep.Group) -> None:
        try:
            results[group.rank] = body(group)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(group,)) for group in ep.Group.local(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
