# SPDX-License-Identifier: MIT
"""Results outlive later calls, whoever drops what when, with the arena full and not."""

from __future__ import annotations

import pytest

from harness.programs import lifetime

# Results that the arena has room for. Those beyond are received in the landing block, and copied.
room = pytest.mark.parametrize("results", [lifetime.NO_LIMIT, 3], ids=["roomy", "full"])
several = pytest.mark.ranks(2, 3, 8)
few = pytest.mark.ranks(1, 3)


@room
def test_results_survive_later_calls(ranks, results, seed):
    ranks.check(lifetime.results_survive, results, seed)


@room
@several
def test_sixty_layers_kept_alive(ranks, results, seed):
    ranks.check(lifetime.sixty_layers, results, seed)


@room
@several
def test_result_dropped_while_read(ranks, results, seed):
    ranks.check(lifetime.dropped_while_read, results, seed)


@room
@several
def test_result_dropped_in_flight(ranks, results, seed):
    ranks.check(lifetime.dropped_in_flight, results, seed)


@few
def test_results_dropped_by_other_threads(ranks, seed):
    ranks.check(lifetime.dropped_by_other_threads, seed)


@several
def test_one_rank_without_room(ranks, seed):
    ranks.check(lifetime.uneven_room, seed)


@room
@few
def test_memory_is_reused(ranks, results, seed):
    ranks.check(lifetime.memory_is_reused, results, seed)


@few
def test_rows_arrive_in_place(ranks, seed):
    ranks.check(lifetime.straight_rows_are_counted, seed)


@few
def test_handle_pins_no_rows(ranks, seed):
    ranks.check(lifetime.handle_pins_no_rows, seed)


@pytest.mark.parametrize("reverse", [False, True], ids=["in-order", "reversed"])
def test_two_handles_alive(ranks, reverse, seed):
    ranks.check(lifetime.two_handles, reverse, seed)


@room
@few
def test_results_outlive_the_buffer(ranks, results, seed):
    ranks.check(lifetime.alive_after_destroy, results, seed)


@few
def test_frozen_arena_keeps_its_size(ranks, seed):
    ranks.check(lifetime.frozen, seed)


@pytest.mark.ranks(2, 3)
def test_frozen_refuses_what_cannot_land(ranks, seed):
    ranks.check(lifetime.frozen_refuses_what_cannot_land, seed)


@pytest.mark.ranks(2, 3)
def test_operation_larger_than_the_arena_may_be(ranks, seed):
    ranks.check(lifetime.too_large_for_the_arena, seed)


@few
def test_more_memory_than_there_is(ranks, seed):
    ranks.check(lifetime.too_large_for_the_machine, seed)


@pytest.mark.ranks(2, 4)
def test_combine_pulls_from_the_arena(ranks, seed):
    ranks.check(lifetime.pulled_or_staged, seed)


@few
def test_empty(ranks, seed):
    ranks.check(lifetime.empty_gives_arena_memory, seed)
