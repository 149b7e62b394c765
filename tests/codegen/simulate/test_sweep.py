"""Sweeps: each point is the machine it says, the picture has them all."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from codegen.simulate.output import write_folder
from codegen.simulate.plots import sweep_svg
from codegen.simulate.report import to_dict
from codegen.simulate.sweep import Axis, parse_axes, points
from passes.errors import UnsupportedError, UsageError
from tests.codegen.simulate.conftest import Simulate
from tests.codegen.simulate.networks import write_chain

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain(tmp_path_factory.mktemp("chain") / "chain.onnx", 32, 8, 14)


def test_axes_are_read() -> None:
    assert parse_axes(["rows=4,8", "sram_kib = 64"]) == (Axis(("rows",), ("4", "8")), Axis(("sram_kib",), ("64",)))
    assert points(parse_axes(["rows+columns=4,8", "dataflows=ws,ws+os"])) == [
        {"rows": "4", "columns": "4", "dataflows": "ws"},
        {"rows": "4", "columns": "4", "dataflows": "ws+os"},
        {"rows": "8", "columns": "8", "dataflows": "ws"},
        {"rows": "8", "columns": "8", "dataflows": "ws+os"},
    ]
    assert Axis(("dataflows",), ("ws", "os")).numbers is None
    assert Axis(("rows",), ("4", "8")).numbers == (4.0, 8.0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rows"], "write KEY=VALUE"),
        (["rows=4,,8"], "write KEY=VALUE"),
        (["=4"], "write KEY=VALUE"),
        (["rows=4,4"], "4 is given twice"),
        (["rows=4,8", "rows=16"], "rows is swept twice"),
        (["rows=1", "columns=1", "lanes=1"], "at most twice"),
        ([f"rows={','.join(map(str, range(1, 600)))}"], "599 machines; at most 400"),
    ],
)
def test_what_is_no_axis_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_axes(texts)


def test_each_point_is_what_its_machine_gives_alone(chain: Path, run_simulation: Simulate) -> None:
    outcome = run_simulation(chain, sweep=("rows+columns=8,16", "bytes_per_cycle=2,16"))
    assert len(outcome.points) == 4
    for point in outcome.points:
        alone = run_simulation(chain, "asic:" + ",".join(f"{key}={value}" for key, value in point.changes.items()))
        assert point.simulation is not None
        assert point.simulation.totals == alone.simulations[0].totals
    cycles = {tuple(p.changes.values()): p.simulation.totals.cycles.value for p in outcome.points if p.simulation}
    assert cycles["16", "16", "2"] > cycles["16", "16", "16"]  # less bandwidth is slower here
    base = outcome.simulations[0].totals
    assert base.cycles.value == cycles["16", "16", "16"]  # edge_16x16 itself


def test_machines_that_cannot_run_it_say_why(chain: Path, run_simulation: Simulate) -> None:
    outcome = run_simulation(chain, "eyeriss_12x14", sweep=("input_kib=1,36",))
    found = to_dict(outcome, {})["sweep"]["points"]
    assert [point["totals"] is None for point in found] == [bool(point["error"]) for point in found]
    with pytest.raises(UsageError, match=r"--sweep on asic: .*rows is 0"):
        run_simulation(chain, sweep=("rows=0,4",))
    with pytest.raises(UsageError, match="no such key"):
        run_simulation(chain, sweep=("nothing=1",))
    with pytest.raises(UsageError, match="give one --target"):
        run_simulation(chain, "asic", "tpu_256x256", sweep=("rows=4",))


def test_a_sweep_in_which_nothing_fits_is_an_error(tmp_path: Path, run_simulation: Simulate) -> None:
    model = write_chain(tmp_path / "wide.onnx", 2048, 8, 1)
    tight = "asic:input_kib=1,weight_kib=1,accumulator_kib=1,shared_input_weight=false"
    try:
        run_simulation(model, tight)
    except UnsupportedError as error:
        assert "no tiling" in str(error)
    with pytest.raises(UnsupportedError):
        run_simulation(model, tight, sweep=("columns=4096",))


@pytest.mark.parametrize("sweep", [("rows=4,8,16",), ("dataflows=ws,os", "clock_mhz=500,1000")])
def test_the_picture_has_a_mark_per_point_and_panel(
    sweep: tuple[str, ...], chain: Path, tmp_path: Path, run_simulation: Simulate
) -> None:
    outcome = run_simulation(chain, sweep=sweep)
    report = write_folder(outcome, tmp_path / "out")
    drawn = (tmp_path / "out" / "sweep.svg").read_text(encoding="utf-8")
    assert drawn == sweep_svg(report["sweep"]) + "\n"
    root = ElementTree.fromstring(drawn)
    legend = len(outcome.config.axes[1].values) if len(sweep) > 1 else 0
    assert len(list(root.iter(f"{SVG}circle"))) == 4 * len(outcome.points) + legend
    labels = [element.text for element in root.iter(f"{SVG}text")]
    assert ("time, ms" in labels) == (len(sweep) > 1)
    for element in root.iter(f"{SVG}circle"):
        assert 0 <= float(element.attrib["cx"]) <= 900 and 0 <= float(element.attrib["cy"]) <= 600
