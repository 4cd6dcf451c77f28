# SPDX-License-Identifier: MIT
"""What fuzzers found to be worth keeping is parsed, or refused by one of the library's errors."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "fuzz" / "python"))

from fuzz_targets import TARGETS, fuzz_one

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"
# Far more than any input takes: machines may be busy.
LONGEST = 10
INPUTS = [(name, path) for name in TARGETS for path in sorted((CORPUS / f"py_{name}").iterdir())]


@pytest.mark.parametrize(("name", "path"), INPUTS, ids=[f"{n}-{p.name}" for n, p in INPUTS])
def test_corpus_is_parsed_or_refused(name: str, path: Path) -> None:
    begin = time.monotonic()
    fuzz_one(name, path.read_bytes())
    assert time.monotonic() - begin < LONGEST


def test_every_folder_of_the_corpus_has_a_target() -> None:
    folders = {path.name.removeprefix("py_") for path in CORPUS.glob("py_*")}
    assert folders == set(TARGETS)
