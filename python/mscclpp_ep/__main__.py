# SPDX-License-Identifier: MIT
"""The command line: `python -m mscclpp_ep`."""

import sys

import mscclpp_ep
from mscclpp_ep import _as_deep_ep, _paths

_ANSWERS = {
    "--version": lambda: mscclpp_ep.__version__,
    "--cmake-dir": _paths.cmake_dir,
    "--include-dir": _paths.include_dir,
}
_EXTRA = frozenset({"ml_dtypes", "rich", "typer"})


def main() -> int:
    """Run the command line; what build scripts ask for needs no optional package."""
    arguments = sys.argv[1:]
    try:
        if len(arguments) == 1 and arguments[0] in _ANSWERS:
            print(_ANSWERS[arguments[0]]())
            return 0
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments[:1] == ["run-as-deep-ep"]:
        return _as_deep_ep.run_as_deep_ep(arguments[1:])
    try:
        from mscclpp_ep.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(
            f"error: this command needs {error.name}, which is not installed. "
            "Install it with: pip install 'mscclpp_ep[cli]'\n"
            f"Without it there are: {', '.join(_ANSWERS)}, run-as-deep-ep",
            file=sys.stderr,
        )
        return 2
    app(prog_name="python -m mscclpp_ep")
    return 0


if __name__ == "__main__":
    sys.exit(main())
