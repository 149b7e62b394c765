"""Programs without values, for their timing: tiles in steps as the price list sees them, and random ones."""

from __future__ import annotations

import random
from dataclasses import replace

from accel_sim.program.isa import (
    Halt,
    Instruction,
    Load,
    Loops,
    Marker,
    Program,
    Store,
    Sync,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
)
from accel_sim.spec import DramSpec, MachineSpec
from accel_sim.spec_file import load_spec

BYTES_PER_CYCLE = 16
LANES = 16


def machine(latency_cycles: int, pipelined: bool, bytes_per_cycle: float = BYTES_PER_CYCLE) -> MachineSpec:
    """The default machine with a channel whose transfers last as many cycles as its bytes say, without bursts."""
    spec = load_spec("edge_16x16")
    return replace(spec, dram=DramSpec(bytes_per_cycle, latency_cycles, 1, pipelined))


def program_of(code: list[Instruction], markers: tuple[Marker, ...] = ()) -> Program:
    return Program(
        spec_hash=b"",
        columns=16,
        code=tuple(code),
        windows=(),
        outputs=(),
        sums=(),
        vectors=(VectorSpec(VectorFunction.COPY),),
        scales=(),
        tables=(),
        tensors=(),
        markers=markers,
        calls=(),
        constants=b"",
        constants_address=0,
        dram_bytes=0,
    )


def compute(cycles: int, wait: Token = Token.NONE, post: Token = Token.NONE) -> Vector:
    return Vector(0, 0, 0, 0, cycles * LANES, wait=wait, post=post)


def steps_code(
    load: list[int], work: list[int], store: list[int], buffers: int, on_channel: bool, empty_loads: bool = True
) -> list[Instruction]:
    """A layer of steps: cycles of data of each load (0: none), of the array, of each store (0: the tile goes on).

    ``empty_loads``: a step that loads nothing has a load of no bytes; else it has none, and no tokens for one.
    """
    steps, tiles = len(load), sum(cycles > 0 for cycles in store)
    has_load = [empty_loads or cycles > 0 for cycles in load]
    code: list[Instruction] = []
    tile, begins = 0, True
    for s in range(steps):
        if has_load[s]:
            code.append(
                Load(
                    *(0, 0, Loops(load[s] * BYTES_PER_CYCLE)),
                    wait=Token.FREED if s >= buffers else Token.NONE,
                    post=Token.LOADED,
                )
            )
        wait = Token.LOADED if has_load[s] else Token.NONE
        if begins and tile >= buffers:
            wait |= Token.STORED
        post = Token.FREED if s + buffers < steps and has_load[s + buffers] else Token.NONE
        begins = store[s] > 0
        if begins:
            post |= Token.COMPUTED
        code.append(compute(work[s], wait, post))
        if begins:
            post = Token.STORED if tile + buffers < tiles else Token.NONE
            size = store[s] * (BYTES_PER_CYCLE if on_channel else 1)
            lanes = BYTES_PER_CYCLE if on_channel else 1
            code.append(
                Store(0, 0, Loops(size), lanes=lanes, to_scratchpad=not on_channel, wait=Token.COMPUTED, post=post)
            )
            tile += 1
    return code


def random_code(seed: int, length: int, most_cycles: int = 9, least_work_cycles: int = 0) -> list[Instruction]:
    """Instructions of all queues with any tokens that do not deadlock, a barrier now and then, and a Halt."""
    rng = random.Random(seed)
    code: list[Instruction] = [Sync(0)]
    while len(code) < length:
        code += _segment(rng, rng.randint(1, length), most_cycles, least_work_cycles)
        code.append(Sync(rng.randint(0, 2)))
    return [*code, Halt()]


def _segment(rng: random.Random, length: int, most_cycles: int, least_work_cycles: int) -> list[Instruction]:
    kinds = (Token.LOADED, Token.FREED, Token.COMPUTED, Token.STORED)
    posted, waited = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    plan: list[tuple[int, Token, Token, int, int]] = []
    for _ in range(length):
        queue = rng.randrange(3)
        may_wait = ((Token.FREED,), (Token.LOADED, Token.STORED), (Token.COMPUTED,))[queue]
        may_post = ((Token.LOADED,), (Token.FREED, Token.COMPUTED), (Token.STORED,))[queue]
        wait = post = Token.NONE
        for kind in may_wait:
            if posted[kind] > waited[kind] and rng.random() < 0.7:
                wait |= kind
                waited[kind] += 1
        for kind in may_post:
            if rng.random() < 0.7:
                post |= kind
                posted[kind] += 1
        plan.append((queue, wait, post, rng.choice((0, 1, rng.randint(0, most_cycles))), rng.randint(1, 3)))
    used = dict.fromkeys(kinds, 0)
    code: list[Instruction] = []
    for queue, wait, post, cycles, parts in plan:
        for kind in kinds:  # what nobody waits for is not posted
            if kind in post:
                used[kind] += 1
                if used[kind] > waited[kind]:
                    post &= ~kind
        if queue == 1:
            code.append(compute(max(cycles, least_work_cycles), wait, post))
            continue
        local = queue == 2 and rng.random() < 0.3
        for part in range(parts):
            size = Loops(rng.choice((0, cycles * (1 if local else BYTES_PER_CYCLE), rng.randint(0, 40))))
            first, last = part == 0, part == parts - 1
            tokens = (wait if first else Token.NONE, post if last else Token.NONE)
            if queue == 0:
                code.append(Load(0, 0, size, chained=not first, wait=tokens[0], post=tokens[1]))
            else:
                code.append(
                    Store(0, 0, size, 1, to_scratchpad=local, chained=not first, wait=tokens[0], post=tokens[1])
                )
    return code
