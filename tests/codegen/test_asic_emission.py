"""What is emitted for an accelerator, from the digits network that comes with the project."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import codegen.asic_emission
import codegen.plan_search
import codegen.tvm_build
from accel_sim.engine import run
from accel_sim.program.assembler import assemble
from accel_sim.program.container import read_program
from accel_sim.program.listing import disassemble
from accel_sim.spec_file import load_spec
from codegen import driver
from codegen.child_process import Child
from codegen.config import LowerConfig
from codegen.dataset import Dataset, load, random_inputs
from codegen.emission import Emission, EmissionRequest
from codegen.events import RecordingEvents
from codegen.quantized.onnx_network import integer_options
from codegen.target import parse_target
from codegen.tvm_build import NoBinary
from passes.onnx_graph import OnnxGraph

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "digits.onnx"


def request(folder: Path, events: RecordingEvents, *, calibrated: bool = True) -> EmissionRequest:
    graph = OnnxGraph.read(DIGITS)
    model = graph.save(folder / "model.onnx")[0]
    data: Dataset = load(f"{EXAMPLES / 'digits_data.py'}:calibration", graph.inputs, 64)
    evaluation = load(f"{EXAMPLES / 'digits_data.py'}:evaluation", graph.inputs, 128)
    if not calibrated:
        data = random_inputs(graph.inputs, graph.input_shapes, 2, 0)
    return EmissionRequest(
        *(model, folder, DIGITS, graph.input_shapes, list(data.head(2).batches(1)), data, calibrated),
        *(evaluation if calibrated else None, 0, events),
    )


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Emission, RecordingEvents]:
    folder = tmp_path_factory.mktemp("emitted")
    events = RecordingEvents()
    target = parse_target("asic")
    assert target.baseline is not None
    wanted = request(folder, events)
    baseline = target.baseline(DIGITS, wanted.shapes, 0, events)
    object.__setattr__(wanted, "baseline", baseline)
    return folder, target.emit(wanted), events


def test_every_file_is_there(emitted: tuple[Path, Emission, RecordingEvents]) -> None:
    folder, emission, events = emitted
    assert emission.artifacts == {
        "binary": "model.so",
        "host_binary": "model_host.so",
        "program": "program.bin",
        "listing": "program.lst",
        "quantized": "model_int8.onnx",
        "trace": "trace.json",
    }
    assert all((folder / str(name)).stat().st_size > 0 for name in emission.artifacts.values())
    assert events.warnings == []
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_the_engine_computes_what_the_integer_kernels_do(emitted: tuple[Path, Emission, RecordingEvents]) -> None:
    _, emission, _ = emitted
    assert emission.program is not None and emission.program.agreement is not None
    agreement = emission.program.agreement
    assert (agreement.samples, agreement.compared, agreement.different, agreement.same_top1) == (2, 20, 0, 2)


def test_the_library_was_held_to_its_program_in_a_fresh_process(
    emitted: tuple[Path, Emission, RecordingEvents],
) -> None:
    _, emission, _ = emitted
    assert emission.check is not None
    assert (emission.check.max_abs, emission.check.samples, emission.check.fresh_process) == (0.0, 2, True)


def test_the_program_alone_takes_the_same_cycles(emitted: tuple[Path, Emission, RecordingEvents]) -> None:
    folder, emission, _ = emitted
    spec = load_spec()
    program = read_program(folder / "program.bin", spec)
    assert emission.program is not None and emission.cost is not None
    again = run(program, spec, {}, values=False)
    assert again.cycles == emission.cost.latency == emission.program.latency.value
    assert emission.program.predicted_latency.value == again.cycles
    assert emission.program.baseline_latency is not None  # the network as it came: the same one
    assert emission.program.baseline_latency.value == again.cycles
    assert sum(layer.cycles for layer in emission.program.layers) == again.cycles
    for layer in emission.program.layers:
        assert all(sum(reasons.values()) == layer.cycles for reasons in layer.waits.values())
    assert assemble(disassemble(program, spec)) == program


def test_the_accuracy_is_that_of_the_quantized_network(emitted: tuple[Path, Emission, RecordingEvents]) -> None:
    folder, emission, _ = emitted
    graph = OnnxGraph.read(DIGITS)
    data = load(f"{EXAMPLES / 'digits_data.py'}:evaluation", graph.inputs, 128)
    options = integer_options(signed=True)
    session = onnxruntime.InferenceSession(str(folder / "model_int8.onnx"), options, ["CPUExecutionProvider"])
    right = [session.run(None, dict(f))[0].argmax() == y for f, y in zip(data.batches(1), data.labels, strict=True)]
    assert emission.program is not None and emission.program.accuracy is not None
    assert emission.program.accuracy.value == pytest.approx(float(np.mean(right)), abs=1e-12)


def _without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def host(request: EmissionRequest, library: str, child: Child) -> Emission:
        return Emission({"binary": library})

    monkeypatch.setattr(codegen.asic_emission, "emit_host_library", host)
    monkeypatch.setattr(codegen.asic_emission, "build", lambda *_, **__: NoBinary("no compiler"))


@pytest.mark.parametrize("target", ["eyeriss_12x14", "asic:data_bits=16"])
def test_a_machine_without_programs_keeps_the_host_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    _without_libraries(monkeypatch)
    events = RecordingEvents()
    found = parse_target(target)
    assert found.baseline is not None
    assert found.baseline(DIGITS, OnnxGraph.read(DIGITS).input_shapes, 0, events) is None
    emission = found.emit(request(tmp_path, events))
    assert emission.artifacts["host_binary"] == "model_host.so"
    assert emission.artifacts["program"] is emission.artifacts["binary"] is None
    assert emission.cost is None and emission.program is None
    (warning,) = events.warnings
    assert warning.startswith("no program.bin: ") and "8-bit data and 32-bit accumulators" in warning
    assert "its data have 16 bits" in warning and ("row-stationary" in warning) == (target == "eyeriss_12x14")
    assert not (tmp_path / "program.bin").exists() and not (tmp_path / "model_int8.onnx").exists()


@pytest.mark.parametrize("target", ["eyeriss_12x14", "asic:data_bits=16"])
def test_lower_ends_well_on_a_machine_without_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Ranks follow its prices, the budget is met by them, and one warning beside that for data says what is missing."""
    _without_libraries(monkeypatch)
    events = RecordingEvents()
    values = {"model": DIGITS, "output": tmp_path / "out", "effort": "quick", "target": target}
    result = driver.lower(LowerConfig.from_values({**values, "budgets": {"latency": "80%"}}), events)
    assert not result.missed
    before, after = (result.report[key]["latency"] for key in ("baseline", "result"))
    assert after["value"] <= 0.8 * before["value"] and after["kind"] == "simulated"
    (_, missing) = events.warnings  # the first: no --calib data
    assert missing.startswith("no program.bin: ")
    assert result.report["artifacts"]["host_binary"] == "model_host.so"
    assert result.report["artifacts"]["program"] is result.report["artifacts"]["binary"] is None
    assert "quantized" not in result.report["artifacts"]


