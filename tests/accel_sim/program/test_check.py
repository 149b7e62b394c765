"""What is checked before a program runs: every broken rule is named with its instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from accel_sim.program.check import check_program
from accel_sim.program.container import encode, read_program, write_program
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import (
    Dataflow,
    Halt,
    Host,
    Instruction,
    Load,
    Loops,
    Matmul,
    Output,
    Preload,
    Program,
    Space,
    Store,
    Sum,
    Sync,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
)
from accel_sim.program.listing import instruction_text
from accel_sim.program.machine_hash import spec_hash
from accel_sim.program.syntax import QUEUES
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from tests.accel_sim.program.sample_programs import (
    COMPUTED,
    EMPTY,
    FREED,
    LOADED,
    SAMPLES,
    SPEC,
    STORED,
    one_tile,
    two_layers,
)

NONE = Token.NONE
LAST = (1 << 31) - 1
"""The largest number of 32 bits."""


def on(program: Program, spec: MachineSpec) -> Program:
    return replace(program, spec_hash=spec_hash(spec), columns=spec.array.columns)


def changed(program: Program, index: int, **fields: Any) -> Program:
    """``program`` with fields of one instruction replaced; those of its loops too."""
    entry: Any = program.code[index]
    inner = {name: fields.pop(name) for name in ("run", "counts", "dram_strides", "chip_strides") if name in fields}
    if inner:
        fields["loops"] = replace(entry.loops, **inner)
    return replace(program, code=(*program.code[:index], replace(entry, **fields), *program.code[index + 1 :]))


def instead(program: Program, index: int, *entries: Instruction) -> Program:
    return replace(program, code=(*program.code[:index], *entries, *program.code[index + 1 :]))


def table(program: Program, section: str, index: int, **fields: Any) -> Program:
    """``program`` with fields of one descriptor replaced."""
    entries = list(getattr(program, section))
    entries[index] = replace(entries[index], **fields)
    return replace(program, **{section: tuple(entries)})


def refused(program: Program, where: str, complaint: str, spec: MachineSpec = SPEC) -> ProgramError:
    with pytest.raises(ProgramError) as caught:
        check_program(program, spec)
    assert re.match(rf"{re.escape(where)}: {complaint}", str(caught.value)), str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_can_run(name: str) -> None:
    check_program(SAMPLES[name](), SPEC)
    slower = load_spec("edge_16x16", {"bytes_per_cycle": "4", "weight_shadow": "false", "lanes": "4"})
    check_program(SAMPLES[name](), slower)


def test_the_empty_program_can_run() -> None:
    check_program(EMPTY, SPEC)


ONE_TILE: list[tuple[int, dict[str, Any], str]] = [
    (0, {"marker": 1}, r"marker is 1; the program has 1, expected 0 to 0"),
    (0, {"marker": -1}, r"marker is -1; the program has 1"),
    (1, {"run": 0}, r"run is 0; expected at least 1"),
    (1, {"run": LAST}, r"source: bytes 0 to 2147483647 of the DRAM; expected 0 to 496, which is what it has$"),
    (1, {"counts": (1, 0, 1)}, r"counts is 1,0,1; expected at least 1"),
    (1, {"dram_address": -1}, r"source: bytes -1 to 127 of the DRAM"),
    (1, {"dram_address": 369}, r"source: bytes 369 to 497 of the DRAM"),
    (1, {"dram_address": (1 << 63) - 1}, r"source: bytes \d+ to \d+ of the DRAM"),
    (1, {"counts": (1, 1, 4), "dram_strides": (0, 0, 123)}, r"source: bytes 0 to 497 of the DRAM"),
    (1, {"counts": (1, 1, 2), "dram_strides": (0, 0, -1)}, r"source: bytes -1 to 128 of the DRAM"),
    (1, {"counts": (LAST,) * 3, "dram_strides": ((1 << 63) - 1,) * 3}, r"source: bytes 0 to \d+ of the DRAM"),
    (1, {"counts": (LAST,) * 3, "dram_strides": (-(1 << 63), (1 << 63) - 1, 1)}, r"source: bytes -\d+ to \d+ of"),
    (1, {"counts": (2, 1, 1), "dram_strides": (-(1 << 63), 0, 0)}, r"source: bytes -9223372036854775808 to 128 of"),
    (1, {"counts": (1, 1, 2)}, r"target: 256 bytes into 128 of the scratchpad; expected each to be written once"),
    (1, {"counts": (1, LAST, LAST)}, r"target: \d+ bytes into 128 of the scratchpad"),
    (1, {"counts": (1, 1, 3), "chip_strides": (0, 0, 64)}, r"target: 384 bytes into 256 of the scratchpad"),
    (1, {"dram_strides": (0, 8, 0)}, r"dram_strides is 0,8,0; expected 0 where the loop's count is 1"),
    (5, {"chip_strides": (4, 0, 0)}, r"chip_strides is 4,0,0; expected 0 where the loop's count is 1"),
    (5, {"block_channels": 16}, r"block_channels is 16; expected 0, nothing reads it"),
    (5, {"output": -1, "first_channel": 1}, r"first_channel is 1; expected 0, nothing reads it"),
    (1, {"chip_address": 262017}, r"target: bytes 262017 to 262145 of the scratchpad; expected 0 to 262144"),
    (1, {"chip_address": -8}, r"target: bytes -8 to 120 of the scratchpad"),
    (1, {"space": Space.ACCUMULATOR, "chip_address": 65409}, r"target: bytes 65409 to 65537 of the accumulator mem"),
    (1, {"chained": True}, r"chained, and no load stands before it"),
    (1, {"post": LOADED}, r"post is loaded, and 2 is chained to it; expected none"),
    (1, {"wait": LOADED}, r"wait is loaded; the load queue may wait freed"),
    (1, {"post": STORED}, r"post is stored; the load queue may post loaded"),
    (1, {"wait": FREED}, r"waits for ever: the load queue at instruction 1 for freed, the execute queue at instruct"),
    (2, {"wait": FREED}, r"chained, and wait is freed; expected none"),
    (3, {"wait": LOADED | COMPUTED}, r"wait is loaded,computed; the execute queue may wait loaded,stored"),
    (3, {"wait": LOADED | STORED}, r"waits for ever: the execute queue at instruction 3 for stored, the store que"),
    (4, {"dataflow": Dataflow.INPUT_STATIONARY}, r"dataflow is is; 'edge_16x16' has ws"),
    (4, {"window": 1}, r"window is 1; the program has 1"),
    (4, {"window": -1}, r"window is -1"),
    (4, {"channels": 9}, r"channels 0 to 9; the stored map has 8"),
    (4, {"channels": 0}, r"channels is 0; expected at least 1"),
    (4, {"filters": 0}, r"filters is 0; expected at least 1"),
    (4, {"first_channel": 1}, r"channels 1 to 9; the stored map has 8"),
    (4, {"first_channel": -1}, r"first_channel is -1"),
    (4, {"first_channel": LAST, "channels": LAST}, r"channels 2147483647 to 4294967294"),
    (4, {"input_address": 262017}, r"input: bytes 262017 to 262145 of the scratchpad"),
    (4, {"input_address": -1}, r"input: bytes -1 to 127 of the scratchpad"),
    (4, {"weight_address": 261857}, r"weights: bytes 261857 to 262145 of the scratchpad"),
    (4, {"bias_address": 262129}, r"biases: bytes 262129 to 262145 of the scratchpad"),
    (4, {"bias_address": -2}, r"bias_address is -2; expected at least -1"),
    (4, {"accumulate": True}, r"accumulates, and bias_address is 416; expected -1"),
    (4, {"accumulator_address": 2}, r"accumulator address 0x2; expected a multiple of the word's 4 bytes"),
    (4, {"accumulator_address": 65284}, r"sums: bytes 65284 to 65540 of the accumulator memory"),
    (4, {"filters": LAST}, r"weights: bytes 128 to \d+ of the scratchpad"),
    (4, {"post": LOADED}, r"post is loaded; the execute queue may post freed,computed"),
    (5, {"address": 433}, r"target: bytes 433 to 497 of the DRAM"),
    (5, {"address": 129}, r"target: bytes 129 to 193 of the DRAM; the constants are 192 to 496"),
    (5, {"address": 400}, r"target: bytes 400 to 464 of the DRAM; the constants are 192 to 496"),
    (5, {"address": 262081, "to_scratchpad": True}, r"target: bytes 262081 to 262145 of the scratchpad"),
    (5, {"accumulator_address": 1}, r"accumulator address 0x1"),
    (5, {"accumulator_address": 65284}, r"source: bytes 65284 to 65540 of the accumulator memory"),
    (5, {"counts": (1, 1, 2), "chip_strides": (0, 0, 16321)}, r"source: bytes 0 to 65540 of the accumulator memory"),
    (5, {"lanes": 3}, r"run is 64; expected a multiple of lanes, 3"),
    (5, {"lanes": 0}, r"lanes is 0; expected at least 1"),
    (5, {"lanes": 8}, r"needs scales 0 to 7; the program has 4"),
    (5, {"first_channel": 1}, r"needs scales 1 to 4; the program has 4"),
    (5, {"first_channel": -1}, r"first_channel is -1"),
    (5, {"counts": (2, 1, 1), "block_channels": 4}, r"needs scales 0 to 7; the program has 4"),
    (5, {"output": 1}, r"output is 1; the program has 1, expected 0 to 0, or -1"),
    (5, {"output": -2}, r"output is -2"),
    (5, {"residual_address": 0}, r"a residual, and output 0 has no sum to add it by"),
    (5, {"residual_address": 0, "output": -1}, r"a residual, and output is -1"),
    (5, {"wait": STORED}, r"wait is stored; the store queue may wait computed"),
    (5, {"post": COMPUTED}, r"post is computed; the store queue may post stored"),
    (5, {"chained": True}, r"chained, and no store stands before it"),
]


@pytest.mark.parametrize(("index", "fields", "complaint"), ONE_TILE)
def test_a_field_of_an_instruction(index: int, fields: dict[str, Any], complaint: str) -> None:
    error = refused(changed(one_tile(), index, **fields), f"instruction {index}", complaint)
    assert (error.section, error.index) == ("code", index)


TWO_LAYERS: list[tuple[Callable[[Program], Program], str, str]] = [
    (
        lambda p: changed(p, 9, post=NONE),
        "instruction 12",
        "waits for ever: the load queue at instruction 12 for freed",
    ),
    (lambda p: changed(p, 9, wait=LOADED), "instruction 22", "tokens are left over where all queues meet: 1 stored; "),
    (
        lambda p: changed(p, 6, post=NONE),
        "instruction 9",
        "waits for ever: the execute queue at instruction 9 for stored",
    ),
    (lambda p: changed(p, 12, wait=NONE), "instruction 22", "tokens are left over where all queues meet: 1 freed"),
    (lambda p: changed(p, 21, post=STORED), "instruction 22", "tokens are left over where all queues meet: 1 stored"),
    (
        lambda p: changed(p, 24, post=COMPUTED | FREED),
        "instruction 26",
        "tokens are left over .*: 1 freed; expected none",
    ),
    (lambda p: changed(p, 24, spec=1), "instruction 24", "spec is 1; the program has 1"),
    (lambda p: changed(p, 24, elements=17), "instruction 24", "elements is 17; the pool has 16 results"),
    (lambda p: changed(p, 24, elements=0), "instruction 24", "elements is 0; expected at least 1"),
    (lambda p: changed(p, 24, operations=-1), "instruction 24", "operations is -1; expected at least 0"),
    (lambda p: changed(p, 24, operations=1 << 41), "instruction 24", "operations is 2199023255552; expected at most"),
    (lambda p: changed(p, 24, a_address=261121), "instruction 24", "a: bytes 261121 to 262145 of the scratchpad"),
    (lambda p: changed(p, 24, b_address=0), "instruction 24", "b_address is 0; expected -1"),
    (lambda p: changed(p, 24, output_address=65521), "instruction 24", "output: bytes 65521 to 65537 of the accumul"),
    (lambda p: changed(p, 6, residual_address=65281), "instruction 6", "residual: bytes 65281 to 65537 of the accumul"),
    (lambda p: changed(p, 6, residual_address=-1), "instruction 6", "residual_address is -1, and output 0 adds one"),
    (lambda p: changed(p, 26, call=1), "instruction 26", "call is 1; the program has 1"),
    (lambda p: instead(p, 27), "instruction 26", "the last instruction is no halt"),
    (lambda p: instead(p, 22, Halt()), "instruction 22", "a halt; expected the only one at 27, the end"),
    (lambda p: replace(p, code=()), "instruction 0", "the last instruction is no halt"),
    (lambda p: instead(p, 5), "instruction 4", "a preload; expected a matmul as the next instruction of the execute"),
    (lambda p: instead(p, 5, Vector(0, 0, 4096, 16, 1)), "instruction 4", "a preload; expected a matmul"),
    (lambda p: instead(p, 20, Sync(0), p.code[20]), "instruction 19", "a preload; expected a matmul"),
    (lambda p: instead(p, 4, Preload(), p.code[4]), "instruction 4", "a preload; expected a matmul"),
    (lambda p: instead(p, 8, Sync(0), p.code[8]), "instruction 9", "chained, and no load stands before it"),
    (lambda p: changed(p, 11, chained=True, wait=NONE), "instruction 6", "post is stored, and 11 is chained to it"),
    (
        lambda p: changed(changed(p, 6, post=NONE), 11, chained=True, wait=NONE, to_scratchpad=True),
        "instruction 11",
        "chained to 6, which does not go the same way",
    ),
]


@pytest.mark.parametrize(("change", "where", "complaint"), TWO_LAYERS)
def test_tokens_and_order(change: Callable[[Program], Program], where: str, complaint: str) -> None:
    refused(change(two_layers()), where, complaint)


RACES: list[tuple[Callable[[Program], Program], int, str, int, int]] = [
    # The second tile's input goes where the first one's is being read, and so on; (change, index, memory, byte, other)
    (lambda p: changed(p, 7, chip_address=0), 7, "scratchpad", 0, 5),
    (lambda p: changed(p, 7, chip_address=1500), 7, "scratchpad", 1500, 4),
    (lambda p: changed(p, 7, chip_address=1599), 7, "scratchpad", 1599, 5),
    (lambda p: changed(p, 8, chip_address=2048), 8, "accumulator memory", 2048, 6),
    (lambda p: changed(p, 8, chip_address=1020), 8, "accumulator memory", 1020, 5),
    (lambda p: changed(p, 7, dram_address=3072), 7, "DRAM", 3072, 6),
    (lambda p: changed(p, 6, address=512, to_scratchpad=True), 7, "scratchpad", 512, 6),
    (lambda p: changed(p, 25, wait=NONE, accumulator_address=4100, run=4, lanes=4), 26, "", 0, 0),
]


@pytest.mark.parametrize(("change", "index", "memory", "byte", "other"), RACES)
def test_buffers_used_at_the_same_time(
    change: Callable[[Program], Program], index: int, memory: str, byte: int, other: int
) -> None:
    if not memory:  # a token that nobody takes is found first
        refused(change(two_layers()), f"instruction {index}", "tokens are left over")
        return
    text = (
        f"uses byte {byte} of the {memory} at the same time as instruction {other}, and one of them writes it; "
        "expected a token between them"
    )
    error = refused(change(two_layers()), f"instruction {index}", text)
    assert error.index == index


def test_interleaved_transfers_do_not_meet() -> None:
    """Bounds that overlap are no race as long as no byte is common: a load fills every other run of 8 bytes."""
    tile = Loops(8, (1, 1, 16), (0, 0, 8), (0, 0, 16))
    code = (
        Load(0, 0, tile, post=LOADED),
        Load(0, 8, tile),
        Vector(0, 0, 0, 8, 8, wait=LOADED),
        Halt(),
    )
    copy = VectorSpec(VectorFunction.COPY)
    program = replace(EMPTY, code=code, vectors=(copy,), dram_bytes=128)
    check_program(program, SPEC)
    error = refused(
        changed(program, 2, elements=9), "instruction 2", "uses byte 8 of the scratchpad at the same time as"
    )
    assert error.index == 2


def test_a_token_lets_everything_before_it_end() -> None:
    """The second load's token says that the first has ended too: the channel carries one thing at a time."""
    code = (Load(0, 0, Loops(8)), Load(8, 8, Loops(8), post=LOADED), Vector(0, 0, 0, 16, 1, wait=LOADED), Halt())
    program = replace(EMPTY, code=code, vectors=(VectorSpec(VectorFunction.COPY),), dram_bytes=16)
    check_program(program, SPEC)
    refused(instead(program, 1, Load(8, 8, Loops(8))), "instruction 2", "waits for ever")
    free = changed(changed(program, 1, post=NONE), 2, wait=NONE)
    refused(free, "instruction 2", "uses byte 0 of the scratchpad at the same time as instruction 0")


