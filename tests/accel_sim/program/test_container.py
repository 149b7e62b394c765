"""The container: what is written is read back, and what is no program is refused with the place."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from accel_sim.program.container import MAGIC, decode, encode, read_program, reseal, write_program
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Halt, Load, Loops, Matmul, Program, Space, Store, Token
from accel_sim.program.machine_hash import machine_text, spec_hash
from accel_sim.program.record_layouts import INSTRUCTIONS, Opcode
from accel_sim.program.records import code_table
from accel_sim.spec_file import load_spec, presets
from tests.accel_sim.program.forged_containers import ENTRY, HEADER
from tests.accel_sim.program.sample_programs import EMPTY, SAMPLES, SPEC, one_tile, two_layers

SECTIONS = 11


def section(data: bytes, number: int) -> tuple[int, int]:
    """Offset and size of a section, read by hand."""
    _, _, offset, size, _, _ = struct.unpack_from("<IIqqII", data, HEADER + number * ENTRY)
    return offset, size


@pytest.mark.parametrize("name", SAMPLES)
def test_round_trip(name: str) -> None:
    program = SAMPLES[name]()
    data = encode(program)
    assert decode(data, SPEC) == program
    assert encode(decode(data)) == data
    assert [type(entry) for entry in decode(data).code] == [type(entry) for entry in program.code]
    assert reseal(data) == data


def test_an_empty_program_takes_the_header_and_one_instruction() -> None:
    data = encode(EMPTY)
    assert len(data) == HEADER + SECTIONS * ENTRY + 32 + 128  # up to a multiple of 64; 96 bytes and 32 zeros
    assert decode(data) == EMPTY


def test_the_bytes_are_as_documented() -> None:
    program = one_tile()
    data = encode(program)
    assert data[:8] == MAGIC
    assert struct.unpack_from("<IIII", data, 8) == (1, HEADER + SECTIONS * ENTRY, SECTIONS, 16)
    assert struct.unpack_from("<qqq", data, 24) == (len(data), 496, 192)
    assert data[48:80] == spec_hash(SPEC)
    offset, size = section(data, 0)
    assert (offset, size) == (512, 7 * 96)
    load = data[offset + 96 * 2 : offset + 96 * 3]
    assert load[:5] == bytes([1, 0, 1, 1, 0])
    assert struct.unpack_from("<qii3i3i3q", load, 8) == (192, 128, 304, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    matmul = data[offset + 96 * 4 : offset + 96 * 5]
    assert matmul[:5] == bytes([3, 0, 4, 0, 0])
    assert struct.unpack_from("<8i", matmul, 8) == (0, 0, 128, 0, 416, 8, 4, 0)
    store = data[offset + 96 * 5 : offset + 96 * 6]
    assert struct.unpack_from("<qii", store, 8) == (128, 0, 64)
    assert struct.unpack_from("<5i", store, 72) == (-1, 0, 0, 0, 4)
    constants, size = section(data, 10)
    assert data[constants : constants + size] == program.constants
    scales, size = section(data, 5)
    assert np.frombuffer(data[scales : scales + size], "<f4").tolist() == list(program.scales)


def test_extreme_values_survive() -> None:
    edge = Load(
        (1 << 63) - 1,
        (1 << 31) - 1,
        Loops((1 << 31) - 1, (-1, 0, 1), (-(1 << 63), (1 << 63) - 1, 0), (-(1 << 31), 2, 3)),
        Space.ACCUMULATOR,
        True,
        Token(15),
        Token(10),
    )
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    program = replace(EMPTY, code=(edge, Halt()), scales=(smallest, -0.0, float(np.finfo(np.float32).max)))
    back = decode(encode(program))
    assert back == program
    assert str(back.scales[1]) == "-0.0"


def test_code_as_a_table() -> None:
    program = two_layers()
    table = code_table(program)
    stores = table.view(INSTRUCTIONS[Opcode.STORE].dtype)[table["opcode"] == Opcode.STORE]
    expected = [entry for entry in program.code if isinstance(entry, Store)]
    assert stores["residual_address"].tolist() == [entry.residual_address for entry in expected]
    assert stores["counts"].tolist() == [list(entry.loops.counts) for entry in expected]
    assert stores["wait"].tolist() == [int(entry.wait) for entry in expected]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scales": (0.1,)}, r"^scales\[0\]: scale is 0\.1; expected a finite number that float32 holds exactly"),
        ({"scales": (1.0, float("nan"))}, r"^scales\[1\]: scale is nan"),
        ({"scales": (1e39,)}, r"^scales\[0\]: scale is 1e\+39"),
        ({"scales": ("1",)}, r"^scales\[0\]: scale is '1'"),
        ({"tables": (bytes(255),)}, r"^tables\[0\]: expected 256 bytes"),
        ({"code": (Halt(), None)}, r"^instruction 1: NoneType is no instruction"),
        (
            {"code": (Load(1 << 63, 0, Loops(1)),)},
            r"^instruction 0: dram_address is 9223372036854775808; expected a whole",
        ),
        ({"code": (Halt(), Load(0, 1 << 31, Loops(1)))}, r"^instruction 1: chip_address is 2147483648; expected"),
        ({"code": (Load(0, 0, Loops(1, (1, 1))),)}, r"^instruction 0: loops\.counts is \(1, 1\); expected three whole"),  # type: ignore[arg-type]
        ({"code": (Load(0, 0, Loops(1.5)),)}, r"^instruction 0: loops\.run is 1\.5; expected a whole number"),  # type: ignore[arg-type]
        ({"code": (Matmul(0, 0, 0, 0, 1, 1, wait=16),)}, r"^instruction 0: wait is 16; expected 0 to 15"),  # type: ignore[arg-type]
        ({"code": (Matmul(0, 0, 0, 0, 1, 1, dataflow=3),)}, r"^instruction 0: dataflow is 3; expected one of 0 weight"),  # type: ignore[arg-type]
        ({"spec_hash": b"short"}, r"^header: spec_hash is b'short'; expected 32 bytes"),
        ({"columns": 0}, r"^header: columns is 0"),
        ({"dram_bytes": -1}, r"^header: dram_bytes is -1"),
        (
            {"tensors": (replace(one_tile().tensors[0], role="temp"),)},
            r"^tensors\[0\]: role is 'temp'; expected one of",
        ),
        ({"tensors": (replace(one_tile().tensors[0], name="\ud800"),)}, r"^tensors\[0\]: name '\\ud800' is no text"),
    ],
)
def test_what_the_format_does_not_hold_is_not_written(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ProgramError, match=complaint):
        encode(replace(EMPTY, **change))  # type: ignore[arg-type]


def forged(offset: int, form: str, *values: int) -> bytes:
    data = bytearray(encode(two_layers()))
    struct.pack_into(form, data, offset, *values)
    return reseal(data)


CODE = 512


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", r"^header: the file begins with b''"),
        (encode(EMPTY).replace(b"\r\n", b"\n"), r"^header: the file begins with"),
        (MAGIC + bytes(3), r"^header: the file has 11 bytes and ends before its version"),
        (MAGIC + struct.pack("<I", 2) + bytes(1000), r"^header: format version 2; this reader knows version 1"),
        (encode(EMPTY)[:479], r"^header: the file has 479 bytes; expected at least 480"),
        (encode(EMPTY) + bytes(64), r"^header: file size is 640; expected 704"),
        (forged(12, "<I", 448), r"^header: header size is 448; expected 480"),
        (forged(16, "<I", 12), r"^header: number of sections is 12; expected 11"),
        (forged(20, "<I", 0), r"^header: columns is 0"),
        (forged(32, "<q", -1), r"^header: dram_bytes is -1"),
        (forged(100, "<B", 1), r"^header: reserved bytes are set"),
        (forged(HEADER + ENTRY, "<I", 2), r"^windows: entry 1 of the section table is for section 2; expected 1"),
        (forged(HEADER + 28, "<I", 1), r"^code: reserved field is 1; expected 0"),
        (forged(HEADER + 8, "<q", 576), r"^code: begins at byte 576; expected 512"),
        (forged(HEADER + 16, "<q", 1 << 62), r"^code: 4611686018427387904 bytes from byte 512; the file has"),
        (forged(HEADER + 16, "<q", -96), r"^code: -96 bytes from byte 512"),
        (forged(HEADER + 24, "<I", 0xFFFFFFFF), r"^code: \d+ bytes; expected 4294967295 entries of 96 bytes"),
        (forged(500, "<B", 1), r"^code: bytes 480 to 512 between sections are not all zero"),
        (forged(CODE + 96 * 3, "<B", 9), r"^instruction 3: opcode is 9; known are 1 load, 2 preload"),
        (forged(CODE + 96 * 3, "<B", 0), r"^instruction 3: opcode is 0"),
        (forged(CODE + 96 + 1, "<B", 16), r"^instruction 1: wait is 16; expected 0 to 15, a set of tokens"),
        (forged(CODE + 96 + 3, "<B", 2), r"^instruction 1: chained is 2; expected 0 or 1"),
        (forged(CODE + 96 + 4, "<B", 2), r"^instruction 1: space is 2; expected one of 0 scratchpad, 1 accumulator"),
        (forged(CODE + 96 + 90, "<B", 7), r"^instruction 1: reserved byte 90 is 7; expected 0"),
        (forged(section(encode(two_layers()), 5)[0], "<I", 0x7FC00000), r"^scales\[0\]: expected a finite number"),
        (forged(section(encode(two_layers()), 3)[0], "<I", 0x7F800000), r"^sums\[0\]: own_ratio is inf; expected"),
        (forged(section(encode(two_layers()), 7)[0], "<I", 1 << 31), r"^tensors\[0\]: length of name is 2147483648; "),
        (forged(section(encode(two_layers()), 7)[0] + 4, "<B", 0xFF), r"^tensors\[0\]: name is no UTF-8"),
        (forged(section(encode(two_layers()), 7)[0] + 5, "<B", 3), r"^tensors\[0\]: role is 3; expected 0 to 2"),
        (forged(HEADER + 7 * ENTRY + 24, "<I", 4), r"^tensors: \d+ bytes behind the last entry"),
        (forged(HEADER + 7 * ENTRY + 24, "<I", 1 << 31), r"^tensors\[5\]: length of name takes 4 bytes; 0 are left"),
        (forged(HEADER + 10 * ENTRY + 24, "<I", 1), r"^constants: 1 entries; expected 0"),
    ],
)
def test_what_is_no_program_is_refused_with_its_place(data: bytes, complaint: str) -> None:
    with pytest.raises(ProgramError, match=complaint):
        decode(data)


def test_a_checksum_names_its_section() -> None:
    data = bytearray(encode(two_layers()))
    data[CODE + 100] ^= 4
    with pytest.raises(ProgramError, match=r"^code: checksum is [0-9a-f]{8}; the section table says [0-9a-f]{8}$"):
        decode(data)
    data[50] ^= 1
    with pytest.raises(ProgramError, match=r"^header: checksum is"):
        decode(data)


def test_the_hash_names_what_programs_depend_on() -> None:
    hashes = {spec_hash(load_spec(name)) for name in presets()}
    assert len(hashes) == len(presets())
    same = ("bytes_per_cycle", "4"), ("latency_cycles", "7"), ("clock_mhz", "10"), ("lanes", "8"), ("mac_pj", "9")
    for key, value in (*same, ("weight_shadow", "false"), ("double_buffered", "false"), ("call_cycles", "1")):
        assert spec_hash(load_spec("edge_16x16", {key: value})) == spec_hash(SPEC), key
    other = ("rows", "8"), ("columns", "8"), ("dataflows", "os"), ("accumulator_bits", "48"), ("input_kib", "64")
    for key, value in (*other, ("weight_kib", "64"), ("accumulator_kib", "32"), ("shared_input_weight", "false")):
        assert spec_hash(load_spec("edge_16x16", {key: value})) != spec_hash(SPEC), key
    two, turned = {"dataflows": "ws+os"}, {"dataflows": "os+ws"}
    assert machine_text(load_spec("edge_16x16", two)) == machine_text(load_spec("edge_16x16", turned))


def test_another_machine_is_refused(tmp_path: Path) -> None:
    data = encode(one_tile())
    with pytest.raises(ProgramError, match=r"^header: the program is for machine [0-9a-f]{64}; 'tpu_256x256' is"):
        decode(data, load_spec("tpu_256x256"))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "program.bin"
    write_program(one_tile(), path)
    write_program(two_layers(), path)
    assert read_program(path, SPEC) == two_layers()
    with pytest.raises(ProgramError):
        write_program(replace(EMPTY, scales=(0.1,)), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["program.bin"]
    assert read_program(path) == two_layers()
    with pytest.raises(FileNotFoundError):
        read_program(tmp_path / "nothing.bin")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program.bin"
    write_program(one_tile(), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_program(two_layers(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["program.bin"]
    assert read_program(path) == one_tile()


def test_many_instructions() -> None:
    program: Program = two_layers()
    many = replace(program, code=(*(program.code[:-1] * 300)[:9000], Halt()))
    assert decode(encode(many)).code == many.code