def test_random_ranges_are_said_to_be_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_libraries(monkeypatch)
    events = RecordingEvents()
    emission = parse_target("asic").emit(request(tmp_path, events, calibrated=False))
    assert emission.program is not None and not emission.program.calibrated
    assert events.warnings == ["no model.so: no compiler"]


def test_a_library_that_computes_something_else_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_libraries(monkeypatch)

    def build(parts: Any, programs: Any, library: Path, **_: Any) -> Any:
        library.write_bytes(b"")
        return _Binary(library)

    def run_library(binary: Any, machine: str, options: Mapping[str, str], feeds: Any, **_: Any) -> Any:
        return [[np.zeros((1, 10), np.float32)] for _ in feeds], [1 for _ in feeds]

    monkeypatch.setattr(codegen.asic_emission, "build", build)
    monkeypatch.setattr(codegen.asic_emission, "run_library", run_library)
    events = RecordingEvents()
    emission = parse_target("asic").emit(request(tmp_path, events))
    assert emission.artifacts["binary"] is None and not (tmp_path / "model.so").exists()
    (warning,) = events.warnings
    assert warning.startswith("no model.so: model.so differs from its program on the engine by ")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """The processes that an emitter starts, as it starts them."""
    found: list[Child] = []

    def noting(make: Callable[[], Child]) -> Callable[[], Child]:
        def made() -> Child:
            found.append(make())
            return found[-1]

        return made

    monkeypatch.setattr(codegen.asic_emission, "compiler", noting(codegen.asic_emission.compiler))
    monkeypatch.setattr(codegen.asic_emission, "simulator", noting(codegen.asic_emission.simulator))
    monkeypatch.setattr(codegen.tvm_build, "compiler", noting(codegen.tvm_build.compiler))
    return found


