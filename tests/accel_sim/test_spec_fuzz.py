"""Damaged machine descriptions: SpecError with the file's name in one line, or a machine; never anything else."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_sim.program.machine_hash import spec_hash
from accel_sim.spec import SpecError
from accel_sim.spec_file import load_spec, presets

TEXTS = {
    name: (resources.files("accel_sim") / "targets" / f"{name}.toml").read_text(encoding="utf-8") for name in presets()
}
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def outcome(path: Path, data: bytes | str) -> bool:
    """Whether a file is a machine; a refusal must name it, in one line."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    try:
        spec = load_spec(path)
    except SpecError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    assert_numbers_are_finite(spec)
    assert len(spec_hash(spec)) == 32
    return True


def assert_numbers_are_finite(value: Any) -> None:
    if is_dataclass(value):
        for field in fields(value):
            assert_numbers_are_finite(getattr(value, field.name))
    elif isinstance(value, float):
        assert math.isfinite(value)


@pytest.mark.parametrize("name", presets())
def test_truncated_at_every_byte(name: str, tmp_path: Path) -> None:
    data = TEXTS[name].encode("utf-8")
    end = len(data.rstrip())
    machines = [size for size in range(0, len(data), 11) if outcome(tmp_path / "chip.toml", data[:size])]
    # Whatever is cut off of the last number's digits leaves a number.
    assert all(size >= end - 4 for size in machines)


@pytest.mark.parametrize("name", presets())
def test_flipped_bits(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(len(name))
    data = TEXTS[name].encode("utf-8")
    for at in rng.integers(0, len(data) * 8, 120).tolist():
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << (at % 8)
        outcome(tmp_path / "chip.toml", bytes(flipped))


@pytest.mark.parametrize("name", presets())
def test_lines_doubled_dropped_or_swapped(name: str, tmp_path: Path) -> None:
    path = tmp_path / "chip.toml"
    lines = TEXTS[name].split("\n")
    for at, line in enumerate(lines):
        is_said = bool(line.strip()) and not line.startswith("#")
        doubled = "\n".join([*lines[: at + 1], *lines[at:]])
        dropped = "\n".join([*lines[:at], *lines[at + 1 :]])
        if is_said:  # each key once, each section once
            assert not outcome(path, doubled), line
            assert not outcome(path, dropped), line
        elif line.startswith("#"):
            assert outcome(path, doubled) and outcome(path, dropped), line


WRONG = [
    *("true", '"16"', "-1", "0x7fffffffffffffff", "1e308", "inf", "-inf", "nan", "[]", "{}", "[[1]]", "1979-05-27"),
    *("9" * 400, "9" * 5000, "1e999", '""', '"\\u0000"', "{ rows = 1 }", "[true]", "07:32:00", "-0.0", "1_000"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_every_value_of_another_type(wrong: str, tmp_path: Path) -> None:
    lines = TEXTS["edge_16x16"].split("\n")
    accepted = []
    for at, line in enumerate(lines):
        key, equals, _ = line.partition(" = ")
        if equals and not line.startswith("#"):
            changed = "\n".join([*lines[:at], f"{key} = {wrong}", *lines[at + 1 :]])
            if outcome(tmp_path / "chip.toml", changed):
                accepted.append(key)
    legal = {
        '"16"': {"name", "source"},
        '"\\u0000"': {"name", "source"},
        "true": {k for k, v in flat(tomllib.loads(TEXTS["edge_16x16"])).items() if isinstance(v, bool)},
    }
    if wrong not in ("-0.0", "1_000"):  # numbers that some keys may be
        assert set(accepted) == legal.get(wrong, set()), accepted


def flat(table: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value) if isinstance(value, dict) else {key: value}
    return found


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "\x00",
            "=",
            "[",
            "[array]\n[array]",
            "a = " + "[" * 50_000,
            "a = " + "{b = " * 5_000,
            "a." * 5_000 + "a = 1",
        ),
        *("name = 'x'\nname = 'y'", "[array]\nrows = 1\n[array]\nrows = 2", "array.rows = 1\n[array]\ncolumns = 1"),
        *("\u2028" * 3 + "=", "\x0b\n=", "x = 1\r", 'name = "\\ud800"', "[\x85]\n[[[", "a = '''\n\n\n", "a = 1\n\n\n="),
    ],
    ids=range(18),
)
def test_what_is_hardly_toml(text: str, tmp_path: Path) -> None:
    assert not outcome(tmp_path / "chip.toml", text)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert not outcome(tmp_path / "chip.toml", rng.bytes(int(rng.integers(1, 200))))


KEYS = sorted(
    {*flat(tomllib.loads(TEXTS["edge_16x16"])), "sram_kib", "array.rows", "dram", "", "host.", ".rows", "name"}
)
VALUES = st.one_of(
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(["9" * 5000, "1e999", "nan", "true", "ws+os", "ws+ws", "+", "\u0661", "1_6", " 16 "]),
)


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_overrides(changes: dict[str, str]) -> None:
    try:
        spec = load_spec("edge_16x16", changes)
    except SpecError as error:
        assert str(error)
    else:
        assert_numbers_are_finite(spec)
