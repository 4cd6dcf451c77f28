# SPDX-License-Identifier: MIT
"""Operations before and after the low 32 bits of the epoch start again at zero."""

from __future__ import annotations

import pytest

from harness.programs import sequences


@pytest.mark.parametrize("first", [2**32 - 8, 2**31 - 8, 2**33 - 1], ids=hex)
def test_epoch_wraps(ranks, first, seed):
    ranks.check(sequences.across_epochs, first, seed)
