"""Damaged and forged containers: ProgramError with a place, or a valid program; never anything else."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_sim.program.check import check_program
from accel_sim.program.container import MAGIC, SECTIONS, decode, encode, reseal
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Program
from tests.accel_sim.program.forged_containers import ENTRY, HEADER, TABLE_END
from tests.accel_sim.program.program_strategies import PROGRAMS
from tests.accel_sim.program.sample_programs import SAMPLES, SPEC, one_tile, two_layers

FUZZ = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PLACES = {"header", *SECTIONS}


def refused(data: bytes) -> ProgramError:
    with pytest.raises(ProgramError) as caught:
        decode(data)
    assert caught.value.section in PLACES
    return caught.value


def refused_or_valid(data: bytes) -> bool:
    """Whether the bytes are a program that the machine can run; True if so."""
    try:
        program = decode(data, SPEC)
        assert encode(program) == data  # one encoding only: nothing that was read went unnoticed
        check_program(program, SPEC)
    except ProgramError as error:
        assert error.section in PLACES
        return False
    return True


@FUZZ
@given(st.binary(max_size=2000))
def test_random_bytes(data: bytes) -> None:
    refused(data)
    refused(MAGIC + data)
    refused(MAGIC + struct.pack("<I", 1) + data)


def test_truncation_at_every_byte() -> None:
    data = encode(one_tile())
    for size in range(len(data)):
        refused(data[:size])


@pytest.mark.parametrize("name", SAMPLES)
def test_truncation_at_every_border_resealed(name: str) -> None:
    """As an adversary would: the file's length and the checksums fit again."""
    data = encode(SAMPLES[name]())
    borders = {0, HEADER, TABLE_END, len(data)}
    for number in range(len(SECTIONS)):
        offset, size = struct.unpack_from("<qq", data, HEADER + number * ENTRY + 8)
        borders |= {offset, offset + size}
    for border in sorted(borders):
        for size in {max(border - 1, 0), border, min(border + 1, len(data))} - {len(data)}:
            cut = bytearray(data[:size])
            if size >= TABLE_END:
                struct.pack_into("<q", cut, 24, size)
                cut = bytearray(reseal(cut))
            refused(bytes(cut))


def test_every_flipped_bit_is_seen() -> None:
    data = bytearray(encode(one_tile()))
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            refused(bytes(data))
            data[at] ^= 1 << bit


def flips(data: bytes, step: int) -> Iterator[bytes]:
    rng = np.random.default_rng(3)
    for at in range(int(rng.integers(step)), len(data) * 8, step):
        forged = bytearray(data)
        forged[at // 8] ^= 1 << (at % 8)
        yield reseal(forged)


@pytest.mark.parametrize(("name", "step"), [("one_tile", 23), ("two_layers", 83)])
def test_flipped_bits_resealed(name: str, step: int) -> None:
    accepted = [refused_or_valid(data) for data in flips(encode(SAMPLES[name]()), step)]
    assert 0 < sum(accepted) < len(accepted)  # a constant or a scale is another one, and the program still can run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("one_tile", 1), ("two_layers", 5)])
def test_every_flipped_bit_resealed(name: str, step: int) -> None:
    for data in flips(encode(SAMPLES[name]()), step):
        refused_or_valid(data)


def test_random_damage_resealed() -> None:
    """Several bytes at a time, among them those that make numbers large."""
    rng = np.random.default_rng(4)
    data = encode(two_layers())
    for _ in range(300):
        forged = bytearray(data)
        for at in rng.integers(8, len(data), rng.integers(1, 5)).tolist():
            forged[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
        refused_or_valid(reseal(forged))


@FUZZ
@given(PROGRAMS)
def test_programs_of_random_values_are_refused_with_a_place(program: Program) -> None:
    with pytest.raises(ProgramError) as caught:
        check_program(program, SPEC)
    assert caught.value.section == "header"  # the hash; then what the machine cannot run
    with pytest.raises(ProgramError) as caught:
        check_program(
            Program(**{**vars(program), "spec_hash": one_tile().spec_hash, "columns": 16, "dram_bytes": 1 << 40}), SPEC
        )
    assert caught.value.section in PLACES


HUGE = (0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 1 << 40)


def test_a_forged_length_takes_no_memory() -> None:
    """Every number in header, section table and variable-size sections made huge: refused within 4 MiB."""
    data = encode(two_layers())
    places = [*range(8, TABLE_END, 4)]
    for number in (7, 8, 9):
        offset, size = struct.unpack_from("<qq", data, HEADER + number * ENTRY + 8)
        places += range(offset, offset + size - 8, 5)
    decode(data)
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        for at in places:
            for value in HUGE:
                forged = bytearray(data)
                width = 4 if value < 1 << 32 else 8
                forged[at : at + width] = value.to_bytes(width, "little")
                refused_or_none(reseal(forged))
        assert tracemalloc.get_traced_memory()[1] - base < 4 << 20
    finally:
        tracemalloc.stop()


def refused_or_none(data: bytes) -> None:
    try:
        decode(data)
    except ProgramError as error:
        assert error.section in PLACES