def test_a_store_into_the_scratchpad_does_not_wait_for_one_into_dram() -> None:
    """They take different ways, so the token of the later one says nothing about the earlier one."""
    code = (
        Vector(0, 0, 0, 8, 1),
        Vector(0, 0, 8, 8, 1, post=COMPUTED),
        Store(0, 0, Loops(8), lanes=8, wait=COMPUTED),
        Store(64, 8, Loops(8), lanes=8, to_scratchpad=True, post=STORED),
        Vector(0, 0, 0, 8, 1, wait=STORED),
        Halt(),
    )
    program = replace(EMPTY, code=code, vectors=(VectorSpec(VectorFunction.FILL),), dram_bytes=8)
    refused(program, "instruction 4", "uses byte 0 of the accumulator memory at the same time as instruction 2")
    check_program(changed(program, 4, output_address=8), SPEC)
    both = changed(changed(changed(program, 2, post=STORED), 3, post=NONE), 4, output_address=0)
    check_program(both, SPEC)


TABLES: list[tuple[Program, str, str]] = [
    (table(one_tile(), "windows", 0, images=0), "windows[0]", "images is 0; expected 1 to"),
    (table(one_tile(), "windows", 0, strides=(1, 0, 1)), "windows[0]", "strides is 0; expected 1 to"),
    (table(one_tile(), "windows", 0, pad_value=128), "windows[0]", "pad_value is 128; expected -128 to 127"),
    (table(one_tile(), "windows", 0, extent=(LAST,) * 3), "instruction 4", "input: bytes 0 to"),
    (table(one_tile(), "windows", 0, out=(LAST,) * 3), "instruction 4", "sums: bytes 0 to"),
    (table(one_tile(), "windows", 0, kernel=(LAST,) * 3), "instruction 4", "weights: bytes 128 to"),
    (table(one_tile(), "outputs", 0, scales=4), "outputs[0]", "scales is 4; the program has 4"),
    (table(one_tile(), "outputs", 0, high=128), "outputs[0]", "high is 128; expected -128 to 127"),
    (table(one_tile(), "outputs", 0, low=5, high=4), "outputs[0]", "high is 4; expected 5 to 127"),
    (table(one_tile(), "outputs", 0, zero_point=-129), "outputs[0]", "zero_point is -129"),
    (table(one_tile(), "outputs", 0, table=0), "outputs[0]", "table is 0; the program has 0"),
    (table(one_tile(), "outputs", 0, sum=0), "outputs[0]", "sum is 0; the program has 0"),
    (table(one_tile(), "outputs", 0, sum_table=0), "outputs[0]", "sum_table is 0; expected -1, nothing reads it"),
    (table(two_layers(), "sums", 0, signed=False), "sums[0]", "low is -128; expected 0 to 255"),
    (table(two_layers(), "vectors", 0, window=2), "vectors[0]", "window is 2; the program has 2"),
    (table(two_layers(), "vectors", 0, sum=0), "vectors[0]", "sum is 0; expected -1, nothing reads it"),
    (table(two_layers(), "vectors", 0, divisor=0.0), "vectors[0]", r"divisor is 0\.0; expected more than 0"),
    (table(two_layers(), "vectors", 0, divisor=2.0**33), "vectors[0]", r"divisor is 8589934592\.0; expected more than"),
    (table(two_layers(), "vectors", 0, ratio=-(2.0**33)), "vectors[0]", r"ratio is -8589934592\.0; expected at most"),
    (table(two_layers(), "vectors", 0, b_zero=1), "vectors[0]", "b_zero is 1; expected 0, nothing reads it"),
    (
        table(two_layers(), "sums", 0, offset=2.0**33),
        "sums[0]",
        r"offset is 8589934592\.0; expected at most",
    ),
    (replace(two_layers(), scales=(2.0**33,)), "scales[0]", r"scale is 8589934592\.0; expected at most 4294967296"),
    (table(two_layers(), "windows", 0, strides=(2, 1, 1)), "windows[0]", "strides is 2,1,1; expected 1 where out"),
    (
        table(two_layers(), "windows", 0, dilations=(1, 9, 1)),
        "windows[0]",
        "dilations is 1,9,1; expected 1 where",
    ),
    (
        table(two_layers(), "markers", 0, predicted_cycles=-2),
        "markers[0]",
        "predicted_cycles is -2; expected at",
    ),
    (table(two_layers(), "markers", 0, macs=32769), "markers[0]", "macs is 32769; expected 0 to 32768"),
    (table(one_tile(), "markers", 0, macs=-1), "markers[0]", "macs is -1; expected 0 to 4608"),
    (replace(one_tile(), dram_bytes=561), "header", "dram_bytes is 561; expected at most 560, nothing uses more"),
    (table(two_layers(), "tensors", 1, name="x"), "tensors[1]", "'x' is tensor 0 too"),
    (table(two_layers(), "tensors", 1, address=-1), "tensors[1]", "'r': bytes -1 to 1023; the DRAM has 4736"),
    (table(two_layers(), "tensors", 1, address=3713), "tensors[1]", "'r': bytes 3713 to 4737; the DRAM has 4736"),
    (table(two_layers(), "tensors", 1, shape=(1, 0)), "tensors[1]", "shape is 0; expected 1 to"),
    (table(two_layers(), "tensors", 1, scale=0.0), "tensors[1]", r"scale is 0\.0; expected more than 0"),
    (table(two_layers(), "tensors", 1, zero_point=200), "tensors[1]", "zero_point is 200; expected -128 to 127"),
    (table(two_layers(), "tensors", 1, address=1024), "tensors[1]", "inputs 'x' and 'r' overlap in bytes 1024 to 2048"),
    (table(two_layers(), "tensors", 4, address=4100), "tensors[4]", "outputs 'y'|"),
    (
        table(two_layers(), "tensors", 4, address=4160),
        "tensors[4]",
        "'q' is written and lies in the constants, bytes 4160",
    ),
    (table(two_layers(), "calls", 0, inputs=("z",)), "calls[0]", "'softmax': no tensor is called 'z'"),
    (replace(one_tile(), columns=8), "header", "columns is 8; expected the array's 16"),
    (replace(one_tile(), dram_bytes=495), "constants", "bytes 192 to 496; the DRAM has 495"),
    (replace(one_tile(), constants_address=-1), "constants", "bytes -1 to 303"),
    (replace(one_tile(), dram_bytes=1 << 60), "header", "dram_bytes is 1152921504606846976; expected 0 to"),
    (replace(one_tile(), spec_hash=bytes(32)), "header", "the program is for machine 0{64}; 'edge_16x16' is 88e6"),
]


