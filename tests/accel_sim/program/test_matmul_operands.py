"""Which bytes of a stored map a product is taken to read, against what its windows address."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from accel_sim.program.accesses import INDEX, WRITE, Accesses
from accel_sim.program.check_addresses import check_addresses
from accel_sim.program.code_order import Code
from accel_sim.program.isa import Dataflow, Halt, Matmul, Preload, Program, Window
from tests.accel_sim.program.sample_programs import EMPTY, SPEC, spec_hash
from tests.accel_sim.program.test_token_run import byte_set


def bytes_addressed(window: Window, columns: int, first: int, channels: int) -> tuple[set[int], set[int]]:
    """Bytes from the map's address on that taps read; and those of the same channels at all positions between."""
    read, between = set(), set()
    depth, height, width = window.extent
    positions = depth * height * width
    reached = set()
    for o, t in product(product(*map(range, window.out)), product(*map(range, window.kernel))):
        at = [
            o[axis] * window.strides[axis] + t[axis] * window.dilations[axis] + window.origin[axis] for axis in range(3)
        ]
        if all(0 <= at[axis] < window.extent[axis] for axis in range(3)):
            reached.add((at[0] * height + at[1]) * width + at[2])
    spanned = range(min(reached), max(reached) + 1) if reached else range(0)
    # Each axis for itself reaches at least as far as the positions that are read.
    for image, channel in product(range(window.images), range(first, first + channels)):
        block = channel // columns
        wide = min(columns, window.channels - block * columns)
        base = image * window.channels * positions + block * columns * positions + channel % columns
        read |= {base + at * wide for at in reached}
        between |= {base + at * wide for at in spanned}
    return read, between


def triple(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    return (int(rng.integers(low, high)), int(rng.integers(low, high)), int(rng.integers(low, high)))


def test_what_products_read() -> None:
    rng = np.random.default_rng(11)
    exact = 0
    for _ in range(120):
        channels = int(rng.integers(1, 50))
        first = int(rng.integers(0, channels))
        extent, kernel = triple(rng, 1, 4), triple(rng, 1, 3)
        window = Window(
            *(int(rng.integers(1, 3)), channels, extent, triple(rng, 1, 4), kernel, triple(rng, 1, 3)),
            *(triple(rng, 1, 3), triple(rng, -3, 2), 0, True),
        )
        some = int(rng.integers(1, channels - first + 1))
        base = 1000
        flow = Dataflow(int(rng.choice([0, 2])))
        matmul = Matmul(0, base, 0, 0, some, 1, first_channel=first, dataflow=flow)
        program: Program = replace(
            EMPTY, code=(Preload(), matmul, Halt()), windows=(window,), spec_hash=spec_hash(SPEC)
        )
        accesses = Accesses()
        check_addresses(program, SPEC, Code.of(program), accesses)
        table, _ = accesses.table(3)
        sets: dict[int, set[int]] = {0: set(), 1: set()}
        for row in table[table[:, WRITE] == 0].tolist():
            sets[row[INDEX]] |= byte_set(row[5], row[6], tuple(row[7:10]), tuple(row[10:13]))
        weights = set(range(int(np.prod(kernel)) * some))
        read, between = bytes_addressed(window, 16, first, some)
        found = {at - base for at in sets[1] - weights}
        assert not found or min(found) >= 0
        assert read <= found
        # No other channel's byte, and no position outside what the three axes span.
        columns = between | {at for at in found if at in between}
        exact += found == columns
        channels_found = {channel_of(at, window, 16) for at in found}
        assert channels_found <= set(range(first, first + some))
        early = {at - base for at in sets[0]} if flow == Dataflow.INPUT_STATIONARY else sets[0]
        assert early == (found if flow == Dataflow.INPUT_STATIONARY else weights)
    assert exact > 60


def channel_of(offset: int, window: Window, columns: int) -> int:
    positions = int(np.prod(window.extent))
    inside = offset % (window.channels * positions)
    block = inside // (columns * positions)
    wide = min(columns, window.channels - block * columns)
    return block * columns + (inside - block * columns * positions) % wide
