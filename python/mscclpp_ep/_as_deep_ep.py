# SPDX-License-Identifier: MIT
"""Lets programs that import `deep_ep` find `mscclpp_ep.deep_ep`, which they can use alike."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mscclpp_ep._core import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_PACKAGE = Path(__file__).parent.absolute()
_NAME = "mscclpp_ep.deep_ep"
USAGE = """\
Usage: python -m mscclpp_ep run-as-deep-ep SCRIPT [ARGS]...
       python -m mscclpp_ep run-as-deep-ep -m MODULE [ARGS]...

Runs a program written for deep_ep: in it, and in every Python process that it
starts, `import deep_ep` finds mscclpp_ep. The exit status is the program's.

Options:
  -m MODULE   Run a module, as python does.
  -h, --help  Show this message and exit.
"""


def install_as_deep_ep() -> ModuleType:
    """Makes `import deep_ep` in this process find `mscclpp_ep.deep_ep`; imports torch.

    Calling it again does nothing.

    Returns:
        The module.

    Raises:
        InvalidArgument: Another deep_ep has been imported already.
        ModuleNotFoundError: torch is not installed.
    """
    module = importlib.import_module(_NAME)
    present = sys.modules.get("deep_ep")
    if present not in {None, module}:
        where = getattr(present, "__file__", None) or "an unknown place"
        msg = (
            f"another deep_ep has been imported already, from {where}; "
            "call install_as_deep_ep before anything imports it"
        )
        raise InvalidArgument(msg)
    for name in [*sys.modules]:
        if name == _NAME or name.startswith(_NAME + "."):
            sys.modules[name.removeprefix("mscclpp_ep.")] = sys.modules[name]
    return module


def run_as_deep_ep(arguments: Sequence[str]) -> int:
    """The command `run-as-deep-ep`: does not return if the program can be started.

    Args:
        arguments: What follows the name of the command.

    Returns:
        0 if help was asked for, 2 if the arguments cannot be used.
    """
    if arguments and arguments[0] in {"-h", "--help"}:
        print(USAGE, end="")
        return 0
    wrong = _why_not(arguments)
    if wrong:
        print(f"error: {wrong}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    _start(arguments)


def _why_not(arguments: Sequence[str]) -> str | None:
    """What is wrong with a command, or None."""
    if sys.flags.ignore_environment:
        return "Python ignores PYTHONPATH, which this needs; leave out its options -E and -I"
    if not arguments:
        return "SCRIPT is missing"
    if arguments[0] == "-m":
        return "MODULE is missing" if len(arguments) == 1 else None
    if arguments[0].startswith("-"):
        return f"there is no option {arguments[0]}"
    return _why_not_script(Path(arguments[0]))


def _why_not_script(script: Path) -> str | None:
    if not script.exists():
        return f"there is no file {script}"
    folder = script.resolve() if script.is_dir() else script.resolve().parent
    if (folder / "deep_ep").exists() or (folder / "deep_ep.py").exists():
        return f"{folder} has a deep_ep of its own, which Python would import first; move {script}"
    return None


def _start(arguments: Sequence[str]) -> NoReturn:
    """Turns this process into the program's, as if Python had been started with it."""
    folders = [str(_PACKAGE / "_shim")]
    # `python -m` finds packages in the current folder; a script does not.
    parent = str(_PACKAGE.parent)
    if parent == sys.path[0] and parent not in sys.path[1:]:
        folders.append(parent)
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*folders, *([inherited] if inherited else [])])
    options = itertools.takewhile(lambda option: option != "-m", sys.orig_argv[1:])
    command = [sys.executable, *options, *arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})
