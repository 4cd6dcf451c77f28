# SPDX-License-Identifier: MIT
"""How long results live, and where their memory comes from and goes."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass

import numpy as np

import mscclpp_ep as ep
from harness import steps
from harness.cases import Case, World, world_of

TOKENS = 240  # of all ranks together, about
NO_LIMIT = 0


def layer_of(context, **changes) -> Case:
    """Unequal numbers of tokens, some 100 KiB of rows for each rank."""
    most = TOKENS // context.size
    tokens = (most, most * 2 // 3, most * 5 // 6)
    return Case("layer", tokens, hidden=512, experts=16, topk=6).but(**changes)


def result_bytes(world: World) -> int:
    """What one dispatch takes of the arena of the rank that receives most, and a little more."""
    case = world.case
    row = case.hidden * world.sent[0].x.itemsize + case.topk * 12 + 64
    return row * max(len(route) for route in world.full_routes) + (1 << 16)


@dataclass
class Layer:
    """A dispatch and its combine, whose results are kept."""

    world: World
    dispatched: steps.Dispatched
    combined: tuple

    @classmethod
    def run(cls, context, buffer, seed: int, case: Case | None = None) -> Layer:
        world = world_of(case or layer_of(context), seed, context.size)
        result = steps.dispatch(context, buffer, world)
        return cls(world, result, steps.combine(context, buffer, world, result.handle))

    def verify(self, context) -> None:
        steps.verify_dispatch(context, self.world, self.dispatched)
        steps.verify_combine(context, self.world, self.combined)


def limited(context, results: int, seed: int, case: Case | None = None, **options):
    """A buffer whose arena holds `results` results of a case; or any number of them."""
    room = result_bytes(world_of(case or layer_of(context), seed, context.size))
    return context.buffer(max_arena_bytes=results * room, **options)


def results_survive(context, results: int, seed: int) -> None:
    """Every result is what it was, after all later calls, with room for it in the arena or not."""
    buffer = limited(context, results, seed)
    layers = [Layer.run(context, buffer, seed + turn) for turn in range(10)]
    for turn in range(5):
        Layer.run(context, buffer, seed + 100 + turn)
    for layer in reversed(layers):
        layer.verify(context)
    stats = buffer.stats()
    assert stats.straight_rows > 0
    # Rows of a rank that is alone need no landing block: it writes to where they stay.
    assert (stats.landed_rows > 0) == (results != NO_LIMIT and context.size > 1)
    if results != NO_LIMIT:
        assert stats.held_bytes <= results * result_bytes(layers[0].world)


def straight_rows_are_counted(context, seed: int) -> None:
    """With room in the arena every row arrives in place."""
    buffer = context.buffer()
    before = buffer.stats()
    layer = Layer.run(context, buffer, seed)
    after = buffer.stats()
    rows = len(layer.world.routes[context.rank])
    assert after.straight_rows - before.straight_rows == rows
    assert after.landed_rows == before.landed_rows
    assert after.held_bytes - before.held_bytes >= rows * layer.world.case.hidden * 2


def sixty_layers(context, results: int, seed: int, checked: bool = False) -> None:
    """Training: each layer's result lives until the backward pass has come back to it."""
    case = layer_of(context, hidden=256)
    buffer = limited(context, results, seed, case, integrity_check=checked)
    layers = [Layer.run(context, buffer, seed + turn, case) for turn in range(60)]
    while layers:
        layer = layers.pop()
        layer.verify(context)
        world, handle = layer.world, layer.dispatched.handle
        gradient = steps.dispatch_again(context, buffer, world, handle, turn=1)
        steps.verify_rows(context, world, gradient, turn=1)
        returned = steps.combine(context, buffer, world, handle, turn=1)
        steps.verify_combine(context, world, returned, turn=1)


class Reader(threading.Thread):
    """Reads a view of a result over and over, until it is told to stop."""

    def __init__(self, context, view, expected: np.ndarray) -> None:
        super().__init__()
        self.host, self.view, self.expected = context.backend.host, view, expected
        self.enough = threading.Event()
        self.reads, self.error = 0, None

    def run(self) -> None:
        try:
            while not self.enough.wait(0.001) or self.reads == 0:
                steps.same_bits(
                    self.host(self.view), self.expected, "rows that are still being read"
                )
                self.reads += 1
        except AssertionError as error:
            self.error = error

    def finish(self) -> None:
        self.enough.set()
        self.join()
        self.view = None
        if self.error:
            raise self.error


def dropped_while_read(context, results: int, seed: int) -> None:
    """The caller drops a result; another thread still reads a part of it during later calls."""
    buffer = limited(context, results, seed)
    readers = []
    for turn in range(3):
        layer = Layer.run(context, buffer, seed + turn)
        expected = layer.world.received(context.rank)[0][1:, 8:]
        readers.append(Reader(context, layer.dispatched.x[1:, 8:], expected))
        readers[-1].start()
        del layer
    for turn in range(12):
        Layer.run(context, buffer, seed + 50 + turn).verify(context)
    for reader in readers:
        reader.finish()


def dropped_in_flight(context, results: int, seed: int) -> None:
    """The only reference to rows is the argument of the call that peers read them for."""
    case = layer_of(context, source="received", bias=1)
    buffer = limited(context, results, seed, case)
    for turn in range(8):
        world = world_of(case, seed + turn, context.size)
        held = steps.dispatch(context, buffer, world)
        handle, box = held.handle, [held.x]
        del held
        returned = steps.combine(context, buffer, world, handle, rows=box.pop())
        steps.verify_combine(context, world, returned)
        again = buffer.dispatch(returned[0], handle=handle)[0]
        expected = [world.combined(rank) for rank in range(context.size)]
        del returned
        wanted = world.routes[context.rank].gather(expected)
        steps.same_bits(context.backend.host(again), wanted, "recv_x of combined rows")


def dropped_by_other_threads(context, seed: int) -> None:
    """Results die in other threads, and in cycles that the garbage collector breaks."""
    buffer = context.buffer()
    Layer.run(context, buffer, seed)
    before = buffer.stats().held_bytes
    for turn in range(8):
        cycle = [Layer.run(context, buffer, seed + turn)]
        cycle.append(cycle)
        thread = threading.Thread(target=gc.collect if turn % 2 else cycle.clear)
        del cycle
        thread.start()
        Layer.run(context, buffer, seed + 50 + turn).verify(context)
        thread.join()
        del thread
    gc.collect()
    Layer.run(context, buffer, seed)
    assert buffer.stats().held_bytes == before


def uneven_room(context, seed: int) -> None:
    """Rank 0 keeps all its results in an arena for two; the others keep none, and have room."""
    poor = context.rank == 0
    buffer = limited(context, 2 if poor else NO_LIMIT, seed)
    layers = []
    for turn in range(8):
        layer = Layer.run(context, buffer, seed + turn)
        layer.verify(context)
        layers += [layer] if poor else []
    for layer in layers:
        layer.verify(context)
    assert (buffer.stats().landed_rows > 0) == poor


def memory_is_reused(context, results: int, seed: int) -> None:
    """Neither the arena nor the pool grows once every result has found its place."""
    buffer = limited(context, results, seed)
    sizes = []
    for turn in range(40):
        layers = [Layer.run(context, buffer, seed + depth) for depth in range(4)]
        layers[turn % 4].verify(context)
        del layers
        sizes.append((buffer.stats().arena_bytes, buffer.stats().pooled_bytes))
    assert sizes[20:] == [sizes[-1]] * 20, sizes


def handle_pins_no_rows(context, seed: int) -> None:
    """A handle kept for the backward pass keeps the rows of its dispatch from nobody."""
    buffer = context.buffer()
    Layer.run(context, buffer, seed)
    before = buffer.stats().held_bytes
    layer = Layer.run(context, buffer, seed)
    world, handle = layer.world, layer.dispatched.handle
    rows = len(world.routes[context.rank]) * world.case.hidden * 2
    assert buffer.stats().held_bytes >= before + rows
    del layer
    Layer.run(context, buffer, seed + 1)
    assert buffer.stats().held_bytes < before + rows // 8
    gradient = steps.dispatch_again(context, buffer, world, handle, turn=1)
    steps.verify_rows(context, world, gradient, turn=1)


def two_handles(context, reverse: bool, seed: int) -> None:
    """Two dispatches, then their combines, in either order."""
    buffer = context.standing()
    steps.soil(context, buffer, seed)
    cases = [Case(bias=1), Case(tokens=(7, 0, 33), hidden=129, experts=5, topk=2, bias=2)]
    worlds = [world_of(case, seed, context.size) for case in cases]
    pairs = [(world, steps.dispatch(context, buffer, world)) for world in worlds]
    for turn, (world, result) in enumerate(reversed(pairs) if reverse else pairs):
        returned = steps.combine(context, buffer, world, result.handle, turn)
        steps.verify_combine(context, world, returned, turn)
        steps.verify_dispatch(context, world, result)


def alive_after_destroy(context, results: int, seed: int) -> None:
    """Results outlive their buffer; a destroyed buffer only says that it is destroyed."""
    buffer = limited(context, results, seed)
    layers = [Layer.run(context, buffer, seed + turn) for turn in range(4)]
    spare = buffer.empty((16, 3), context.backend.dtype(np.float32))
    context.backend.write(spare, context.rank)
    buffer.destroy()
    buffer.destroy()
    steps.raised(ep.Error, steps.dispatch, context, buffer, layers[0].world)
    context.opened.clear()
    del buffer
    gc.collect()
    other = context.standing()
    steps.soil(context, other, seed)
    for layer in layers:
        layer.verify(context)
    assert (context.backend.host(spare) == context.rank).all()


