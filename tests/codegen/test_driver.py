"""The pipeline on the demo's network: budgets, bounds, resumption, replay. One run compiles a binary, in test_demo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from codegen import driver
from codegen.config import LowerConfig
from codegen.emission import Emission, EmissionRequest
from codegen.events import Events, Progress, QuietEvents, RecordingEvents
from codegen.result import LowerResult
from codegen.target import Target, parse_target
from passes.core.cost import Cost
from passes.errors import InputError, UsageError
from passes.onnx_graph import OnnxGraph

DIGITS = Path(__file__).parents[2] / "examples" / "digits.onnx"


def _no_binary(request: EmissionRequest) -> Emission:
    return Emission({"binary": None})


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(text: str) -> Target:
        return replace(parse_target(text), emit=_no_binary)

    monkeypatch.setattr(driver, "parse_target", target)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random images: enough structure for a covariance that is far from the identity."""
    rng = np.random.default_rng(0)
    (image,) = onnx.load(DIGITS).graph.input
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim][1:]
    noise = rng.standard_normal((96, *shape)).astype(np.float32)
    smooth = noise + np.roll(noise, 1, -1) + np.roll(noise, 1, -2)
    path = tmp_path_factory.mktemp("data") / "calib.npz"
    np.savez(path, **{image.name: smooth.astype(np.float32)})
    return path


def run(out: Path, calibration: Path | None, events: Events | None = None, **options: Any) -> LowerResult:
    values = {"model": DIGITS, "output": out, "effort": "quick", **options}
    if calibration is not None:
        values["calib"] = str(calibration)
    return driver.lower(LowerConfig.from_values(values), events or QuietEvents())


