# SPDX-License-Identifier: MIT
"""Text to tokens: words and punctuation marks, numbered in order of appearance."""

import codecs
import itertools
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mscclpp_ep import _paths
from mscclpp_ep.cli import InputError

MOST_BYTES = 16 << 20
MOST_TOKENS = 4096
_TOKEN = re.compile(r"\w+|[^\w\s]")


def _read(path: Path) -> str:
    """Read a UTF-8 file, of a huge one only the beginning."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
        # Not final if the file was cut, which may be in the middle of a character.
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, len(data) < MOST_BYTES)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}. Convert it, for instance: iconv -f latin1 -t utf-8 {path}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_tokens(path: Path | None, count: int | None = None) -> npt.NDArray[np.int64]:
    """Return the tokens of a text.

    Args:
        path: a UTF-8 file; None is the text that ships with the package.
        count: how many tokens to return, for which the text is cut or repeated; None is the
            whole text, but `MOST_TOKENS` at most.

    Returns:
        A number a token, int64[count]: equal words have equal numbers, below the number of
        different words.

    Raises:
        InputError: if the file cannot be read, is not UTF-8 or holds no word.
    """
    found = _TOKEN.finditer(_paths.sample_text() if path is None else _read(path))
    words = [match[0] for match in itertools.islice(found, count or MOST_TOKENS)]
    if not words:
        raise InputError(f"{path} holds no words: give a text with at least one")
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
    return ids if count is None else np.resize(ids, count)
