# SPDX-License-Identifier: MIT
"""Fixtures of every test: pools of ranks, and a seed that is printed when a test fails."""

from __future__ import annotations

import secrets
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.backend import BACKENDS
from harness.pool import Pool, Pools

SIZES = (1, 2, 3, 4, 8)
MODES = ("process", "thread")


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=sorted(BACKENDS),
        help="backend to run the conformance suite on; may be repeated (default: cpu)",
    )
    parser.addoption("--seed", type=int, help="seed of all random inputs (default: a fresh one)")


def pytest_configure(config):
    config.addinivalue_line("markers", "ranks(*sizes, modes=...): pools that a test runs on")
    config.addinivalue_line("markers", "cpu_only: not a test of other backends")
    config.addinivalue_line("markers", "gpu_only: not a test of the CPU")
    config.addinivalue_line("markers", "many_cases: what is beyond a sample of pools is `grid`")


def wanted_pools(item) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The numbers of ranks and the modes that a test runs on."""
    marker = item.get_closest_marker("ranks")
    sizes = (marker and marker.args) or SIZES
    return sizes, marker.kwargs.get("modes", MODES) if marker else MODES


def name_of(pool: tuple[int, str, str]) -> str:
    size, mode, backend = pool
    return f"{backend}-{mode}-{size}"


def size_class(size: int) -> int:
    """One rank, two or three, or more."""
    return min(size, 4) // 2


def is_in_sample(item, number: int) -> bool:
    """Whether the case of that number runs on the pool of this item by default.

    A case runs on one rank, on two or three, and on more: once each, in modes that alternate. Any
    four cases in a row run on all pools.
    """
    sizes, modes = wanted_pools(item)
    size, mode, _ = item.callspec.params["ranks"]
    alike = [other for other in sizes if size_class(other) == size_class(size)]
    turn = number + size_class(size)
    return (size, mode) == (alike[number // 2 % len(alike)], modes[turn % len(modes)])


def mark_grid(items) -> None:
    """Marks what tests of `many_cases` run on other pools than those of the sample."""
    tests: dict[str, dict[str, int]] = defaultdict(dict)  # the number of each case
    for item in items:
        if item.get_closest_marker("many_cases"):
            test, _, name = item.nodeid.partition("[")
            case = name.replace(name_of(item.callspec.params["ranks"]), "", 1)
            number = tests[test].setdefault(case, len(tests[test]))
            if not is_in_sample(item, number):
                item.add_marker(pytest.mark.grid)


def pytest_generate_tests(metafunc):
    """Runs a test that takes `ranks` on every backend, mode and number of ranks that it wants."""
    if "ranks" not in metafunc.fixturenames:
        return
    sizes, modes = wanted_pools(metafunc.definition)
    backends = metafunc.config.getoption("--backend") or ["cpu"]
    keys = [(size, mode, backend) for backend in backends for mode in modes for size in sizes]
    metafunc.parametrize("ranks", keys, ids=list(map(name_of, keys)), indirect=True)


def first_backend(config) -> str:
    return (config.getoption("--backend") or ["cpu"])[0]


def backend_of(item) -> str:
    """The backend of a test's ranks."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters["ranks"][2] if "ranks" in parameters else first_backend(item.config)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by the markers
def pytest_collection_modifyitems(config, items):
    mark_grid(items)
    for item in items:
        if {"ranks", "doomed"} & set(item.fixturenames):
            item.add_marker(pytest.mark.multirank)
    left_out = [
        i
        for i in items
        if i.get_closest_marker("gpu_only" if backend_of(i) == "cpu" else "cpu_only")
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def pools():
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(request, pools) -> Pool:
    """A pool of ranks, shared with other tests; a new one if the last test broke it."""
    return pools.get(*request.param)


@pytest.fixture
def doomed(request):
    """Makes pools of processes that a test may kill."""
    made = []

    def make(size: int) -> Pool:
        backend = first_backend(request.config)
        made.append(Pool(size, "process", backend, patient=True))
        return made[-1]

    yield make
    for pool in made:
        pool.broken = True
        pool.close()


@pytest.fixture
def seed(request) -> int:
    """A fresh seed; `pytest --seed N` repeats a failure."""
    chosen = request.config.getoption("--seed")
    value = secrets.randbits(32) if chosen is None else chosen
    print(f"\nseed: {value}")
    return value