def onnx_outputs(path: Path, calibration: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with np.load(calibration) as data:
        return np.asarray(session.run(None, dict(data))[0])


def test_every_budget_is_met_on_the_written_network(tmp_path: Path, calibration: Path) -> None:
    result = run(tmp_path / "out", calibration, budgets={"latency": "70%", "energy": "80%", "params": "60%"})
    report = result.report
    assert not result.missed and all(b["met"] for b in report["budgets"])
    before, after = report["baseline"], report["result"]
    assert after["latency"]["value"] <= 0.7 * before["latency"]["value"]
    assert after["energy"]["value"] <= 0.8 * before["energy"]["value"]
    assert after["params"]["value"] <= 0.6 * before["params"]["value"]
    assert after["latency"]["kind"] == "simulated"
    written = onnx.load(tmp_path / "out" / "model.onnx")
    stored = sum(int(np.prod(t.dims)) for t in written.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert stored == after["params"]["value"]


def test_what_is_reported_is_what_the_file_does(tmp_path: Path, calibration: Path) -> None:
    report = run(tmp_path / "out", calibration, budgets={"latency": "60%"}).report
    wanted, found = (onnx_outputs(p, calibration) for p in (DIGITS, tmp_path / "out" / "model.onnx"))
    measured = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert report["output_error"]["relative_l2"] == pytest.approx(measured, rel=1e-3)


def test_each_layer_stands_in_the_report_with_choice_or_reason(tmp_path: Path, calibration: Path) -> None:
    report = run(tmp_path / "out", calibration, budgets={"latency": "60%"}).report
    nodes = [n for n in onnx.load(DIGITS).graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert sorted(layer["name"] for layer in report["layers"]) == sorted(n.name for n in nodes)
    assert all(layer["reason"] for layer in report["layers"])
    chains = [layer for layer in report["layers"] if layer["choice"] != "dense"]
    assert chains and all(layer["latency_after"] < layer["latency_before"] for layer in chains)


def test_a_budget_out_of_reach_is_missed_with_a_bound(tmp_path: Path, calibration: Path) -> None:
    result = run(tmp_path / "out", calibration, budgets={"latency": "1%"})
    (budget,) = result.report["budgets"]
    assert result.missed and not budget["met"]
    assert budget["limit"] < budget["bound"] <= budget["value"] * (1 + 1e-9)
    assert (tmp_path / "out" / "model.onnx").exists()


def test_without_a_budget_the_error_limits_the_search(tmp_path: Path, calibration: Path) -> None:
    loose = run(tmp_path / "loose", calibration, max_error=0.3).report
    tight = run(tmp_path / "tight", calibration, max_error=0.02).report
    for report, limit in ((loose, 0.3), (tight, 0.02)):
        assert report["output_error"]["relative_l2"] <= limit
        assert report["output_error"]["limit"] == limit
    assert loose["result"]["latency"]["value"] < tight["result"]["latency"]["value"]
    assert tight["result"]["latency"]["value"] <= tight["baseline"]["latency"]["value"]


def test_the_time_budget_ends_a_search_within_the_error_after_its_first_plan(tmp_path: Path, calibration: Path) -> None:
    report = run(tmp_path / "out", calibration, max_error=0.3, time_budget_s=1e-3).report
    assert len(report["solver"]["iterations"]) == 1
    assert report["output_error"]["relative_l2"] <= 0.3
    assert any("time budget ended the search early" in note["text"] for note in report["notes"])


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, calibration: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, calibration, budgets={"latency": "60%"})
    for file in ("plan.json", "model.onnx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_config_toml_repeats_the_run(tmp_path: Path, calibration: Path) -> None:
    run(tmp_path / "a", calibration, budgets={"latency": "60%"}, seed=3)
    config = LowerConfig.from_toml(tmp_path / "a" / "config.toml", {"output": tmp_path / "b"})
    driver.lower(config, QuietEvents())
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()


def test_a_plan_is_replayed(tmp_path: Path, calibration: Path) -> None:
    first = run(tmp_path / "a", calibration, budgets={"latency": "60%"}).report
    second = run(tmp_path / "b", calibration, plan=tmp_path / "a" / "plan.json").report
    choices = [[(x["name"], x["choice"], x["rank"]) for x in r["layers"]] for r in (first, second)]
    assert choices[0] == choices[1]
    assert second["result"]["latency"]["value"] == first["result"]["latency"]["value"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"name": "nowhere", "choice": "svd", "rank": [3]}], "no rewritable layer 'nowhere'"),
        ([{"name": None, "choice": "svd", "rank": [3]}], "cannot be svd of rank"),
        ("nonsense", "is no plan; give the plan.json of an earlier run"),
    ],
)
def test_a_plan_of_another_network_is_refused(tmp_path: Path, calibration: Path, layers: Any, message: str) -> None:
    conv = next(n.name for n in onnx.load(DIGITS).graph.node if n.op_type == "Conv")
    if isinstance(layers, list):
        layers = [{**layer, "name": layer["name"] or conv} for layer in layers]
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", calibration, plan=tmp_path / "plan.json")
    assert not (tmp_path / "out").exists()


def test_globs_choose_the_layers(tmp_path: Path, calibration: Path) -> None:
    names = [layer["name"] for layer in run(tmp_path / "a", calibration, budgets={"latency": "90%"}).report["layers"]]
    report = run(tmp_path / "b", calibration, budgets={"latency": "97%"}, exclude=(names[1],)).report
    (row,) = [layer for layer in report["layers"] if layer["name"] == names[1]]
    assert (row["choice"], row["reason"]) == ("dense", "named by --exclude")


def test_without_data_the_weights_decide_and_a_warning_says_so(tmp_path: Path) -> None:
    report = run(tmp_path / "out", None, budgets={"latency": "80%"}).report
    assert any("no --calib data" in warning for warning in report["warnings"])
    assert report["budgets"][0]["met"]


class _InterruptAt(QuietEvents):
    """Presses Ctrl-C when a stage begins for the n-th time."""

    def __init__(self, stage: str, times: int = 1) -> None:
        self.left = {stage: times}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Progress]:
        if name in self.left:
            self.left[name] -= 1
            if not self.left[name]:
                raise KeyboardInterrupt
        with super().stage(name, total) as progress:
            yield progress


