"""The SystemVerilog, run here: values against numpy, cycles against the closed forms and the event model."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from accel_sim.pricing.pipeline import pipeline_cycles
from accel_sim.rtl import build, cosim
from accel_sim.rtl.build import BENCHES, CosimulationError, installed
from accel_sim.rtl.cosim import UNITS, ArrayShape, Gemm, TileProgram, run_gemms, run_programs
from accel_sim.rtl.counts import gemm_sizes, operands, tiled_gemms
from accel_sim.rtl.machine import run_machine
from accel_sim.rtl.tiled import TiledGemm, closed_form

SIMULATORS = installed()
FAST = "verilator" in SIMULATORS
NO_BUILD = "icarus" if "icarus" in SIMULATORS else None
"""Where a few thousand cycles are enough, the simulator that has nothing to compile."""

pytestmark = pytest.mark.skipif(
    not SIMULATORS, reason="neither Verilator (with make and g++) nor Icarus Verilog is installed"
)


def event_model(program: TileProgram) -> int:
    steps = (program.load_cycles(), program.compute_cycles, program.store_cycles())
    machine = (program.buffers, program.latency_cycles, int(program.pipelined), int(program.store_on_channel))
    return int(pipeline_cycles(*steps, len(program.load_bytes), *machine))


def random_programs(count: int, seed: int) -> list[TileProgram]:
    """Steps that need not come from any tiling: many load nothing, or end no tile, or take a single cycle."""
    rng = np.random.default_rng(seed)
    programs = []
    for _ in range(count):
        steps, size = int(rng.integers(1, 30)), int(rng.choice([3, 20, 120]))
        load = rng.integers(0, size, steps) * (rng.random(steps) < rng.choice([0.4, 1.0]))
        store = rng.integers(1, size, steps) * (rng.random(steps) < rng.choice([0.2, 0.6, 1.0]))
        store[-1] = rng.integers(1, size)
        rates = (int(rng.choice([256, 512, rng.integers(128, 64 * 256)])), int(rng.integers(128, 16 * 256)))
        machine = (int(rng.integers(1, 4)), int(rng.choice([0, 1, 2, 9, 100])), *rates)
        flags = (bool(rng.integers(2)), bool(rng.random() < 0.75))
        programs.append(TileProgram(load, rng.integers(1, size, steps), store, *machine, *flags))
    return programs


@pytest.mark.parametrize("shape", [(4, 4), (6, 5)])
def test_values_and_cycles_of_products(shape: tuple[int, int]) -> None:
    sizes = gemm_sizes(*shape, 60, seed=11) if FAST else gemm_sizes(*shape, 0, seed=11)
    gemms = [Gemm(unit, *operands(*size)) for size in sizes for unit in UNITS]
    cases = [(size, unit) for size in sizes for unit in UNITS]
    for (size, unit), gemm, run in zip(cases, gemms, run_gemms(ArrayShape(*shape), gemms), strict=True):
        assert [run.cycles] == closed_form(unit, *shape, [size]), (unit, size)
        assert (run.product == gemm.a.astype(np.int64) @ gemm.b.astype(np.int64)).all(), (unit, size)


@pytest.mark.parametrize("shadow", [False, True])
def test_input_stationary_is_weight_stationary_with_the_operands_swapped(shadow: bool) -> None:
    """F = ceil(K/R) ceil(M/C) folds, past each of which N operands stream: written out here for M, K, N = 9, 10, 7."""
    m, k, n, rows, columns = 9, 10, 7, 4, 4
    a, b = operands(m, k, n)
    (run,) = run_gemms(ArrayShape(rows, columns), [Gemm.input_stationary(a, b, shadow)])
    folds = 3 * 3
    in_turn, overlapped = folds * (2 * rows + columns + n - 1), rows + folds * n + rows + columns - 1
    assert run.cycles == (overlapped if shadow else in_turn)
    assert (a.astype(np.int64) @ b.astype(np.int64) == run.product.T).all()


@pytest.mark.skipif(NO_BUILD is None, reason="Icarus Verilog is not installed")
@pytest.mark.parametrize("shape", [ArrayShape(1, 1), ArrayShape(1, 4), ArrayShape(3, 1), ArrayShape(3, 4, 16, 48)])
def test_narrow_arrays_and_wide_words(shape: ArrayShape) -> None:
    """Arrays of one row or column, and 16-bit data, whose sums pass 32 bits."""
    rng = np.random.default_rng(5)
    sizes = [tuple(int(length) for length in rng.integers(1, 12, 3)) for _ in range(6)]
    limit = 1 << (shape.data_bits - 1)
    gemms = [
        Gemm(unit, rng.integers(-limit, limit, (m, k)), rng.integers(-limit, limit, (k, n)))
        for m, k, n in sizes
        for unit in UNITS
    ]
    if shape.data_bits == 16:
        gemms.append(Gemm("ws_shadow", np.full((2, 9), -limit), np.full((9, 5), -limit)))  # 9 x 2**30
    for gemm, run in zip(gemms, run_gemms(shape, gemms, NO_BUILD), strict=True):
        size = (*gemm.a.shape, gemm.b.shape[1])
        assert [run.cycles] == closed_form(gemm.unit, shape.rows, shape.columns, [size]), (gemm.unit, size)
        assert (run.product == gemm.a @ gemm.b).all(), (gemm.unit, size)


def test_cycles_of_programs() -> None:
    """Tiled products and arbitrary steps, on the pipeline with a counter for the array."""
    programs = random_programs(300 if FAST else 60, seed=3)
    if FAST:
        programs += [case.program() for case in tiled_gemms(100, seed=4)]
    for program, cycles in zip(programs, run_programs(programs), strict=True):
        assert cycles == event_model(program), program


def test_the_arbiter_s_rule_for_ties_matters() -> None:
    """With the load first where a step releases a load and a store, some programs take another time."""
    programs = random_programs(300 if FAST else 60, seed=3)
    other = run_programs([replace(program, load_first_on_ties=True) for program in programs])
    differing = sum(cycles != event_model(program) for program, cycles in zip(programs, other, strict=True))
    assert 0 < differing < len(programs)


def machine_cases(unit: str, count: int) -> list[TiledGemm]:
    rng = np.random.default_rng(7)
    cases = []
    for case in tiled_gemms(count, seed=8, shapes=((4, 4),)):
        m, k, n = (int(size) for size in rng.integers(1, 14, 3))
        tiles = (int(rng.integers(-(-size // 4), size + 1)) for size in (m, k, n))
        tile_m, tile_k, tile_n = tiles
        size = {"m": m, "k": k, "n": n, "tile_m": tile_m, "tile_k": tile_k, "tile_n": tile_n}
        cases.append(replace(case, unit=unit, store_on_channel=1, **size))
    return cases


@pytest.mark.parametrize("unit", UNITS if NO_BUILD else ["ws_shadow"])
def test_the_whole_machine_from_dram_to_dram(unit: str) -> None:
    """The array in the pipeline: the product out of the stored tiles, and the event model's cycles."""
    cases = machine_cases(unit, 12)
    assert sum(len(case.steps()) > 2 * case.buffers for case in cases) >= 4
    pairs = [operands(case.m, case.k, case.n) for case in cases]
    runs = run_machine([(case, *pair) for case, pair in zip(cases, pairs, strict=True)], NO_BUILD)
    for case, (a, b), run in zip(cases, pairs, runs, strict=True):
        assert (run.product == a.astype(np.int64) @ b.astype(np.int64)).all(), case
        assert run.cycles == event_model(case.program()), case


