# SPDX-License-Identifier: MIT
"""Names, arguments, defaults and sizes that callers of `deep_ep` rely on."""

from __future__ import annotations

import pytest

from harness.programs import api

alone = pytest.mark.ranks(1, modes=("process",))


@alone
@pytest.mark.parametrize("name", list(api.SIGNATURES))
def test_arguments_and_defaults(ranks, name):
    ranks.check(api.same_signature, name)


@alone
@pytest.mark.parametrize("program", api.SMALL_PROGRAMS, ids=lambda program: program.__name__)
def test_api(ranks, program):
    ranks.check(program)


@alone
@pytest.mark.cpu_only
@pytest.mark.parametrize("program", api.CPU_PROGRAMS, ids=lambda program: program.__name__)
def test_api_on_the_cpu(ranks, program):
    ranks.check(program)