@pytest.mark.parametrize("stage", ["collect statistics", "score candidates", "correct in sequence", "verify", "commit"])
def test_an_interrupted_run_leaves_nothing_half_written_and_resumes(
    tmp_path: Path, calibration: Path, stage: str
) -> None:
    run(tmp_path / "whole", calibration, budgets={"latency": "60%"})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", calibration, _InterruptAt(stage), budgets={"latency": "60%"})
    assert not (tmp_path / "out").exists()
    watch = RecordingEvents()
    run(tmp_path / "out", calibration, watch, budgets={"latency": "60%"}, resume=True)
    for file in ("plan.json", "model.onnx"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    if stage in ("verify", "commit"):  # everything dear was done before: none of it is done again
        assert not {"collect statistics", "score candidates", "correct in sequence"} & set(watch.timings)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_resuming_another_run_is_refused(tmp_path: Path, calibration: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", calibration, _InterruptAt("verify"), budgets={"latency": "60%"})
    with pytest.raises(UsageError, match="budgets"):
        run(tmp_path / "out", calibration, budgets={"latency": "50%"}, resume=True)


def test_inspect_names_every_layer(calibration: Path) -> None:
    rows = driver.inspect(LowerConfig.from_values({"model": DIGITS}), QuietEvents())
    nodes = [n.name for n in onnx.load(DIGITS).graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert sorted(row.node for row in rows) == sorted(nodes)
    assert {row.status for row in rows} <= {"rewritable", "kept"} and all(row.reason for row in rows)


def test_the_plan_of_the_lowest_loss_stays(tmp_path: Path, calibration: Path) -> None:
    report = run(tmp_path / "out", calibration, budgets={"latency": "60%"}, effort="default").report
    notes = [turn["note"] for turn in report["solver"]["iterations"] if "loss on" in turn.get("note", "")]
    losses = [float(note.rsplit(" ", 1)[1]) for note in notes]
    assert len(losses) > 2 and any("turn 1 learned" in note for note in notes)
    before, after = onnx_outputs(DIGITS, calibration), onnx_outputs(tmp_path / "out" / "model.onnx", calibration)
    p, q = (torch.log_softmax(torch.from_numpy(o).double(), 1) for o in (before, after))
    assert float((p.exp() * (p - q)).sum(1).mean()) == pytest.approx(min(losses), rel=2e-2)


@pytest.mark.parametrize("foreseen", [False, True])
def test_what_the_emitted_files_take_beyond_the_prices_is_made_up_for(
    tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    """Files that take 500 cycles more than the price list says: searched again, or allowed for where it is known."""
    prices = parse_target("asic").latency
    emitted = []

    def dearer(model: Path) -> Cost:
        cost = prices.network(OnnxGraph.read(model).workload())
        return replace(cost, latency=cost.latency + 500)

    def emit(request: EmissionRequest) -> Emission:
        emitted.append(dearer(request.model))
        return Emission({"binary": None}, cost=emitted[-1])

    def target(text: str) -> Target:
        baseline = (lambda model, shapes, seed, events: dearer(model)) if foreseen else None
        return replace(parse_target(text), emit=emit, baseline=baseline)

    monkeypatch.setattr(driver, "parse_target", target)
    # A limit just at the plan that is found without the 500 cycles.
    free = replace(parse_target("asic"), emit=_no_binary, baseline=None)
    monkeypatch.setattr(driver, "parse_target", lambda text: free)
    limit = run(tmp_path / "first", calibration, budgets={"latency": "70%"}).report["result"]["latency"]["value"]
    monkeypatch.setattr(driver, "parse_target", target)
    result = run(tmp_path / "second", calibration, budgets={"latency": f"{limit:.0f}cycles"})
    (budget,) = result.report["budgets"]
    assert budget["met"] and budget["value"] == emitted[-1].latency <= limit
    assert budget["predicted"] == budget["value"] - 500
    assert len(emitted) == (1 if foreseen else 2)