@pytest.mark.parametrize(("program", "where", "complaint"), TABLES)
def test_tables_and_tensors(program: Program, where: str, complaint: str) -> None:
    if complaint.endswith("|"):  # an output that lies over an internal tensor is one after the other, and allowed
        check_program(program, SPEC)
        return
    refused(program, where, complaint)


def test_machines() -> None:
    bare = load_spec("edge_16x16", {"residual_on_drain": "false"})
    refused(on(two_layers(), bare), "instruction 6", "a residual; 'edge_16x16' adds none on the way out", bare)
    refused(on(one_tile(), load_spec("edge_16x16", {"rows": "8"})), "header", "the program is for machine")
    apart = load_spec("edge_16x16", {"shared_input_weight": "false"})
    moved = on(one_tile(), apart)
    refused(moved, "instruction 4", "weights: bytes 128 to 416 of the scratchpad; expected 131072 to 262144", apart)
    moved = changed(moved, 4, weight_address=131072, bias_address=131360)
    moved = changed(moved, 2, chip_address=131072)
    check_program(moved, apart)
    far = changed(moved, 4, input_address=131072)
    refused(far, "instruction 4", "input: bytes 131072 to 131200 of the scratchpad; expected 0 to 131072", apart)


def test_what_stays_in_the_array_is_read_early() -> None:
    """A preload reads the weights, or the inputs where those stay; the other operand may still be on its way."""
    spec = load_spec("edge_16x16", {"dataflows": "ws+is+os"})
    base = on(one_tile(), spec)
    loads = (
        Load(192, 128, Loops(304), post=LOADED),
        Load(0, 0, Loops(128), post=LOADED),
    )
    code = (base.code[0], *loads, Preload(wait=LOADED), replace(base.code[4], wait=LOADED), *base.code[5:])
    program = replace(base, code=code)
    check_program(program, spec)
    other_flow = changed(program, 4, dataflow=Dataflow.INPUT_STATIONARY)
    refused(other_flow, "instruction 3", "uses byte 0 of the scratchpad at the same time as instruction 2", spec)
    swapped = replace(other_flow, code=(base.code[0], *loads[::-1], *other_flow.code[3:]))
    check_program(swapped, spec)
    refused(
        changed(program, 4, dataflow=Dataflow.OUTPUT_STATIONARY),
        *("instruction 3", "a preload, but 4 is output-stationary and has nothing to preload", spec),
    )


