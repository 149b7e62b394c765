"""Tokens and races against brute force: graphs of begins and ends, and sets of bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from accel_sim.program.accesses import UNDECIDED, Accesses, common_byte
from accel_sim.program.check import check_program
from accel_sim.program.code_order import Code
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import (
    Halt,
    Instruction,
    Load,
    Loops,
    Marker,
    Program,
    Space,
    Store,
    Sync,
    Tensor,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
)
from accel_sim.program.token_run import run_tokens
from tests.accel_sim.program.sample_programs import COMPUTED, EMPTY, FREED, LOADED, SPEC, STORED

NONE = Token.NONE
WAITS = {Load: (FREED,), Vector: (LOADED, STORED), Store: (COMPUTED,)}
POSTS = {Load: (LOADED,), Vector: (FREED, COMPUTED), Store: (STORED,)}
QUEUE = {Load: 0, Vector: 1, Store: 2}
MARKERS = (Marker("layer", "Conv"),)
KINDS = (LOADED, FREED, COMPUTED, STORED)


def lane(entry: Instruction) -> int:
    return 3 if isinstance(entry, Store) and entry.to_scratchpad else QUEUE[type(entry)]


def some_instruction(rng: np.random.Generator) -> Instruction:
    kind = rng.integers(4)
    if kind == 0:
        return Load(0, 0, Loops(1))
    if kind == 1:
        return Vector(0, 0, 0, 1, 1)
    return Store(0, 0, Loops(1), lanes=1, to_scratchpad=bool(kind == 3))


def random_code(rng: np.random.Generator, balanced: bool) -> tuple[Instruction, ...]:
    """Random tokens; ``balanced``: in program order each is posted before it is waited for, and none is left over."""
    code: list[Instruction] = []
    there = dict.fromkeys(KINDS, 0)

    def close() -> None:
        takers = {LOADED: Vector(0, 0, 0, 1, 1), STORED: Vector(0, 0, 0, 1, 1), FREED: Load(0, 0, Loops(1))}
        for kind in KINDS:
            for _ in range(there[kind]):
                entry = takers.get(kind, Store(0, 0, Loops(1), lanes=1))
                code.append(replace(entry, wait=kind))
            there[kind] = 0

    for _ in range(rng.integers(1, 14)):
        if rng.random() < 0.08:
            if balanced:
                close()
            code.append(Sync(0))
            continue
        entry = some_instruction(rng)
        wait, post = NONE, NONE
        for kind in WAITS[type(entry)]:
            if rng.random() < 0.4 and (there[kind] > 0 or not balanced):
                wait |= kind
                there[kind] -= 1
        for kind in POSTS[type(entry)]:
            if rng.random() < 0.45:
                post |= kind
                there[kind] += 1
        code.append(replace(entry, wait=wait, post=post))  # type: ignore[type-var]
    if balanced:
        close()
    return (*code, Halt())


def reference(code: tuple[Instruction, ...], rng: np.random.Generator) -> str:
    """Runs queues in random order, one instruction at a time: "ended", "hangs", or "left over"."""
    begin = 0
    for end, barrier in enumerate(code):
        if not isinstance(barrier, Sync | Halt):
            continue
        queues: list[list[Instruction]] = [[], [], []]
        for entry in code[begin:end]:
            queues[QUEUE[type(entry)]].append(entry)
        tokens = dict.fromkeys(KINDS, 0)
        while any(queues):
            ready = [q for q in queues if q and all(tokens[kind] > 0 for kind in KINDS if kind & q[0].wait)]  # type: ignore[union-attr]
            if not ready:
                return "hangs"
            entry = ready[rng.integers(len(ready))].pop(0)
            for kind in KINDS:
                tokens[kind] += bool(kind & entry.post) - bool(kind & entry.wait)  # type: ignore[union-attr]
        if any(tokens.values()):
            return "left over"
        begin = end + 1
    return "ended"


def surely_ended(code: tuple[Instruction, ...]) -> np.ndarray:
    """(i, j): instruction j has ended when i begins, by the transitive closure of all that is known of begins and ends.

    Node 2 i is the begin of instruction i, 2 i + 1 its end.
    """
    count = len(code)
    before = np.eye(2 * count, dtype=bool)
    posts: dict[Token, list[int]] = {kind: [] for kind in KINDS}
    waits: dict[Token, list[int]] = {kind: [] for kind in KINDS}
    for i, entry in enumerate(code):
        before[2 * i, 2 * i + 1] = True
        if isinstance(entry, Sync | Halt):
            for j in range(count):
                if j < i:
                    before[2 * j + 1, 2 * i] = True
                elif j > i:
                    before[2 * i + 1, 2 * j] = True
            continue
        for kind in KINDS:
            if kind & entry.post:  # type: ignore[union-attr]
                posts[kind].append(i)
            if kind & entry.wait:  # type: ignore[union-attr]
                waits[kind].append(i)
        for j in range(i):
            other = code[j]
            if isinstance(other, Sync | Halt):
                continue
            if QUEUE[type(other)] == QUEUE[type(entry)]:
                before[2 * j, 2 * i] = True
            if lane(other) == lane(entry):
                before[2 * j + 1, 2 * i + 1] = True
                if lane(entry) == 1:
                    before[2 * j + 1, 2 * i] = True
    for kind in KINDS:
        for i, j in zip(posts[kind], waits[kind], strict=True):
            before[2 * i + 1, 2 * j] = True
    for k in range(2 * count):
        before |= before[:, k, None] & before[None, k]
    return before[1::2, ::2].T


def program(code: tuple[Instruction, ...]) -> Program:
    return replace(EMPTY, code=code)


def verdict(code: tuple[Instruction, ...]) -> str:
    try:
        run_tokens(Code.of(program(code)))
    except ProgramError as error:
        text = str(error)
        assert error.section == "code" and error.index is not None
        if "waits for ever" in text:
            assert code[error.index].wait  # type: ignore[union-attr]
            return "hangs"
        assert isinstance(code[error.index], Sync | Halt) and "left over" in text
        return "left over"
    return "ended"


def test_deadlocks_and_left_overs() -> None:
    rng = np.random.default_rng(7)
    seen: dict[str, int] = {}
    for case in range(900):
        code = random_code(rng, balanced=case % 3 == 0)
        expected = reference(code, rng)
        assert verdict(code) == expected, code
        seen[expected] = seen.get(expected, 0) + 1
    assert min(seen[name] for name in ("ended", "hangs", "left over")) > 60, seen


def test_what_has_ended() -> None:
    rng = np.random.default_rng(8)
    known = 0
    for _ in range(400):
        code = random_code(rng, balanced=True)
        ended = run_tokens(Code.of(program(code)))
        closure = surely_ended(code)
        for i, entry in enumerate(code):
            if isinstance(entry, Sync | Halt):
                continue
            for which in range(4):
                members = [
                    j for j, other in enumerate(code) if not isinstance(other, Sync | Halt) and lane(other) == which
                ]
                if which == lane(entry) != 1:
                    continue  # of a transfer's own lane nothing is asked
                expected = sum(bool(closure[i, j]) for j in members)
                assert ended[i, which] == expected, (code, i, which)
                known += expected
    assert known > 1000


def byte_set(base: int, run: int, counts: tuple[int, ...], strides: tuple[int, ...]) -> set[int]:
    found: set[int] = set()
    for steps in product(*map(range, counts)):
        begin = base + sum(step * stride for step, stride in zip(steps, strides, strict=True))
        found.update(range(begin, begin + run))
    return found


def access(base: int, run: int, counts: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    collected = Accesses()
    whole = [np.array([value], np.int64) for value in (0, base, run)]
    collected.add(whole[0], 0, False, whole[1], whole[2], np.array([counts]), np.array([strides]))
    return collected.parts[0][0]


def random_set(rng: np.random.Generator) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    loops = int(rng.integers(3, 6))
    counts = tuple(int(v) for v in rng.integers(1, 5 if loops == 3 else 3, loops))
    strides = tuple(int(v) for v in rng.integers(-20, 21, loops))
    return int(rng.integers(0, 80)), int(rng.integers(1, 5)), counts, strides


def test_common_bytes() -> None:
    rng = np.random.default_rng(9)
    work = np.zeros(1, np.int64)
    outcomes = [0, 0]
    for _ in range(2500):
        a, b = random_set(rng), random_set(rng)
        common = byte_set(*a) & byte_set(*b)
        found = common_byte(access(*a), access(*b), work)
        assert found in common if common else found == -1, (a, b)
        outcomes[bool(common)] += 1
        one = access(*a)
        assert (one[3], one[4]) == (min(byte_set(*a)), max(byte_set(*a)) + 1)
    assert min(outcomes) > 300


def test_a_comparison_that_takes_too_long_is_given_up() -> None:
    work = np.zeros(1, np.int64)
    many = (1 << 31) - 1
    even, odd = (0, 1, (many,) * 3, (2, 2, 2)), (1, 1, (many,) * 3, (2, 2, 2))
    assert common_byte(access(*even), access(*odd), work) == UNDECIDED
    assert work[0] <= (1 << 20) + 1


def random_loops(rng: np.random.Generator) -> Loops:
    count = int(rng.integers(1, 4))
    run = int(rng.integers(1, 5))
    near = run + int(rng.integers(0, 6))
    return Loops(run, (1, 1, count), (0, 0, run), (0, 0, near)) if count > 1 else Loops(run)


def placed(entry: Instruction, rng: np.random.Generator) -> Instruction:
    """``entry`` with addresses that often meet."""
    a, b = int(rng.integers(0, 60)), int(rng.integers(0, 60))
    if isinstance(entry, Load):
        space = Space(int(rng.integers(2)))
        return replace(entry, dram_address=a, chip_address=b, loops=random_loops(rng), space=space)
    if isinstance(entry, Vector):
        return replace(entry, a_address=a, output_address=b, elements=int(rng.integers(1, 8)))
    if isinstance(entry, Store):
        return replace(entry, address=a, accumulator_address=b, loops=random_loops(rng))
    return entry


def touched(entry: Instruction) -> list[tuple[str, bool, set[int]]]:
    """(memory, written, bytes) of what an instruction uses."""
    if isinstance(entry, Vector):
        return [
            ("scratchpad", False, set(range(entry.a_address, entry.a_address + entry.elements))),
            ("accumulator memory", True, set(range(entry.output_address, entry.output_address + entry.elements))),
        ]
    assert isinstance(entry, Load | Store)
    loops = entry.loops
    if isinstance(entry, Load):
        memory = "scratchpad" if entry.space == Space.SCRATCHPAD else "accumulator memory"
        return [
            ("DRAM", False, byte_set(entry.dram_address, loops.run, loops.counts, loops.dram_strides)),
            (memory, True, byte_set(entry.chip_address, loops.run, loops.counts, loops.chip_strides)),
        ]
    target = "scratchpad" if entry.to_scratchpad else "DRAM"
    return [
        ("accumulator memory", False, byte_set(entry.accumulator_address, loops.run, loops.counts, loops.chip_strides)),
        (target, True, byte_set(entry.address, loops.run, loops.counts, loops.dram_strides)),
    ]


def store_goes_first(code: tuple[Instruction, ...], closure: np.ndarray, i: int, j: int) -> bool:
    """Of a load and a store into DRAM: whether the store waits for no product that the load has not waited for."""
    load, store = (i, j) if lane(code[i]) == 0 else (j, i)
    if (lane(code[load]), lane(code[store])) != (0, 2):
        return False
    products = [at for at, entry in enumerate(code) if not isinstance(entry, Sync | Halt) and lane(entry) == 1]
    return all(closure[load, at] or not closure[store, at] for at in products)


@pytest.mark.parametrize("seed", range(4))
def test_races(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes = [0, 0]
    for _ in range(150):
        code = tuple(placed(entry, rng) for entry in random_code(rng, balanced=True))
        closure = surely_ended(code)
        races = set()
        for i, j in product(range(len(code)), repeat=2):
            one, two = code[i], code[j]
            if i >= j or isinstance(one, Sync | Halt) or isinstance(two, Sync | Halt) or lane(one) == lane(two):
                continue
            if closure[i, j] or closure[j, i] or store_goes_first(code, closure, i, j):
                continue
            for (memory, written, bytes_), (other, changed, others) in product(touched(one), touched(two)):
                if memory == other and (written or changed) and bytes_ & others:
                    races.add((i, j))
        # Two syncs may share a marker; the functions copy.
        made = replace(program(code), vectors=(VectorSpec(VectorFunction.COPY),), dram_bytes=90, markers=MARKERS)
        made = replace(made, tensors=(Tensor("all", (90,), 0, 1.0, 0, True, "internal"),))
        outcomes[bool(races)] += 1
        if not races:
            check_program(made, SPEC)
            continue
        with pytest.raises(
            ProgramError, match=r"uses byte \d+ of the .* at the same time as instruction (\d+)"
        ) as caught:
            check_program(made, SPEC)
        other = int(str(caught.value).split("at the same time as instruction ")[1].split(",")[0])
        assert (other, caught.value.index) in races
    assert min(outcomes) > 20, outcomes
