"""Checks that includes point only towards the lower layers.

    include/mscclpp_ep <- core <- transport <- host <- cpu | cuda    src/python uses public headers

A public header includes public headers and the standard library, nothing else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = "mscclpp_ep"
SUFFIXES = {".hpp", ".cpp", ".cu", ".cuh", ".h"}

# The layers whose headers a file of each layer may include.
MAY_INCLUDE = {
    PUBLIC: {PUBLIC},
    "core": {PUBLIC, "core"},
    "transport": {PUBLIC, "core", "transport"},
    "host": {PUBLIC, "core", "transport", "host"},
    "cpu": {PUBLIC, "core", "transport", "host", "cpu"},
    "cuda": {PUBLIC, "core", "transport", "host", "cuda"},
    "python": {PUBLIC, "python"},
}

# transport knows nothing of tokens: of core, it may see how to check and where bytes are.
CORE_FOR_TRANSPORT = {"core/check.hpp", "core/memory_map.hpp"}

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
STANDARD_HEADER = re.compile(r"[a-z_0-9]+")


def layer_of(path: Path) -> str:
    """Returns the layer of a file in src."""
    parts = path.relative_to(ROOT / "src").parts
    if parts[0] == "python":
        return "python"
    return PUBLIC if parts[1] == "include" else parts[1]


def resolve(path: Path, name: str) -> str | None:
    """Returns an included name as the layer's include path gives it, or None if there is none."""
    roots = {"": ROOT / "src/ep", "include": ROOT / "src/ep/include"}
    for base in roots.values():
        if (base / name).is_file():
            return name
    beside = path.parent / name
    if beside.is_file():
        if layer_of(path) == "python":
            return f"python/{name}"
        base = roots["include"] if layer_of(path) == PUBLIC else roots[""]
        return beside.resolve().relative_to(base).as_posix()
    return None


def problems_of_quoted(path: Path, name: str) -> str | None:
    """Returns what is wrong with `#include "name"` in `path`."""
    layer = layer_of(path)
    target = resolve(path, name)
    if target is None:
        return "no such file in src; use <> for the headers of others"
    if target.split("/")[0] not in MAY_INCLUDE[layer]:
        return f"{layer} may include only {', '.join(sorted(MAY_INCLUDE[layer]))}"
    if layer == "transport" and target.startswith("core/") and target not in CORE_FOR_TRANSPORT:
        return f"transport may include of core only {', '.join(sorted(CORE_FOR_TRANSPORT))}"
    return None


def problems(path: Path) -> list[str]:
    """Returns the wrong includes of a file, a line each."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in INCLUDE.finditer(text):
        quoted, angled = match.groups()
        if quoted:
            problem = problems_of_quoted(path, quoted)
        elif layer_of(path) == PUBLIC and not STANDARD_HEADER.fullmatch(angled):
            problem = "a public header includes only public and standard headers"
        elif angled.split("/")[0] in MAY_INCLUDE:
            problem = 'use "" for our own headers'
        else:
            problem = None
        if problem:
            line = text.count("\n", 0, match.start(1 if quoted else 2)) + 1
            where = f"{path.relative_to(ROOT)}:{line}"
            found.append(f"{where}: #include of {quoted or angled}: {problem}")
    return found


def main() -> int:
    """Prints every wrong include; returns 1 if there is one."""
    files = sorted(path for path in (ROOT / "src").rglob("*") if path.suffix in SUFFIXES)
    if not files:
        print("check_includes: no files found in src", file=sys.stderr)
        return 1
    found = [line for path in files for line in problems(path)]
    print(*found, f"check_includes: {len(files)} files, {len(found)} problems", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
