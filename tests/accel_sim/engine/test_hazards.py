"""Races that must be seen, to the cycle, and what must not be taken for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from accel_sim.engine import HazardError, Result, run
from accel_sim.program.isa import (
    Halt,
    Instruction,
    Load,
    Loops,
    Matmul,
    Output,
    Preload,
    Program,
    Store,
    Sync,
    Tensor,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
    Window,
)
from accel_sim.spec import DramSpec
from accel_sim.spec_file import load_spec
from tests.accel_sim.engine.conv_programs import Conv, write

SPEC = replace(load_spec("edge_16x16"), dram=DramSpec(16.0, 5, 1, True))
"""Sixteen bytes a cycle after a latency of five, no bursts."""

COPY = 0


def program(code: list[Instruction], constants: bytes = bytes(range(256)) * 8) -> Program:
    """DRAM: 2048 constant bytes, then 2048 of which the first 16 are an output, the rest are nobody's."""
    window = Window(1, 16, (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), 0, True)
    return Program(
        spec_hash=b"",
        columns=16,
        code=(*code, Halt()),
        windows=(window,),
        outputs=(Output(0, False, 0, -128, 127, True),),
        sums=(),
        vectors=(VectorSpec(VectorFunction.COPY),),
        scales=(1.0,),
        tables=(),
        tensors=(),
        markers=(),
        calls=(),
        constants=constants,
        constants_address=0,
        dram_bytes=4096,
    )


def copy(size: int, source: int, target: int, cycles: int, **tokens: Token) -> Vector:
    return Vector(COPY, source, target, size, 16 * cycles, **tokens)


def go(code: list[Instruction]) -> Result:
    return run(program(code), SPEC, {})


def load_16(source: int, target: int, **tokens: Token) -> Load:
    """Data in the cycle after the latency."""
    return Load(source, target, Loops(16), **tokens)


def raised(code: list[Instruction]) -> HazardError:
    with pytest.raises(HazardError) as found:
        go(code)
    return found.value


def test_what_is_read_must_have_been_written() -> None:
    error = raised([load_16(0, 0, post=Token.LOADED), copy(17, 0, 0, 1, wait=Token.LOADED)])
    assert (error.index, error.other, error.memory, error.address) == (1, None, "scratchpad", 16)
    error = raised([Load(2040, 0, Loops(16))])
    assert (error.index, error.memory, error.address) == (0, "DRAM", 2048)
    error = raised([Store(2048, 64, Loops(16), 16)])
    assert (error.index, error.memory, error.address) == (0, "accumulator memory", 64)


def test_a_window_reads_what_its_positions_reach_and_nothing_else() -> None:
    """Of a map of 4 x 4, a 1x1 kernel with stride 2 reads every second pixel of every second row; one is missing."""
    window = Window(1, 16, (1, 4, 4), (1, 2, 2), (1, 1, 1), (1, 2, 2), (1, 1, 1), (0, 0, 0), 0, True)
    pixels = Loops(16, (1, 2, 2), (0, 16, 16), (0, 128, 32))
    code: list[Instruction] = [
        Load(0, 0, pixels),
        Load(0, 1024, Loops(16), chained=True, post=Token.LOADED),
        Preload(wait=Token.LOADED),
        Matmul(0, 0, 1024, 0, 16, 1),
    ]
    whole = replace(program(code), windows=(window,))
    run(whole, SPEC, {})
    part = replace(pixels, counts=(1, 2, 1))
    with pytest.raises(HazardError) as found:
        run(replace(whole, code=(replace(code[0], loops=part), *code[1:], Halt())), SPEC, {})
    assert (found.value.index, found.value.address) == (3, 32)


def test_an_output_that_nobody_writes() -> None:
    tensor = Tensor("y", (1, 16), 2048, 1.0, 0, True, "output")
    code = [load_16(0, 0, post=Token.LOADED), copy(16, 0, 0, 1, wait=Token.LOADED, post=Token.COMPUTED)]
    store = Store(2048, 0, Loops(15), 15, wait=Token.COMPUTED)
    with pytest.raises(HazardError) as found:
        run(replace(program([*code, store]), tensors=(tensor,)), SPEC, {})
    assert (found.value.index, found.value.memory, found.value.address) == (3, "DRAM", 2048 + 15)


def test_a_buffer_may_be_filled_when_it_has_been_read_and_not_before() -> None:
    """Released by the copy that reads it, or by the one before."""

    def code(first: Token, second: Token) -> list[Instruction]:
        return [
            load_16(0, 0),
            load_16(16, 16),
            Sync(0),
            copy(16, 16, 0, 3, post=first),
            copy(16, 0, 16, 1, post=second),
            load_16(16, 0, wait=Token.FREED),
        ]

    go(code(Token.NONE, Token.FREED))
    error = raised(code(Token.FREED, Token.NONE))
    assert {error.index, error.other} == {4, 5}
    assert (error.memory, error.address) == ("scratchpad", 0)


def test_a_store_that_waits_for_the_channel_has_its_accumulators_all_the_same() -> None:
    """The second copy overwrites them long before the first byte moves, and long after the store was asked for."""
    code = [
        load_16(0, 0),
        load_16(16, 16),
        Sync(0),
        Load(0, 1024, Loops(1600)),
        copy(16, 0, 0, 1, post=Token.COMPUTED),
        copy(16, 16, 0, 1),
        Store(2048, 0, Loops(16), 16, wait=Token.COMPUTED),
    ]
    error = raised(code)
    assert {error.index, error.other} == {5, 6}


