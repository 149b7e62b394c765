"""The kept counts of the SystemVerilog against the closed forms and the event model: runs everywhere."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from accel_sim.pricing.pipeline import pipeline_cycles
from accel_sim.rtl import build
from accel_sim.rtl.build import CosimulationError, source_digest
from accel_sim.rtl.cosim import UNITS
from accel_sim.rtl.counts import (
    GEMM_COLUMNS,
    PIPELINE_COLUMNS,
    SHAPES,
    checksum,
    gemm_sizes,
    operands,
    read_table,
    tiled_gemms,
)
from accel_sim.rtl.tiled import TiledGemm, closed_form

HERE = Path(__file__).parent
GEMMS = HERE / "gemm_counts.csv"
PROGRAMS = HERE / "pipeline_counts.csv"


def tiled_gemm(row: dict[str, str]) -> TiledGemm:
    return TiledGemm(**{f.name: row[f.name] if f.name == "unit" else int(row[f.name]) for f in fields(TiledGemm)})


@pytest.mark.parametrize(("table", "bench"), [(GEMMS, "gemm_bench"), (PROGRAMS, "pipeline_bench")])
def test_the_table_is_of_the_present_sources(table: Path, bench: str) -> None:
    head, _ = read_table(table)
    assert head.endswith(f"sources {source_digest(bench)}"), "regenerate the table: docs/rtl.md says how"


def test_the_tables_hold_what_they_should() -> None:
    _, gemms = read_table(GEMMS)
    assert tuple(gemms[0]) == GEMM_COLUMNS
    per_shape = Counter((int(row["rows"]), int(row["columns"])) for row in gemms)
    assert set(per_shape) == set(SHAPES) and min(per_shape.values()) >= 100
    assert len(gemms) * len(UNITS) >= 1000
    assert {"1"} <= {row[side] for row in gemms for side in "mkn"}
    _, programs = read_table(PROGRAMS)
    assert tuple(programs[0]) == PIPELINE_COLUMNS
    assert len(programs) >= 500
    seen = {name: {row[name] for row in programs} for name in ("unit", "buffers", "pipelined", "store_on_channel")}
    assert seen["unit"] == set(UNITS) and seen["buffers"] == {"1", "2", "3"}
    assert seen["pipelined"] == seen["store_on_channel"] == {"0", "1"}


@pytest.mark.parametrize("unit", UNITS)
def test_cycles_of_products_are_the_closed_forms(unit: str) -> None:
    for row in read_table(GEMMS)[1]:
        shape, size = (int(row["rows"]), int(row["columns"])), (int(row["m"]), int(row["k"]), int(row["n"]))
        assert closed_form(unit, *shape, [size]) == [int(row[unit])], row


def test_products_are_those_of_numpy() -> None:
    for row in read_table(GEMMS)[1]:
        a, b = operands(int(row["m"]), int(row["k"]), int(row["n"]))
        assert checksum(a.astype(np.int64) @ b.astype(np.int64)) == int(row["crc"]), row


def test_operands_fill_the_width_and_never_change() -> None:
    a, b = operands(40, 50, 60)
    assert (a.shape, b.shape) == ((40, 50), (50, 60))
    assert set(np.unique(a)) == set(range(-128, 128)) == set(np.unique(b))
    m, k, n = 2, 3, 4
    expected = []
    for at in range(1, m * k + k * n + 1):  # splitmix64 in whole numbers (Steele, Lea, Flood 2014), highest byte
        z = (at + (m << 42) + (k << 21) + n) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(((z >> 56) + 128) % 256 - 128)
    a, b = operands(m, k, n)
    assert [*a.ravel().tolist(), *b.ravel().tolist()] == expected


def test_cycles_of_programs_are_the_event_model_s() -> None:
    for row in read_table(PROGRAMS)[1]:
        program = tiled_gemm(row).program()
        steps = (program.load_cycles(), program.compute_cycles, program.store_cycles())
        machine = (program.buffers, program.latency_cycles, int(program.pipelined), int(program.store_on_channel))
        assert pipeline_cycles(*steps, len(program.load_bytes), *machine) == int(row["cycles"]), row


def test_the_other_rule_for_ties_gives_other_counts() -> None:
    """Only with stores on the channel can the rule matter."""
    rows = read_table(PROGRAMS)[1]
    differing = [row for row in rows if row["cycles"] != row["cycles_load_first_on_ties"]]
    assert 0.02 * len(rows) < len(differing) < len(rows)
    assert {row["store_on_channel"] for row in differing} == {"1"}


def test_the_cases_can_be_generated_again() -> None:
    """A new table would be of the same products and programs."""
    rows = read_table(GEMMS)[1]
    for shape in SHAPES:
        kept = [row for row in rows if (int(row["rows"]), int(row["columns"])) == shape]
        sizes = [(int(row["m"]), int(row["k"]), int(row["n"])) for row in kept]
        assert sizes[:8] == gemm_sizes(*shape, 0, seed=1)
    for case in tiled_gemms(50, seed=9):
        steps = case.steps()
        assert sum(step.gemm[0] * step.gemm[1] * step.gemm[2] for step in steps) == case.m * case.k * case.n
        assert sum(step.store_bytes for step in steps) == case.m * case.n  # every output once
        assert sum(step.load_bytes for step in steps) >= case.m * case.k + case.k * case.n


def test_the_sources_are_shipped() -> None:
    package = Path(build.__file__).parent.parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["accel_sim"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    wanted = {path for path in (package / "rtl").iterdir() if path.suffix in (".sv", ".cpp")}
    assert wanted and wanted <= shipped


def test_without_a_simulator_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert build.installed() == ()
    with pytest.raises(CosimulationError, match="apt-get install verilator"):
        build.choose(None)
