# SPDX-License-Identifier: MIT
"""Runs the command line as a user does."""

import os
import subprocess
import sys

PROGRAM = (sys.executable, "-m", "mscclpp_ep")
# Options of a demo that takes about a second.
SMALL = ("--tokens=301", "--hidden=64", "--ffn=32", "--experts=10", "--topk=3", "--repeats=2")


def run(*arguments, program=PROGRAM, **environment):
    """Runs to the end; standard output and error as text."""
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )
