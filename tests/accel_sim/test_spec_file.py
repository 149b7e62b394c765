"""Machine descriptions: what is read, and that each complaint names file and key."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from accel_sim.spec import SpecError
from accel_sim.spec_file import DEFAULT_PRESET, load_spec, presets

TEXT = (resources.files("accel_sim") / "targets" / "edge_16x16.toml").read_text(encoding="utf-8")


def changed(tmp_path: Path, old: str, new: str) -> Path:
    assert TEXT.count(old) == 1, f"{old!r} must stand once in the preset"
    path = tmp_path / "chip.toml"
    path.write_text(TEXT.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert f"{spec.array.rows}x{spec.array.columns}" == name.rsplit("_", maxsplit=1)[1]
    assert spec.energy.source


def test_the_default_is_among_the_presets() -> None:
    assert set(presets()) == {"edge_16x16", "gemmini_16x16", "eyeriss_12x14", "tpu_256x256"}
    assert load_spec() == load_spec(DEFAULT_PRESET)


def test_published_figures() -> None:
    eyeriss, tpu = load_spec("eyeriss_12x14"), load_spec("tpu_256x256")
    pads = eyeriss.scratchpads
    assert eyeriss.peak_macs_per_cycle == 168
    assert pads.input_kib + pads.weight_kib + pads.accumulator_kib == 108
    assert round(tpu.peak_macs_per_cycle * 2 * tpu.clock_mhz * 1e6 / 1e12) == 92  # TOPS
    assert tpu.scratchpads.input_kib + tpu.scratchpads.accumulator_kib == 28 * 1024


def test_a_systolic_array_has_no_row_stationary_section() -> None:
    assert load_spec().row_stationary is None
    wide = load_spec("eyeriss_12x14", {"psum_bus_bits": "128"})
    assert wide.row_stationary is not None and wide.row_stationary.psum_bus_bits == 128
    with pytest.raises(SpecError, match=r"eyeriss_12x14\.toml: the section \[row_stationary\] belongs to"):
        load_spec("eyeriss_12x14", {"dataflows": "ws"})


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("rows = 16", "rows = 16\nrosw = 3", r"chip\.toml: unknown key array\.rosw"),
        ("rows = 16", "rows = 16\nrows = 32", r"chip\.toml: .*'rows = 32'"),
        ("rows = 16\n", "", r"chip\.toml: key array\.rows is missing"),
        ("rows = 16", "rows = 16.5", r"chip\.toml: array\.rows must be a whole number, not 16\.5"),
        ("rows = 16", "rows = true", r"chip\.toml: array\.rows must be a whole number, not True"),
        ("rows = 16", "rows = 0", r"chip\.toml: array\.rows is 0; allowed is 1 to 4096"),
        ("weight_shadow = true", "weight_shadow = 1", r"array\.weight_shadow must be true or false, not 1"),
        ('dataflows = ["ws"]', 'dataflows = ["xs"]', r"array\.dataflows holds 'xs'; allowed are ws, os, is, rs"),
        ('dataflows = ["ws"]', 'dataflows = ["rs"]', r"chip\.toml: the section \[row_stationary\] belongs to .*rs"),
        (
            'dataflows = ["ws"]',
            'dataflows = ["rs", "os"]',
            r"array\.dataflows is \['rs', 'os'\]: a row-stationary array",
        ),
        (
            "[vector]",
            "[row_stationary]\npsum_bus_bits = 64\n[vector]",
            r"key row_stationary\.filter_bus_bits is missing",
        ),
        ('dataflows = ["ws"]', 'dataflows = ["ws", "ws"]', r"array\.dataflows names one entry twice"),
        ('dataflows = ["ws"]', "dataflows = []", r"array\.dataflows must be a list of strings that is not empty"),
        ("data_bits = 8", "data_bits = 7", r"datatypes\.data_bits is 7; allowed are 8, 16, 32"),
        ("bytes_per_cycle = 16.0", "bytes_per_cycle = nan", r"dram\.bytes_per_cycle is nan; allowed is"),
        ("bytes_per_cycle = 16.0", 'bytes_per_cycle = "16"', r"dram\.bytes_per_cycle must be a number"),
        ("[vector]", "[vectors]", r"chip\.toml: unknown key vectors"),
        ("[vector]\nlanes = 16", "vector = 16", r"chip\.toml: "),
        ("clock_mhz = 1000.0", "clock_mhz = -1.0", r"chip\.toml: clock_mhz is -1\.0"),
        ('name = "edge_16x16"', 'name = " "', r"chip\.toml: name is empty"),
        ("[array]", "[array", r"chip\.toml: .*\[array"),
    ],
)
def test_a_bad_file_is_refused_with_its_key(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint) as caught:
        load_spec(changed(tmp_path, old, new))
    assert "\n" not in str(caught.value)


def test_whole_numbers_serve_as_rates(tmp_path: Path) -> None:
    assert load_spec(changed(tmp_path, "bytes_per_cycle = 16.0", "bytes_per_cycle = 4")).dram.bytes_per_cycle == 4.0


def test_overrides() -> None:
    changes = {"rows": "32", "array.columns": "8", "sram_kib": "65", "weight_shadow": "false", "dataflows": "ws+os"}
    spec = load_spec("edge_16x16", changes)
    assert (spec.array.rows, spec.array.columns, spec.array.weight_shadow) == (32, 8, False)
    assert (spec.scratchpads.input_kib, spec.scratchpads.weight_kib) == (33, 32)
    assert spec.array.dataflows == ("ws", "os")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("rwos", "32", "override rwos=32: no such key; known are .*rows"),
        ("rows", "many", "override rows=many: expected a whole number"),
        ("rows", "9999", r"array\.rows is 9999; allowed is 1 to 4096"),
        ("sram_kib", "1", "override sram_kib=1: must be at least 2"),
        ("weight_shadow", "yes", "override weight_shadow=yes: expected true or false"),
        ("dataflows", "ws+xs", r"array\.dataflows holds 'xs'"),
        ("dataflows", "ws+rs", r"array\.dataflows is .*a row-stationary array has no other"),
    ],
)
def test_a_bad_override_is_named(key: str, value: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        load_spec("edge_16x16", {key: value})


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no machine is called 'edge'.*edge_16x16"):
        load_spec("edge")
    with pytest.raises(SpecError, match=r"nowhere\.toml: cannot be read"):
        load_spec(tmp_path / "nowhere.toml")
