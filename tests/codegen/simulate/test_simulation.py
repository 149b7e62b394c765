"""What a simulation says, held to the price list, the roofline's definition, onnxruntime and itself."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from accel_sim.pricing.layer import conv_layer
from accel_sim.pricing.price_list import PriceList
from accel_sim.program.container import read_program
from accel_sim.spec_file import load_spec
from codegen.events import RecordingEvents
from codegen.quantized.onnx_network import integer_options
from codegen.quantized.quantize import quantize
from codegen.simulate.config import SimulateConfig
from codegen.simulate.machine import parse_machine
from codegen.simulate.report import COLUMNS, to_csv, to_dict, validate
from codegen.simulate.run import simulate
from passes.errors import InputError
from tests.codegen.simulate.conftest import Simulate
from tests.codegen.simulate.networks import DIGITS, counted_macs, images, write_chain, write_softmax

Folder = tuple[Path, dict[str, Any]]


def test_the_folder_holds_what_the_report_names_and_the_report_fits_its_schema(digits_folder: Folder) -> None:
    folder, report = digits_folder
    stored = json.loads((folder / "simulation.json").read_text(encoding="utf-8"))
    assert stored == report
    validate(stored)
    assert {p.name for p in folder.iterdir()} == set(report["artifacts"].values())
    read_program(folder / "program.bin", load_spec())  # decodes, fits the machine, passes the checks
    trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    last = max(event["args"]["end_cycles"] for event in trace["traceEvents"] if "end_cycles" in event.get("args", {}))
    assert last == report["machines"][0]["totals"]["cycles"]["value"]
    page = (folder / "simulation.html").read_text(encoding="utf-8")
    for layer in report["machines"][0]["layers"]:
        assert layer["name"] in page and f"{layer['cycles']:,}" in page
    for link in ("src=", "href=", "url(", "@import"):
        assert link not in page  # nothing is fetched
    ElementTree.parse(folder / "roofline.svg")


def test_totals_are_the_sums_of_the_layers_and_stalls_fill_every_cycle(digits_folder: Folder) -> None:
    (machine,) = digits_folder[1]["machines"]
    totals, layers = machine["totals"], machine["layers"]
    assert machine["source"] == "engine"
    assert totals["cycles"]["value"] == sum(layer["cycles"] for layer in layers)
    assert totals["dram_bytes"]["value"] == sum(layer["dram_bytes"] for layer in layers)
    assert totals["macs"]["value"] == sum(layer["macs"] for layer in layers)
    assert totals["energy"]["value"] == pytest.approx(sum(layer["energy_pj"] for layer in layers), rel=1e-12)
    assert totals["time"]["value"] == pytest.approx(totals["cycles"]["value"] / 1e9)  # edge_16x16 runs at 1 GHz
    for layer in layers:
        assert layer["dram_bytes"] == layer["dram_read_bytes"] + layer["dram_write_bytes"]
        assert {queue: sum(reasons.values()) for queue, reasons in layer["stalls"].items()} == dict.fromkeys(
            ("load", "execute", "store"), layer["cycles"]
        )
    for queue, reasons in machine["stalls"].items():
        assert sum(reasons.values()) == totals["cycles"]["value"], queue


def test_macs_of_the_example_are_those_of_its_shapes(digits_folder: Folder) -> None:
    assert digits_folder[1]["machines"][0]["totals"]["macs"]["value"] == counted_macs(DIGITS)


def test_no_layer_is_above_its_roof(digits_folder: Folder) -> None:
    spec = load_spec()
    for layer in digits_folder[1]["machines"][0]["layers"]:
        at = layer["roofline"]
        if not layer["macs"]:
            assert at == dict.fromkeys(at) | {"side": ""}
            continue
        intensity = layer["macs"] / layer["dram_bytes"]
        assert at["intensity_macs_per_byte"] == pytest.approx(intensity)
        assert at["attainable_macs_per_cycle"] == pytest.approx(min(256, intensity * spec.dram.bytes_per_cycle))
        assert at["reached_macs_per_cycle"] == pytest.approx(256 * layer["utilization"])
        assert at["reached_macs_per_cycle"] <= at["attainable_macs_per_cycle"]
        assert at["side"] == ("compute" if intensity * spec.dram.bytes_per_cycle >= 256 else "memory")


def test_csv_has_the_layers_of_the_report(digits_folder: Folder) -> None:
    folder, report = digits_folder
    rows = list(csv.DictReader((folder / "layers.csv").read_text(encoding="utf-8").splitlines()))
    layers = report["machines"][0]["layers"]
    assert tuple(rows[0]) == COLUMNS and len(rows) == len(layers)
    for row, layer in zip(rows, layers, strict=True):
        assert (row["name"], int(row["cycles"])) == (layer["name"], layer["cycles"])
        waits = [int(row[column]) for column in COLUMNS if column.startswith("execute_")]
        assert sum(waits) == layer["cycles"]


def test_a_program_run_alone_gives_the_same_cycles_and_outputs(digits_folder: Folder, run_simulation: Simulate) -> None:
    folder, report = digits_folder
    again = run_simulation(folder / "program.bin", inputs=str(folder.parent / "x.npz"))
    found = to_dict(again, {})
    assert found["machines"][0]["totals"]["cycles"] == report["machines"][0]["totals"]["cycles"]
    assert found["outputs"]["tensors"] == report["outputs"]["tensors"]
    for ours, before in zip(found["machines"][0]["layers"], report["machines"][0]["layers"], strict=True):
        assert ours | {"on_chip": ""} == before | {"on_chip": ""}  # a program does not say which maps stay
    assert again.outputs is not None
    with np.load(folder / "outputs.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["logits"], again.outputs.values["logits"])


def test_outputs_are_those_of_onnxruntime_on_the_quantized_network(digits_folder: Folder, tmp_path: Path) -> None:
    folder, _ = digits_folder
    x = images(5)
    quantized = tmp_path / "quantized.onnx"
    quantize(DIGITS, quantized, [{"image": x}])
    session = onnxruntime.InferenceSession(str(quantized), integer_options(signed=True), ["CPUExecutionProvider"])
    wanted = np.stack([session.run(["logits"], {"image": x[i : i + 1]})[0] for i in range(5)])
    scale = next(
        onnx.numpy_helper.to_array(t) for t in onnx.load(quantized).graph.initializer if t.name == "logits_scale"
    )
    with np.load(folder / "outputs.npz", allow_pickle=False) as stored:
        assert np.abs(stored["logits"] - wanted).max() <= 1.001 * scale  # one step of the output's bytes


def test_a_quantized_network_needs_no_ranges(tmp_path: Path, run_simulation: Simulate) -> None:
    quantize(DIGITS, tmp_path / "q.onnx", [{"image": images(2)}])
    outcome = run_simulation(tmp_path / "q.onnx")
    assert (outcome.network.kind, outcome.network.random_ranges) == ("quantized", False)
    assert outcome.simulations[0].totals.cycles == run_simulation(DIGITS).simulations[0].totals.cycles


def test_fused_chains_move_less_by_the_engines_counters(tmp_path: Path, run_simulation: Simulate) -> None:
    """56x56, 64 -> 64 at rank 16: at least 30 % less than layer by layer, however that is forced."""
    chain = write_chain(tmp_path / "chain.onnx", 64, 16, 56)
    fused = run_simulation(chain).simulations[0]
    apart = run_simulation(chain, layer_by_layer=True).simulations[0]
    # Maps that leave the network have to go to DRAM, whoever else reads them.
    shown = write_chain(tmp_path / "shown.onnx", 64, 16, 56, outputs=("a", "b", "y"))
    forced = run_simulation(shown).simulations[0]
    moved = {
        name: s.run.counts.dram_bytes for name, s in (("fused", fused), ("apart", apart), ("forced", forced)) if s.run
    }
    assert moved["fused"] <= 0.7 * moved["apart"]
    assert moved["apart"] == moved["forced"]
    assert fused.totals.saved_dram_bytes is not None
    assert fused.totals.saved_dram_bytes.value == moved["apart"] - moved["fused"]
    assert fused.totals.cycles.value < apart.totals.cycles.value
    assert [layer.on_chip for layer in fused.layers] == ["output", "input and output", "input"]
    assert [layer.on_chip for layer in apart.layers] == ["", "", ""]


def test_the_price_list_alone_says_what_the_engine_says(tmp_path: Path, run_simulation: Simulate) -> None:
    chain = write_chain(tmp_path / "chain.onnx", 32, 8, 14)
    priced = run_simulation(chain, price_list=True).simulations[0]
    assert (priced.source, priced.reason, priced.run) == ("price list", "asked for", None)
    # All have biases on the machine: that is where the zero point of their inputs goes.
    shapes: list[dict[str, Any]] = [{"kernel": (1, 1)}, {"kernel": (3, 3), "pads": (1,) * 4}, {"kernel": (1, 1)}]
    channels = [(32, 8), (8, 8), (8, 32)]
    layers = [conv_layer(*pair, (14, 14), **shape) for pair, shape in zip(channels, shapes, strict=True)]
    (price,) = PriceList(load_spec()).chains([layers])
    assert (priced.totals.cycles.value, priced.totals.dram_bytes.value) == (price.cycles, price.dram_bytes)
    engine = run_simulation(chain).simulations[0]
    assert (engine.totals.cycles, engine.totals.dram_bytes) == (priced.totals.cycles, priced.totals.dram_bytes)
    assert all(not layer.stalls for layer in priced.layers)
    validate(to_dict(run_simulation(chain, price_list=True), {}))


@pytest.mark.parametrize("target", ["eyeriss_12x14", "asic:data_bits=16"])
def test_machines_without_programs_fall_back_to_the_price_list(
    target: str, tmp_path: Path, run_simulation: Simulate
) -> None:
    outcome = run_simulation(write_chain(tmp_path / "chain.onnx", 16, 4, 8), "asic", target)
    engine, priced = outcome.simulations
    assert (engine.source, priced.source) == ("engine", "price list")
    assert "programs are made for" in priced.reason or "has no programs" in priced.reason
    report = to_dict(outcome, {})
    names = [[layer["name"] for layer in machine["layers"]] for machine in report["machines"]]
    assert names[0] == names[1]
    assert report["machines"][1]["totals"]["macs"] == report["machines"][0]["totals"]["macs"]
    targets = [row["target"] for row in csv.DictReader(to_csv(report).splitlines())]
    assert targets == ["asic"] * 3 + [target] * 3


def test_parts_of_the_host_are_named_and_estimated(tmp_path: Path, run_simulation: Simulate) -> None:
    simulation = run_simulation(write_softmax(tmp_path / "s.onnx")).simulations[0]
    (part,) = simulation.host
    assert part.op == "Softmax" and part.reason
    spec, touched = load_spec(), 2 * 6 * 8 * 8
    assert part.cycles == spec.host.call_cycles + touched * spec.host.element_cycles
    totals = simulation.totals
    assert totals.latency.kind == "estimated" and totals.cycles.kind == "simulated"
    assert totals.latency.value == totals.cycles.value + part.cycles


def test_several_images_at_once_share_their_time(tmp_path: Path, run_simulation: Simulate) -> None:
    model = write_softmax(tmp_path / "s.onnx", batch="N")
    outcome = run_simulation(model, shapes={"x": (4, 4, 8, 8)})
    totals = outcome.simulations[0].totals
    assert outcome.network.images == 4
    assert totals.time_per_image.value == pytest.approx(totals.time.value / 4)
    alone = run_simulation(model).simulations[0].totals
    assert totals.macs.value == 4 * alone.macs.value


def test_random_ranges_are_said_and_warned_of_where_values_are_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", image=images(1))
    events = RecordingEvents()
    outcome = simulate(SimulateConfig(DIGITS, (parse_machine("asic"),), inputs=str(tmp_path / "x.npz")), events)
    assert outcome.network.ranges == "random inputs, seed 0"
    assert any("--calib" in warning for warning in events.warnings)


def test_a_program_for_another_machine_is_refused(digits_folder: Folder, run_simulation: Simulate) -> None:
    program = digits_folder[0] / "program.bin"
    with pytest.raises(InputError, match=r"another machine than asic:rows=8 .*; it fits edge_16x16$"):
        run_simulation(program, "asic:rows=8")
    # What only changes the time is no other machine.
    slow = run_simulation(program, "asic:bytes_per_cycle=4").simulations[0]
    assert slow.totals.cycles.value > digits_folder[1]["machines"][0]["totals"]["cycles"]["value"]


def test_a_damaged_program_is_refused(digits_folder: Folder, tmp_path: Path, run_simulation: Simulate) -> None:
    data = bytearray((digits_folder[0] / "program.bin").read_bytes())
    data[5000] ^= 4
    (tmp_path / "program.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"program\.bin: .*checksum"):
        run_simulation(tmp_path / "program.bin")
    (tmp_path / "program.bin").write_bytes(b"something else")
    with pytest.raises(InputError, match="is no program of rankc"):
        run_simulation(tmp_path / "program.bin")
