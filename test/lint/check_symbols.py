"""Compares what libmscclpp_ep.so exports with the committed list, symbols.txt.

    python test/lint/check_symbols.py PATH/libmscclpp_ep.so [--update]

Every name of the list is a promise to C++ users, and every other one an accident. Needs `nm`.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
from pathlib import Path

LIST = Path(__file__).with_name("symbols.txt")


def exported(library: Path) -> list[str]:
    """Returns the demangled names of the symbols that a shared library defines and exports."""
    command = ["nm", "--dynamic", "--defined-only", "--demangle", "--format=posix", str(library)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Lines are NAME TYPE VALUE SIZE, where NAME may hold spaces.
    return sorted({line.rstrip().rsplit(" ", 3)[0] for line in output.splitlines()})


def main() -> int:
    """Prints the difference; returns 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--update", action="store_true", help="write symbols.txt anew")
    arguments = parser.parse_args()

    now = exported(arguments.library)
    if arguments.update:
        LIST.write_text("".join(f"{name}\n" for name in now), encoding="utf-8")
        print(f"check_symbols: wrote {len(now)} names to {LIST}")
        return 0

    listed = LIST.read_text(encoding="utf-8").splitlines()
    if now == listed:
        print(f"check_symbols: {len(now)} names, as listed")
        return 0
    print(
        *difflib.unified_diff(listed, now, str(LIST), str(arguments.library), lineterm="", n=0),
        sep="\n",
    )
    print("check_symbols: if the change is meant, run again with --update and commit the list")
    return 1


if __name__ == "__main__":
    sys.exit(main())