def test_every_token_of_a_program_is_needed() -> None:
    """Taking any one away, or adding any, is refused: with the samples' buffers there is none to spare."""
    for program in (one_tile(), two_layers()):
        for index, entry in enumerate(program.code):
            if isinstance(entry, Sync | Host | Halt):
                continue
            for name in ("wait", "post"):
                for bit in (LOADED, FREED, COMPUTED, STORED):
                    with pytest.raises(ProgramError) as caught:
                        check_program(changed(program, index, **{name: getattr(entry, name) ^ bit}), SPEC)
                    assert caught.value.section == "code"


def test_neighbours_swapped() -> None:
    """Instructions of different queues may stand in either order; of the same queue, mostly not."""
    program = two_layers()
    queues = [QUEUES[instruction_text(entry).split()[0]] for entry in program.code]
    refusals = 0
    for index in range(len(program.code) - 1):
        code = list(program.code)
        code[index], code[index + 1] = code[index + 1], code[index]
        pair = {queues[index], queues[index + 1]}
        if len(pair) == 2 and "all" not in pair:
            check_program(replace(program, code=tuple(code)), SPEC)
            continue
        try:
            check_program(replace(program, code=tuple(code)), SPEC)
        except ProgramError as error:
            assert error.section == "code" and error.index is not None
            refusals += 1
    assert refusals >= 10