def test_reading_may_begin_when_the_data_have_come_and_not_a_cycle_earlier() -> None:
    """Data move in cycle 5 to 6. A copy of 6 cycles before the other one lets it begin at 6, one of 5 at 5."""
    elsewhere = [
        load_16(64, 256),
        load_16(64, 0),
        Sync(0),
        load_16(16, 0),
        copy(16, 256, 1024, 6),
        copy(16, 0, 0, 1),
    ]
    go(elsewhere)
    error = raised([*elsewhere[:4], copy(16, 256, 1024, 5), elsewhere[5]])
    assert {error.index, error.other} == {3, 5}


def test_the_same_bytes_again_are_no_race() -> None:
    code = [
        load_16(0, 0),
        Sync(0),
        load_16(256, 0),  # the constants repeat every 256 bytes
        copy(16, 0, 0, 20),
    ]
    go(code)
    assert raised([*code[:2], load_16(257, 0), code[3]]).other == 3


def test_neighbours_in_steps_do_not_touch_each_other() -> None:
    """Every second byte is loaded while the others are read: boxes that overlap, bytes that do not."""
    every_second = (1, 1, 8)
    code = [
        Load(0, 0, Loops(16)),
        Sync(0),
        Load(100, 1, Loops(1, every_second, (0, 0, 1), (0, 0, 2))),
        Preload(),
        Matmul(0, 0, 0, 0, 1, 1),
    ]
    window = Window(1, 1, (1, 1, 16), (1, 1, 8), (1, 1, 1), (1, 1, 2), (1, 1, 1), (0, 0, 0), 0, True)
    run(replace(program(code), windows=(window,)), SPEC, {})
    odd = replace(window, origin=(0, 0, 1))
    with pytest.raises(HazardError) as found:
        run(replace(program(code), windows=(odd,)), SPEC, {})
    assert (found.value.index, found.value.other) == (2, 4)


def test_accumulators_that_are_stored_while_they_are_computed() -> None:
    """Without a token, the store reads the first product's sums in cycle 35, in the midst of the second product."""
    code = [
        Load(0, 0, Loops(512), post=Token.LOADED),
        Preload(wait=Token.LOADED),
        Matmul(0, 0, 16, 0, 16, 16, post=Token.COMPUTED),
        Preload(),
        Matmul(0, 0, 16, 0, 16, 16, accumulate=True, post=Token.COMPUTED),
    ]
    store = Store(2048, 0, Loops(16), 16, output=0, wait=Token.COMPUTED)
    early = [*code[:4], replace(code[4], post=Token.NONE), store]
    error = raised(early)
    assert (error.index, error.other, error.memory) == (4, 5, "accumulator memory") or (
        (error.index, error.other) == (5, 4)
    )
    go([*code[:2], replace(code[2], post=Token.NONE), *code[3:], store])


def test_weights_are_in_use_from_the_preload_on() -> None:
    """The load ends while the preload lasts and before the product begins: its weights were needed earlier."""
    code = [
        Load(0, 0, Loops(512)),
        Sync(0),
        load_16(100, 16),
        Preload(),
        Matmul(0, 0, 16, 0, 16, 16),
    ]
    times = run(program(code), SPEC, {}, values=False).schedule
    assert times.ended[0][1] < times.started[1][1]
    error = raised(code)
    assert (error.index, error.other) == (2, 4)


def test_watching_may_be_switched_off() -> None:
    code = [Load(0, 0, Loops(512)), Sync(0), load_16(100, 16), Preload(), Matmul(0, 0, 16, 0, 16, 16)]
    run(program(code), SPEC, {}, hazards=False)


def test_accumulators_that_are_taken_before_they_are_stored() -> None:
    """Stores last longer than computing; the third piece goes where the first one was."""

    def code(wait: Token) -> list[Instruction]:
        pieces: list[Instruction] = [Load(0, 0, Loops(192)), Sync(0)]
        for piece in range(3):
            third = wait if piece == 2 else Token.NONE
            pieces.append(copy(64, 64 * piece, 64 * (piece % 2), 2, wait=third, post=Token.COMPUTED))
            post = wait if piece == 0 else Token.NONE
            pieces.append(Store(2048 + 64 * piece, 64 * (piece % 2), Loops(64), 16, wait=Token.COMPUTED, post=post))
        return pieces

    go(code(Token.STORED))
    error = raised(code(Token.NONE))
    assert {error.index, error.other} == {6, 3}


@pytest.mark.parametrize("kind", [Token.LOADED, Token.FREED, Token.COMPUTED])
def test_a_tiled_layer_needs_every_kind_of_token(kind: Token) -> None:
    """All of one kind left out: the race is seen. Slow loads for what waits for data, fast ones for what frees.

    (STORED is not among them: the channel serves a tile's store before the load of the tile that takes its place.)
    """
    conv = Conv(32, 32, (1, 12, 12), (1, 3, 3), pads=((0, 1, 1), (0, 1, 1)), rows=2)
    slow = kind == Token.LOADED
    dram = DramSpec(2.0 if slow else 512.0, 200 if slow else 1, 1, True)
    spec = replace(load_spec("edge_16x16"), dram=dram)
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (32, 32, 1, 3, 3)).astype(np.int8)
    good = write(conv, spec, weight, np.zeros(32, np.int32))
    x = rng.integers(-128, 128, (1, 32, 1, 12, 12)).astype(np.int8)
    run(good, spec, {"x": x})
    code = tuple(
        replace(one, wait=one.wait & ~kind, post=one.post & ~kind) if isinstance(one, Load | Store | Matmul) else one
        for one in good.code
    )
    code = tuple(replace(one, wait=one.wait & ~kind) if isinstance(one, Preload) else one for one in code)
    with pytest.raises(HazardError):
        run(replace(good, code=code), spec, {"x": x})