def frozen(context, seed: int, checked: bool = False) -> None:
    """After freeze() the arena keeps its size: results that find no room in it are copied out."""
    buffer = limited(context, 3, seed, integrity_check=checked)
    for turn in range(2):
        Layer.run(context, buffer, seed + turn)
    buffer.freeze()
    size = buffer.stats().arena_bytes
    layers = [Layer.run(context, buffer, seed + turn % 2) for turn in range(10)]
    assert buffer.stats().arena_bytes == size
    assert (buffer.stats().landed_rows > 0) == (context.size > 1)
    for layer in layers:
        layer.verify(context)


def flood(context, buffer, rows: int, hidden: int) -> tuple:
    """A dispatch of `rows` rows of every rank to rank 0; no page of the input is touched."""
    in_rank = np.zeros((rows, context.size), bool)
    in_rank[:, 0] = True
    counts = in_rank.sum(0, dtype=np.int32)
    array = context.backend.array
    return buffer.dispatch(
        array(np.zeros((rows, hidden), np.uint8)),
        num_tokens_per_rank=array(counts),
        is_token_in_rank=array(in_rank),
        num_tokens_per_expert=array(counts),
    )


def expect_flood_refused(context, buffer, needed: int, hidden: int = 4096) -> None:
    """An operation that needs more than rank 0 may take is refused by it, with the size."""
    rows = -(-needed // (hidden * context.size))
    if context.rank == 0:
        message = str(steps.raised(ep.InvalidArgument, flood, context, buffer, rows, hidden))
        assert steps.largest_size(message) >= rows * hidden * context.size, message
    else:
        message = str(steps.raised(ep.Error, flood, context, buffer, rows, hidden))
        assert steps.names_rank(message, 0), message


def frozen_refuses_what_cannot_land(context, seed: int) -> None:
    """Frozen, an operation that neither arena nor landing block holds is an error on all ranks."""
    group = context.group()
    world = world_of(layer_of(context), seed, context.size)
    buffer = context.buffer(group, max_arena_bytes=16 * result_bytes(world))
    layers = [Layer.run(context, buffer, seed + turn) for turn in range(25)]
    buffer.freeze()
    landing = [int(size) for size in group.all_gather(str(buffer.stats().landing_bytes).encode())]
    assert min(landing) > 0
    expect_flood_refused(context, buffer, 2 * max(landing))
    while layers:
        layers.pop().verify(context)
    Layer.run(context, buffer, seed).verify(context)


def too_large_for_the_arena(context, seed: int) -> None:
    """An operation beyond `max_arena_bytes` is refused; smaller ones go on."""
    limit = 4 << 20
    buffer = context.buffer(max_arena_bytes=limit)
    steps.round_trip(context, buffer, Case(), seed)
    expect_flood_refused(context, buffer, 2 * limit)
    steps.round_trip(context, buffer, Case(), seed)


def too_large_for_the_machine(context, seed: int) -> None:
    """Memory that no machine has is refused with its size, before it is asked for."""
    buffer, wanted = context.standing(), 1 << 46
    message = str(steps.raised(ep.Error, buffer.empty, (wanted,), context.backend.dtype(np.uint8)))
    assert steps.largest_size(message) >= wanted, message
    steps.round_trip(context, buffer, Case(), seed)


def pulled_or_staged(context, seed: int) -> None:
    """Rows in arena memory are read where they are; ordinary ones are copied for the peers."""
    buffer = context.buffer()
    world = world_of(layer_of(context, source="arena"), seed, context.size)
    plain = world_of(layer_of(context), seed, context.size)
    handle = steps.dispatch(context, buffer, world).handle
    before = buffer.stats()
    steps.combine(context, buffer, world, handle)
    between = buffer.stats()
    steps.combine(context, buffer, plain, handle)
    after = buffer.stats()
    assert between.pulled_rows > before.pulled_rows
    assert between.staged_rows == before.staged_rows
    assert after.staged_rows > between.staged_rows
    assert after.pulled_rows == between.pulled_rows


def empty_gives_arena_memory(context, seed: int) -> None:
    """`empty` gives writable memory of its own, of any shape and dtype; it does not overlap."""
    buffer = context.standing()
    steps.soil(context, buffer, seed)
    shapes = [(0, 8), (5, 7), (3, 4, 2), (129,)]
    dtypes = [np.float32, np.uint8, world_of(Case(), seed, 1).sent[0].x.dtype, np.int64]
    own = context.backend.dtype
    tensors = [buffer.empty(shape, own(dtype)) for shape in shapes for dtype in dtypes]
    wanted = [(shape, np.dtype(dtype)) for shape in shapes for dtype in dtypes]
    hosts = [context.backend.host(tensor) for tensor in tensors]
    assert [(h.shape, h.dtype) for h in hosts] == wanted
    for number, tensor in enumerate(tensors):
        context.backend.write(tensor, number)
    hosts = [context.backend.host(tensor) for tensor in tensors]
    assert all((host == number).all() for number, host in enumerate(hosts))
