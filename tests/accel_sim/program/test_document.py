"""docs/program.md says what the code does: layouts, offsets, the listing, the magic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from accel_sim.program.container import MAGIC, SECTIONS
from accel_sim.program.isa import Token
from accel_sim.program.listing import disassemble
from accel_sim.program.machine_hash import machine_text
from accel_sim.program.record_layouts import DESCRIPTORS, INSTRUCTIONS, Record
from tests.accel_sim.program.sample_programs import SPEC, one_tile

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "program.md").read_text(encoding="utf-8")
TYPES = {"|u1": "u8", "<i4": "i32", "<i8": "i64", "<f4": "f32"}


def fields(record: Record) -> str:
    found = sorted((offset, name, kind) for name, (kind, offset, *_) in (record.dtype.fields or {}).items())
    return ", ".join(
        f"{offset} `{name}` {TYPES[kind.base.str]}{'[3]' if kind.shape else ''}" for offset, name, kind in found
    )


def test_records() -> None:
    for opcode, record in INSTRUCTIONS.items():
        assert f"| {int(opcode)} | {opcode.name.lower()} | {fields(record)} |\n" in TEXT
    for number, section in enumerate(SECTIONS):
        assert f"| {number} | {section} | " in TEXT
    for section, record in DESCRIPTORS.items():
        assert f"| {section} | {fields(record)} |\n" in TEXT
        assert f" {section} | records of {record.dtype.itemsize} bytes |" in TEXT


def test_numbers_and_names() -> None:
    assert f"magic `{MAGIC.hex(' ')}`" in TEXT
    for token in Token:
        if token:
            assert f"| `{str(token.name).lower()}` | {int(token)} | " in TEXT
    keys = re.findall(r"^(\S+)=", machine_text(SPEC), re.MULTILINE)
    begin = TEXT.index("**The spec hash**")
    assert re.findall(r"`([a-z]+\.[a-z_]+)`", TEXT[begin : TEXT.index("Not in it", begin)]) == keys


def test_the_listing_is_a_real_one() -> None:
    (shown,) = re.findall(r"```\n(\.program.*?)```", TEXT, re.DOTALL)
    assert disassemble(one_tile(), SPEC).startswith(shown)


@pytest.mark.parametrize("module", ["container", "listing", "assembler", "check"])
def test_the_api_exists(module: str) -> None:
    (names,) = re.findall(rf"from accel_sim\.program\.{module} import (.*)", TEXT)
    imported = __import__(f"accel_sim.program.{module}", fromlist=["x"])
    assert all(hasattr(imported, name) for name in names.split(", "))
