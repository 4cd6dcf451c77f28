# SPDX-License-Identifier: MIT
"""The exit statuses of the commands, and the messages that go with them.

0: all is well. 1: a result is wrong or a rank failed. 2: the input cannot be used. 130: Ctrl-C.
"""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

import mscclpp_ep as ep
from mscclpp_ep.cli import InputError
from mscclpp_ep.cli.launch import RankError

errors = Console(stderr=True, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """Turn what can go wrong into a message and an exit status."""
    try:
        yield
    except InputError as error:
        fail(str(error), 2)
    except RankError as error:
        errors.print(error.details, markup=False, end="")
        fail(str(error), 1)
    except (ep.Error, OSError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted; all ranks were ended", 130)


def fail(message: str, status: int) -> None:
    """Print a message and end the program."""
    errors.print("[bold red]error:[/] ", end="")
    errors.print(message, markup=False)
    raise typer.Exit(status)
