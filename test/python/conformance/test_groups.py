# SPDX-License-Identifier: MIT
"""Several buffers a process, several groups a host, and how ranks find each other."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from harness.programs import groups

few = pytest.mark.ranks(1, 3)


def test_group_gathers(ranks):
    ranks.check(groups.gathers)


@few
def test_any_object_with_four_members_is_a_group(ranks, seed):
    ranks.check(groups.homemade_group, seed)


@few
def test_attributes(ranks):
    ranks.check(groups.attributes)


@few
def test_buffer_is_a_context_manager(ranks, seed):
    ranks.check(groups.used_as_context_manager, seed)


@few
def test_buffers_left_to_the_collector(ranks, seed):
    ranks.check(groups.left_to_the_collector, seed)


@pytest.mark.ranks(1, 2, 4)
def test_many_buffers_of_a_process(ranks, seed):
    ranks.check(groups.many_buffers, seed)


@pytest.mark.ranks(2, 3, 8)
def test_several_groups_of_a_host(ranks, seed):
    ranks.check(groups.groups_of_a_host, seed)


@few
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_worker_threads(ranks, num_threads, seed):
    ranks.check(groups.threads_a_rank, num_threads, seed)


@few
def test_one_group_for_several_buffers(ranks, seed):
    ranks.check(groups.made_again, seed)


@pytest.mark.ranks(16, modes=("thread",))
def test_many_more_ranks_than_cores(ranks, seed):
    ranks.check(groups.threads_a_rank, 2, seed)


@pytest.mark.ranks(2, 4)
def test_ranks_with_different_options(ranks, seed):
    ranks.check(groups.options_differ, seed)


def test_files_of_an_earlier_run_do_no_harm(doomed, tmp_path, seed):
    """Rank 0 of the first run is killed while it waits; the second run meets at the same path."""
    path = str(tmp_path / "meeting")
    first, second = doomed(2), doomed(2)
    run = first.start(groups.by_path, path, 1, seed)
    assert (run.report(0), run.report(1)) == ("meeting", "waiting")
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert time.monotonic() < deadline, "rank 0 left no file to find it by"
    first.kill()
    run = second.start(groups.by_path, path, 1, seed)
    run.send(1)
    assert [str(o.failure) for o in run.result()] == ["None"] * 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def connected(port: int, timeout: float = 60.0) -> socket.socket:
    """A connection to a port that will be listened to soon."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "rank 0 does not listen"


def test_strangers_do_not_disturb_the_rendezvous(doomed, seed):
    """Some talk nonsense, one says nothing and stays, one goes away at once."""
    pool, port = doomed(3), free_port()
    run = pool.start(groups.by_environment, port, seed)
    with contextlib.ExitStack() as stack:
        nonsense = [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 100000, b"\x80\x04."]
        for words in [*nonsense, b"", b""]:
            stranger = stack.enter_context(connected(port))
            with contextlib.suppress(OSError):  # it may be refused before it has finished
                stranger.sendall(words)
        connected(port).close()
        run.send_all()
        assert [str(o.failure) for o in run.result()] == ["None"] * 3