def test_processes_that_were_started_before_are_used_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Child]
) -> None:
    _without_libraries(monkeypatch)
    target = parse_target("asic")
    assert [target.get_ready() for _ in range(2)] == [True, True]
    assert len(started) == 2 and all(child.running for child in started)
    target.emit(request(tmp_path, RecordingEvents()))
    assert len(started) == 3 and not any(child.running for child in started)
    target.emit(request(tmp_path, RecordingEvents()))
    assert len(started) == 6 and not any(child.running for child in started)


def test_what_was_started_and_not_used_ends_with_the_target(started: list[Child]) -> None:
    target = parse_target("asic")
    assert [target.get_ready() for _ in range(4)] == [True, True, True, False]
    assert all(child.running for child in started)
    target.close()
    assert len(started) == 3 and not any(child.running for child in started)


def _lower_digits(tmp_path: Path, **more: str) -> None:
    values = {"model": DIGITS, "output": tmp_path / "out", "effort": "quick", "budgets": {"latency": "80%"}}
    driver.lower(LowerConfig.from_values({**values, **more}), RecordingEvents())


def test_a_search_gets_the_emission_ready_and_an_error_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Child]
) -> None:
    walkable = codegen.plan_search.PlanSearch._walkable
    counts: list[int] = []

    def counting(search: codegen.plan_search.PlanSearch) -> Any:
        counts.append(len(started))
        return walkable(search)

    def fails(*_: Any) -> Any:
        counts.append(len(started))
        assert all(child.running for child in started)
        raise KeyboardInterrupt

    monkeypatch.setattr(codegen.plan_search.PlanSearch, "_walkable", counting)
    monkeypatch.setattr(codegen.plan_search, "build_space", fails)
    with pytest.raises(KeyboardInterrupt):
        _lower_digits(tmp_path, calib=f"{EXAMPLES / 'digits_data.py'}:calibration")
    assert counts == [1, 3]
    assert len(started) == 3 and not any(child.running for child in started)


@pytest.mark.parametrize("more", [{"train": f"{EXAMPLES / 'digits_data.py'}:calibration"}, {"solver": "haloc"}])
def test_nothing_waits_for_the_end_of_a_training(
    more: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Child]
) -> None:
    def fails(*_: Any) -> Any:
        assert len(started) < 2
        raise KeyboardInterrupt

    monkeypatch.setattr(codegen.plan_search, "build_space", fails)
    with pytest.raises(KeyboardInterrupt):
        _lower_digits(tmp_path, **{"calib": f"{EXAMPLES / 'digits_data.py'}:calibration", **more})
    assert not any(child.running for child in started)


class _Binary:
    """What :func:`codegen.asic_binary.build.build` gives, as far as the emitter looks at it."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.bound: dict[str, tuple[int, ...]] = {}