def test_files_are_checked(tmp_path: Any) -> None:
    bad = changed(one_tile(), 4, channels=9)
    path = tmp_path / "program.bin"
    write_program(bad, path)
    assert read_program(path) == bad
    with pytest.raises(ProgramError, match=r"^instruction 4: channels 0 to 9; the stored map has 8$"):
        read_program(path, SPEC)
    path.write_bytes(encode(one_tile()))
    assert read_program(path, SPEC) == one_tile()


def test_values_of_the_vector_unit() -> None:
    two = replace(
        EMPTY,
        code=(Vector(0, 0, 0, 16, 16, b_address=262128), Halt()),
        vectors=(VectorSpec(VectorFunction.SUM, sum=0),),
        sums=(Sum(1.0, 1.0, 0.0, -128, 127, True, True, True, True),),
    )
    check_program(two, SPEC)
    refused(changed(two, 0, b_address=262129), "instruction 0", "b: bytes 262129 to 262145 of the scratchpad")
    refused(changed(two, 0, b_address=-1), "instruction 0", "b: bytes -1 to 15 of the scratchpad")
    refused(table(two, "vectors", 0, sum=-1), "vectors[0]", "sum is -1; the program has 1")
    fill = table(two, "vectors", 0, function=VectorFunction.FILL, sum=-1, zero_point=255)
    check_program(changed(fill, 0, a_address=-1, b_address=-1), SPEC)
    look = table(two, "vectors", 0, function=VectorFunction.TABLE, sum=-1)
    refused(look, "vectors[0]", "table is -1; the program has 0")


def test_scales_of_one_entry_serve_all_channels() -> None:
    one = replace(one_tile(), scales=(0.5,), outputs=(Output(0, False, 0, -128, 127, True),))
    check_program(changed(one, 5, first_channel=1000), SPEC)
    assert isinstance(one.code[4], Matmul)
