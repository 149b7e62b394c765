"""The accelerator's benchmarks in small: shapes of their results, and what must hold whatever the machine's speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from accel_sim.pricing.price_list import PriceList
from accel_sim.scalesim_compat import output_size, scalesim_counts
from accel_sim.spec_file import load_spec
from codegen.bench.asic_pricing import AsicPricing, random_layers
from codegen.bench.asic_vs_scalesim import LAYERS, AsicVsScalesim, scalesim_layer
from codegen.bench.cpu_time import cpu_time
from codegen.bench.scalesim_environment import ScaleSim, default_folder, make_environment
from codegen.bench.staircase import Staircase, tucker_chain
from codegen.bench.validation import Validation
from codegen.events import QuietEvents
from passes.errors import InputError, UsageError

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_cpu_time_warms_up_and_orders_its_samples() -> None:
    calls: list[int] = []
    taken = cpu_time(lambda: calls.append(sum(range(20_000))), repeats=3)
    assert 0 < taken.low_s <= taken.median_s <= taken.high_s < 1
    assert len(calls) > 4


def test_random_layers_come_from_the_seed() -> None:
    assert random_layers(5, 1) == random_layers(5, 1) != random_layers(5, 2)


def test_pricing_has_a_row_per_kind_and_goals_for_the_default_machine() -> None:
    bench = AsicPricing(layers=4, repeats=1)
    result = bench.run(QuietEvents())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    kinds = [(row["prices"], row["goal"]) for row in result["rows"]]
    assert kinds.count(("closed form", 1_000_000)) == 3
    assert ("tile events", 100_000) in kinds and ("tiling search", 3_000) in kinds and ("mapping search", None) in kinds
    for row in result["rows"]:
        rate = row["per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert row["met"] == (None if row["goal"] is None else rate["median"] >= row["goal"])
    (table,) = bench.tables(result)
    assert all(len(row) == len(table.columns) for row in table.rows) and len(table.rows) == len(kinds)
    with pytest.raises(UsageError):
        AsicPricing(layers=0)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[0])
def test_layers_are_read_as_scalesim_reads_them(layer: tuple[Any, ...]) -> None:
    _, height, width, r, s, channels, filters, stride = layer
    ours = scalesim_layer(height, width, r, s, channels, filters, stride)
    assert ours.out == (1, output_size(height, r, stride), output_size(width, s, stride))
    assert (ours.channels * ours.taps, ours.filters) == (r * s * channels, filters)


class FakeScaleSim:
    """Answers with the cycles of our formula, and one more for one layer."""

    versions: ClassVar = {"scalesim": "3.0.0", "numpy": "1.26.4"}
    wrong = ""

    def __init__(self, python: Path) -> None:
        assert python == Path("there")

    def __enter__(self) -> FakeScaleSim:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, rows: int, columns: int, dataflow: str, layer: tuple[Any, ...]) -> dict[str, Any]:
        name, height, width, r, s, channels, filters, stride = layer
        m = output_size(height, r, stride) * output_size(width, s, stride)
        cycles = scalesim_counts(dataflow, rows, columns, m, r * s * channels, filters).cycles + (name == self.wrong)
        return {"cycles": cycles + 7, "stall_cycles": 7, "cpu_s": 2.0}


@pytest.mark.parametrize("dataflow", ["ws", "os", "is"])
def test_comparison_with_scalesim(dataflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegen.bench.asic_vs_scalesim.ScaleSim", FakeScaleSim)
    bench = AsicVsScalesim(layers=2, dataflow=dataflow, repeats=1, scalesim_python=Path("there"))
    result = bench.run(QuietEvents())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["cycles_equal"]
    for row in result["rows"]:
        # Priced with its memory, and run as a program: the same cycles, no fewer than the array alone takes.
        assert row["engine_cycles"] == row["price_cycles"] >= row["closed_form_cycles"]
        assert row["scalesim"]["stall_cycles"] == 7
    spent = sum(row["cpu_s"]["tile events"] for row in result["rows"])
    assert result["ratios"]["tile events"]["all"] == pytest.approx(4.0 / spent, rel=1e-9)
    monkeypatch.setattr(FakeScaleSim, "wrong", LAYERS[1][0])
    other = bench.run(QuietEvents())
    assert not other["cycles_equal"] and "NOT EQUAL" in bench.tables(other)[0].title


def test_options_of_the_comparison_are_checked() -> None:
    with pytest.raises(UsageError, match="'rs': there are: ws, os, is"):
        AsicVsScalesim(dataflow="rs")
    with pytest.raises(UsageError, match="there are 14"):
        AsicVsScalesim(layers=15)


def test_an_interpreter_without_scalesim_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--scalesim-python .*missing"):
        ScaleSim(tmp_path / "missing")
    with pytest.raises(InputError, match=r"has no scalesim==3\.0\.0 and numpy==1\.26\.4: .*scalesim"):
        ScaleSim(Path(sys.executable))


@pytest.mark.slow
def test_where_nothing_can_be_installed_the_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be installed into .*--scalesim-python PATH"):
        make_environment(tmp_path / "environment", index_options=("--no-index",))
    assert not (tmp_path / "environment" / "rankc-complete").exists()


def test_scalesim_itself_where_its_environment_is_there() -> None:
    python = default_folder() / "bin" / "python"
    if not python.exists():
        pytest.skip(f"SCALE-Sim has no environment in {default_folder()}: `rankc bench asic-vs-scalesim` makes one")
    with ScaleSim(python) as simulator:
        assert simulator.versions == {"scalesim": "3.0.0", "numpy": "1.26.4"}
        for dataflow in ("ws", "os", "is"):
            found = simulator.run(8, 6, dataflow, ("small", 9, 7, 3, 3, 5, 11, 2))
            wanted = scalesim_counts(dataflow, 8, 6, 4 * 3, 45, 11)
            assert found["cycles"] - found["stall_cycles"] == wanted.cycles


def test_the_staircase_is_priced_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plots`")
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    results = [Staircase(channels=20, size=5, output=path).run(QuietEvents()) for path in pictures]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert results[0] == results[1]
    panel = next(p for p in results[0]["panels"] if p["array"] == [12, 14] and p["bytes_per_cycle"] == 4)
    spec = load_spec("edge_16x16", {"rows": "12", "columns": "14", "bytes_per_cycle": "4"})
    (price,) = PriceList(spec).chains([tucker_chain(20, 13, 5)])
    at = panel["ranks"].index(13)
    assert (panel["fused_cycles"][at], panel["layerwise_cycles"][at]) == (price.cycles, price.layerwise_cycles)
    assert (panel["fused_dram_bytes"][at], panel["layerwise_dram_bytes"][at]) == (
        price.dram_bytes,
        price.layerwise_dram_bytes,
    )
    with pytest.raises(UsageError, match="svg or"):
        Staircase(output=tmp_path / "c.gif")


def test_the_picture_in_the_docs_is_small() -> None:
    assert 10_000 < (DOCS / "staircase.svg").stat().st_size < 150_000
    assert "staircase.svg" in (DOCS / "accelerator.md").read_text(encoding="utf-8")


def test_tables_of_the_validation_stand_in_the_docs() -> None:
    """Every row of Eyeriss's and SCALE-Sim's tables, digit by digit; the totals move with the price list."""
    bench = Validation()
    result = bench.run(QuietEvents())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    text = (DOCS / "validation.md").read_text(encoding="utf-8")
    shown = {tuple(cell.strip() for cell in line.strip("| \n").split("|")) for line in text.splitlines()}
    missing = []
    for table in bench.tables(result):
        if not table.title.startswith("Totals"):
            missing += [row for row in table.rows if not any(set(row) <= set(cells) for cells in shown)]
    assert not missing
    assert all(row["factor"] > 1 for row in result["totals"])


def test_the_validation_without_reports_says_so(tmp_path: Path) -> None:
    notes: list[str] = []

    class Noting(QuietEvents):
        def note(self, text: str) -> None:
            notes.append(text)

    assert Validation(reference=tmp_path).run(Noting())["scalesim"] is None
    assert len(notes) == 1 and "--reference" in notes[0]
