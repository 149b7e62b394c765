"""Listings: assemble(disassemble(p)) == p, and a wrong line is named with its column."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from accel_sim.program.assembler import assemble, read_listing
from accel_sim.program.container import decode, encode
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Load, Loops, Matmul, Program, Space, Token
from accel_sim.program.listing import disassemble, instruction_text, write_listing
from accel_sim.spec_file import load_spec
from tests.accel_sim.program.program_strategies import PROGRAMS
from tests.accel_sim.program.sample_programs import SAMPLES, SPEC, one_tile, two_layers

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FUZZ
@given(PROGRAMS)
def test_text_and_bytes_are_the_program(program: Program) -> None:
    text = disassemble(program)
    back = assemble(text)
    assert back == program
    assert disassemble(back) == text
    assert encode(back) == encode(program)  # tells -0.0 from 0.0, which == does not
    assert decode(encode(program)) == program


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_as_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "program.lst"
    write_listing(SAMPLES[name](), path, SPEC)
    assert read_listing(path) == SAMPLES[name]()
    assert path.read_text(encoding="utf-8") == disassemble(SAMPLES[name](), SPEC)


def test_what_a_person_reads() -> None:
    lines = disassemble(two_layers(), SPEC).splitlines()
    assert "; machine edge_16x16: 16x16, 128 + 128 KiB scratchpad, 64 KiB accumulators" in lines
    assert "; 4672 bytes loaded, 1040 bytes stored, 32768 MACs; 576 bytes of constants" in lines
    assert '; layer 0 "conv", "Conv": 500 cycles predicted, 32768 MACs' in lines
    assert (
        "     3 load    load    dram_address=0x800 chip_address=0x800 run=256 space=accumulator chained=yes post=loaded"
        in lines
    )
    assert "     9 execute preload wait=loaded,stored post=freed" in lines
    other = disassemble(two_layers(), load_spec("tpu_256x256"))
    assert re.search(r"(?m)^; machine tpu_256x256: 256x256, .* accumulators, for which this program is not$", other)


def test_one_instruction() -> None:
    load = Load(16, 32, Loops(4, (1, 2, 3), (0, -8, 4), (0, 8, 4)), Space.ACCUMULATOR, wait=Token.FREED)
    assert instruction_text(load) == (
        "load    dram_address=0x10 chip_address=0x20 run=4 counts=1,2,3 dram_strides=0,-8,4 chip_strides=0,8,4 "
        "space=accumulator wait=freed"
    )
    assert instruction_text(Matmul(0, 0, 0, 0, 1, 2)) == (
        "matmul  window=0 input_address=0x0 weight_address=0x0 accumulator_address=0x0 channels=1 filters=2"
    )


def test_without_data_it_is_for_reading_alone() -> None:
    text = disassemble(two_layers(), data=False)
    assert "fee42279" not in text and len(text) < len(disassemble(two_layers())) - 576 * 2
    with pytest.raises(ProgramError, match=r"the listing was written without its data") as caught:
        assemble(text)
    assert text.splitlines()[caught.value.index - 1].startswith(".call 0")  # type: ignore[operator]


def test_written_by_hand() -> None:
    text = disassemble(one_tile())
    free = re.sub(r"(?m)^ +\d+ (load|execute|store|all) +", "\t", text)  # no index, no queue
    free = free.replace("address=0x80", "address=128").replace("0x1.0000000000000p-2", "0.25")
    free = (
        free.replace("run=64 lanes=4", "lanes=4   run=0x40")
        .replace("\n", "  ; why\r\n")
        .replace(" nodes=[", " nodes=[ ")
    )
    assert assemble(free) == one_tile()


def place(text: str, old: str, new: str) -> tuple[str, int]:
    assert text.count(old) == 1, (old, text.count(old))
    return text.replace(old, new), text[: text.index(old)].count("\n") + 1


@pytest.mark.parametrize(
    ("old", "new", "column", "complaint"),
    [
        ("    4 execute matmul", "    5 execute matmul", 6, "the index is 5; expected 4"),
        ("4 execute matmul ", "4 load    matmul ", 8, "the queue is load; expected execute"),
        ("execute matmul ", "execute matmull ", 16, "expected one of load, preload, matmul, vector, store, sync, host"),
        ("window=0 ", "windows=0 ", 24, "matmul has no field 'windows'; its fields: window, input_address, weight_add"),
        ("window=0 ", "", 139, "matmul lacks window"),
        ("window=0 ", "window=0 window=0 ", 33, "field window stands there twice"),
        ("window=0 ", "window 0 ", 30, "expected = after window"),
        ("window=0 ", "window=0x ", 31, "window is 0x; expected a whole number"),
        ("window=0 ", "window=1_0 ", 31, "window is 1_0; expected a whole number"),
        ("window=0 ", "window=\u0661 ", 31, "window is \u0661; expected a whole number"),
        ("window=0 ", 'window="0" ', 31, 'window is "0"; expected a whole number'),
        ("channels=8 filters", "channels=8[filters", 105, "expected a blank after channels, found '[filters"),
        ("wait=loaded", "wait=loaded,loaded", 29, "wait is loaded,loaded; expected each of loaded, freed, computed"),
        ("wait=loaded", "wait=", 29, "wait is the end of the line; expected each of loaded"),
        ("chained=yes", "chained=true", 76, "chained is true; expected yes or no"),
        ("extent=1,4,4", "extent=1,4", 38, "extent is 1,4; expected three whole numbers with commas"),
        ('role="input"', "role=input", 102, "role is input; expected a text in double quotes"),
        ('nodes=["conv","relu"]', 'nodes="conv"', 39, 'nodes is "conv"; expected a list of texts such as'),
        (".output 0", ".output 1", 9, "the index is 1; expected 0"),
        (".output 0", ".outputs 0", 1, "expected one of .program, .machine, .scales, .table, .code, .constants, .win"),
        (".scales 0 ", ".scales 0 half ", 11, "a scale is half; expected a number such as 0x1.8p-1 or 0.75"),
        (".code\n", ".code now\n", 7, "expected the end of the line, found 'now'"),
        (".program version=1", ".program version=2", 18, "version is 2; expected 1"),
        ("columns=16 ", "columns=-16 ", 28, "found '-16'; expected a whole number of 0 or more"),
        (".machine ", ".machine 0", 10, "found 0"),
        ("  00000020:", "  00000040:", 3, "the offset is 00000040; expected 00000020"),
        ("  00000120: 1", "  00000120: ", 3, "expected bytes such as '00000120: 00ff0102', found"),
        ("bytes=304", "bytes=305", 1, "304 bytes follow; expected 305"),
        ("bytes=304", "bytes=303", 3, "304 bytes so far; expected 303"),
        ("bytes=304", "", 25, ".constants lacks bytes"),
    ],
)
def test_a_wrong_line_is_named(old: str, new: str, column: int, complaint: str) -> None:
    text, line = place(disassemble(one_tile()), old, new)
    with pytest.raises(ProgramError) as caught:
        assemble(text)
    if old == "bytes=304" and new == "bytes=303":
        line += 10  # the last line of the data
    assert (caught.value.section, caught.value.index, caught.value.column) == ("listing", line, column)
    assert str(caught.value).startswith(f"line {line}, column {column}: {complaint}")


@pytest.mark.parametrize("directive", [".program", ".machine", ".constants"])
def test_what_a_listing_must_hold(directive: str) -> None:
    lines = disassemble(replace(one_tile(), constants=b"")).splitlines()
    without = "\n".join(line for line in lines if not line.startswith(directive))
    with pytest.raises(ProgramError, match=rf"^line \d+: the listing ends without \{directive}$"):
        assemble(without)
    (given_line,) = [line for line in lines if line.startswith(directive)]
    with pytest.raises(ProgramError, match=rf"^line {len(lines) + 1}, column 1: \{directive} stands there twice$"):
        assemble("\n".join([*lines, given_line]))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "program.lst"
    path.write_bytes(encode(one_tile()))
    with pytest.raises(ProgramError, match=r"program\.lst is no UTF-8"):
        read_listing(path)


def test_damaged_listings_are_refused_or_read() -> None:
    text = disassemble(one_tile())
    for at in range(0, len(text), 3):
        for damaged in (text[:at], text[:at] + text[at + 1 :], text[:at] + '"' + text[at + 1 :]):
            try:
                program = assemble(damaged)
            except ProgramError as error:
                assert error.section == "listing" and error.index is not None
            else:
                assert assemble(disassemble(program)) == program
