# SPDX-License-Identifier: MIT
"""Looks for bytes that a target of fuzz_targets.py does not take.

python test/fuzz/python/fuzz.py TARGET FOLDER [--seconds N] [--seed N]

Begins with the files of the repository's corpus and of the folder, changes them, and adds to the
folder those that reach new lines. Ends at the first that fails, which is kept as failed-*.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from fuzz_targets import TARGETS, fuzz_one

if TYPE_CHECKING:
    from types import FrameType

CORPUS = Path(__file__).resolve().parent.parent / "corpus"
LONGEST = 1.0
MOST_BYTES = 4096
WORDS = (b"\0", b"\xff", b"-1", b"0", b"null", b"[", b"{", b'"', b"\n", b":", b"\x10", b"\x11")


class Coverage:
    """The steps from line to line that were seen in the package."""

    def __init__(self) -> None:
        self._seen: set[tuple[object, int, int]] = set()

    def run(self, name: str, data: bytes) -> bool:
        """Run a target; tell whether it took a new step."""
        before = len(self._seen)
        sys.settrace(self._enter)
        try:
            fuzz_one(name, data)
        finally:
            sys.settrace(None)
        return len(self._seen) > before

    def _enter(self, frame: FrameType, _event: str, _arg: object) -> object:
        if "mscclpp_ep" not in frame.f_code.co_filename:
            return None
        last = 0

        def step(inner: FrameType, _event: str, _arg: object) -> object:
            nonlocal last
            self._seen.add((inner.f_code, last, inner.f_lineno))
            last = inner.f_lineno
            return step

        return step


def change(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Return the data with some bytes changed, removed, doubled or taken from another input."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(found) + 1)
        end = min(len(found), at + chance.randrange(1, 9))
        match chance.randrange(6):
            case 0:
                found[at:end] = chance.randbytes(end - at)
            case 1:
                del found[at:end]
            case 2:
                found[at:at] = chance.choice(WORDS) * chance.choice((1, 1, 8, 500))
            case 3:
                other = chance.choice(others)
                begin = chance.randrange(len(other) + 1)
                found[at:end] = other[begin : begin + chance.randrange(64)]
            case 4:
                found[at:at] = found[at:end]
            case _ if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
    return bytes(found[:MOST_BYTES])


def fuzz(name: str, folder: Path, seconds: float, chance: random.Random) -> int:
    """Fuzz until the time is over; return the exit status."""
    coverage = Coverage()
    corpus = [b"", *(f.read_bytes() for d in (CORPUS / f"py_{name}", folder) for f in d.iterdir())]
    for data in corpus:
        coverage.run(name, data)
    begin = shown = time.monotonic()
    runs = 0
    while (now := time.monotonic()) < begin + seconds:
        data = change(chance.choice(corpus), corpus, chance)
        digest = hashlib.sha256(data).hexdigest()[:16]
        try:
            is_new = coverage.run(name, data)
        except Exception:
            traceback.print_exc()
            (folder / f"failed-{digest}").write_bytes(data)
            return 1
        if time.monotonic() - now > LONGEST:
            print(f"slow: {time.monotonic() - now:.1f} s", flush=True)
            (folder / f"failed-slow-{digest}").write_bytes(data)
        if is_new:
            corpus.append(data)
            (folder / digest).write_bytes(data)
        runs += 1
        if now - shown > 60:
            shown = now
            print(f"{name}: {runs} runs, {runs / (now - begin):.0f}/s, {len(corpus)}", flush=True)
    print(f"{name}: {runs} runs, {runs / seconds:.0f}/s, corpus {len(corpus)}", flush=True)
    return 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(arguments.seed)
    return fuzz(arguments.target, arguments.folder, arguments.seconds, chance)


if __name__ == "__main__":
    sys.exit(main())