class OneBuffer(TiledGemm):
    """All tiles in the first buffer, whatever the control believes."""

    def slots(self) -> Iterator[tuple[int, int]]:
        return ((0, 0) for _ in self.steps())


def test_a_load_over_a_tile_in_use_gives_wrong_values() -> None:
    """So the values above do say something about the order of loads and products."""
    case = OneBuffer("ws_shadow", 4, 4, 12, 8, 4, 4, 4, 4, 1, 0, 2, 0, 1024, 1024, 1, 1)
    a, b = operands(12, 8, 4)
    (run,) = run_machine([(case, a, b)], NO_BUILD)
    assert (run.product != a.astype(np.int64) @ b.astype(np.int64)).any()


@pytest.mark.skipif(not FAST, reason="Verilator is not installed")
@pytest.mark.parametrize("bench", BENCHES)
def test_the_sources_are_free_of_warnings(bench: str) -> None:
    folder = Path(build.__file__).parent
    sources = [str(folder / f"{name}.sv") for name in (*BENCHES[bench], bench)]
    quiet = ["-Wno-UNUSED", "-Wno-UNSIGNED"]  # spare bits, and comparisons with row 0
    command = ["verilator", "--lint-only", "-Wall", *quiet, "--top-module", bench, *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_requests_that_the_bench_cannot_run_are_refused() -> None:
    one = np.ones((2, 2), np.int64)
    shape = ArrayShape(4, 4)
    for gemm in (Gemm("ws", one * 128, one), Gemm("rs", one, one), Gemm("os", one, np.ones((3, 2), np.int64))):
        with pytest.raises(CosimulationError):
            run_gemms(shape, [gemm])
    with pytest.raises(CosimulationError, match="larger than the bench"):
        run_gemms(shape, [Gemm("ws", np.zeros((1 << 15, 1), np.int64), np.zeros((1, 1), np.int64))])
    with pytest.raises(CosimulationError, match="out of the bench's range"):
        run_programs([replace(random_programs(1, 0)[0], buffers=4)])
    with pytest.raises(CosimulationError):
        ArrayShape(0, 4)


def test_a_bench_that_answers_too_little_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    one = np.ones((2, 2), np.int64)
    monkeypatch.setattr(cosim, "simulate", lambda command, requests: ["20 2", "0000000000000000000000000000000x"])
    with pytest.raises(CosimulationError, match="cut off or undefined"):
        run_gemms(ArrayShape(4, 4), [Gemm("ws", one, one)])


def test_a_build_is_kept_and_named_after_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if NO_BUILD is None:
        pytest.skip("Icarus Verilog is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = Path(build.executable("pipeline_bench", {"STEP_BITS": 4}, "icarus")[-1])
    written = first.stat().st_mtime_ns
    assert build.executable("pipeline_bench", {"STEP_BITS": 4}, "icarus")[-1] == str(first)
    assert first.stat().st_mtime_ns == written and tmp_path in first.parents
    assert build.executable("pipeline_bench", {"STEP_BITS": 5}, "icarus")[-1] != str(first)
    with pytest.raises(CosimulationError, match="iverilog"):
        build.executable("pipeline_bench", {"NO_SUCH_PARAMETER": 1, "STEP_BITS": 1}, "icarus")
