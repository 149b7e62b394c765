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
    """Bytes from the map's address on that taps read; and those of the same channels in the box around them."""
    height, width = window.extent[1:]
    positions = window.extent[0] * height * width
    reached = set()
    for o, t in product(product(*map(range, window.out)), product(*map(range, window.kernel))):
        at = tuple(
            o[axis] * window.strides[axis] + t[axis] * window.dilations[axis] + window.origin[axis] for axis in range(3)
        )
        if all(0 <= at[axis] < window.extent[axis] for axis in range(3)):
            reached.add(at)
    # Of each axis for itself: what its taps reach inside the map, padding left out, and what lies between.
    ranges = []
    for axis in range(3):
        low = max(window.origin[axis], 0)
        last = (window.out[axis] - 1) * window.strides[axis] + (window.kernel[axis] - 1) * window.dilations[axis]
        ranges.append(range(low, min(last + window.origin[axis], window.extent[axis] - 1) + 1))
    read, around = set(), set()
    for image, channel in product(range(window.images), range(first, first + channels)):
        block = channel // columns
        wide = min(columns, window.channels - block * columns)
        base = image * window.channels * positions + block * columns * positions + channel % columns
        read |= {base + ((d * height + h) * width + w) * wide for d, h, w in reached}
        around |= {base + ((d * height + h) * width + w) * wide for d, h, w in product(*ranges)}
    return read, around


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
            sets[row[INDEX]] |= byte_set(row[5], row[6], tuple(row[7:12]), tuple(row[12:17]))
        weights = set(range(int(np.prod(kernel)) * some))
        read, around = bytes_addressed(window, 16, first, some)
        found = {at - base for at in sets[1] - weights}
        assert read <= found == around
        exact += read == around
        early = {at - base for at in sets[0]} if flow == Dataflow.INPUT_STATIONARY else sets[0]
        assert early == (found if flow == Dataflow.INPUT_STATIONARY else weights)
    assert exact > 50
