"""Experiments carried out on a tiny network: what is written, what is not done twice, what is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from codegen.config import LowerConfig
from codegen.dataset_files import script_function, split_source
from codegen.events import QuietEvents, RecordingEvents
from codegen.reproduce import experiment as experiments
from codegen.reproduce import run as running
from codegen.reproduce import steps as stepping
from codegen.reproduce.data import Cifar10, Synthetic, loader
from codegen.reproduce.run import COLUMNS, ReproduceConfig, reproduce, schema
from codegen.train.run import train
from passes.errors import InputError, UsageError
from tests.onnx_models import onnx_model

SMALL = """
title = "Two of the steps, on a tiny network"
data = "synthetic"
network = "tiny"
[[steps]]
name = "dense"
kind = "dense"
options = { epochs = 2, batch = 48, lr = 0.05, held_out = 0.1, precision = "fp32" }
[[steps]]
name = "elrt"
kind = "elrt"
options = { macs = "60%", epochs = 1, batch = 48, lr = 0.05, held_out = 0.1, precision = "fp32" }
[[published]]
system = "S"
source = "somewhere"
gain_points = 0.5
macs_removed = 40.0
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    before = experiments.read
    monkeypatch.setattr(experiments, "read", lambda n: experiments.parse(n, SMALL) if n == "small" else before(n))


def config(folder: Path, **changed: Any) -> ReproduceConfig:
    return replace(ReproduceConfig("small", folder / "out", folder, folder, device="cpu"), **changed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "read", lambda name: experiments.parse(name, SMALL))
        return folder, reproduce(config(folder, seeds=(0, 1)), QuietEvents())


def test_the_result_is_what_the_files_say(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    place = folder / "out" / "small" / "short"
    assert json.loads((place / "result.json").read_text()) == result
    assert [(run["seed"], run["step"]) for run in result["runs"]] == [(s, n) for s in (0, 1) for n in ("dense", "elrt")]
    x, y = Synthetic(folder).test()
    for run in result["runs"]:
        model = place / f"seed{run['seed']}" / run["step"] / "result" / "model.onnx"
        scores = onnxruntime.InferenceSession(str(model)).run(None, {"input": x})[0]
        assert run["accuracy"] == float(np.mean(scores.argmax(1) == y))
    dense, low = ([run for run in result["runs"] if run["step"] == name] for name in ("dense", "elrt"))
    gains = [100 * (one["accuracy"] - other["accuracy"]) for one, other in zip(low, dense, strict=True)]
    assert [run["gain_points"] for run in low] == pytest.approx(gains) and dense[0]["gain_points"] == 0
    assert all(run["macs"][1] <= 0.6 * run["macs"][0] for run in low)
    summary = {row["step"]: row for row in result["summary"]}
    assert summary["elrt"]["gain_points_mean"] == pytest.approx(np.mean(gains))
    assert summary["elrt"]["gain_points_deviation"] == pytest.approx(np.std(gains, ddof=1))
    assert summary["elrt"]["macs_ratio_mean"] <= 0.6 and summary["dense"]["latency_ratio_mean"] is None
    assert result["published"] == [
        {"system": "S", "source": "somewhere", "gain_points": 0.5, "macs_removed": 40.0}
    ]  # fmt: skip


def test_learning_curves_and_log(finished: tuple[Path, dict[str, Any]]) -> None:
    place = finished[0] / "out" / "small" / "short"
    with (place / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(r["seed"], r["step"], r["epoch"]) for r in rows] == [
        (seed, step, epoch) for seed in "01" for step, epoch in (("dense", "1"), ("dense", "2"), ("elrt", "1"))
    ]
    assert all(0 <= float(row["held_out"]) <= 1 for row in rows)
    log = (place / "log.txt").read_text()
    assert "epoch 2 of 2" in log and "seed 1, elrt" in log


def test_what_is_done_is_not_done_again(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = finished

    def never(*_: Any) -> Any:
        pytest.fail("was done again")

    monkeypatch.setattr(running, "top1", never)
    monkeypatch.setattr("codegen.train.run.Trainer", never)
    assert reproduce(config(folder, seeds=(0, 1)), QuietEvents()) == result
    one = reproduce(config(folder, seeds=(1,)), QuietEvents())
    assert one["runs"] == result["runs"][2:] and one["summary"][1]["accuracy_deviation"] is None


def test_how_the_folders_are_written_makes_no_difference(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = finished
    monkeypatch.chdir(folder)
    written = config(folder, output=Path("out"), data=Path("nowhere") / "..", seeds=(0, 1))
    assert reproduce(written, QuietEvents()) == result


def test_an_interrupted_step_goes_on_under_another_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stepping, "train", lambda given, events, on_epoch: train(given, events, stopped))
    with pytest.raises(Stopped):
        reproduce(config(tmp_path, output=Path("out"), data=Path()), QuietEvents())
    assert not (tmp_path / "out/small/short/seed0/dense/result/train.json").exists()
    monkeypatch.setattr(stepping, "train", train)
    result = reproduce(config(tmp_path), QuietEvents())
    assert len(result["runs"]) == 2


def test_finished_steps_may_be_moved(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    monkeypatch.setattr(stepping, "train", lambda *_: pytest.fail("was done again"))
    assert reproduce(config(tmp_path, seeds=(0, 1)), QuietEvents()) == finished[1]


def test_the_loader_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    source = loader(Cifar10(Path("data")), "input", Path("scripts"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    path, function = split_source(source)
    assert function is not None
    training = script_function(path, function)
    assert training is not None
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "data" / "cifar10" / "train_0.npz"))):
        list(training())


def test_a_run_tells_what_it_was_trained_on(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays what it was, whatever machine the finished steps are read on."""
    folder, result = finished
    report = json.loads((folder / "out/small/short/seed0/elrt/result/train.json").read_text())
    expected = {"device": "cpu", "precision": "fp32", "processor": report["hardware"]["processor"]}
    assert [run["trained_on"] for run in result["runs"]] == 4 * [expected]
    elsewhere = {"cores": 1, "threads": 1, "processor": "vax", "system": "VMS", "gpu": "none such"}
    monkeypatch.setattr(running, "_machine", lambda device: elsewhere)
    monkeypatch.setattr(stepping, "hardware", lambda group: {"processor": "vax"})
    again = reproduce(config(folder, seeds=(0, 1)), QuietEvents())
    assert again["machine"] == elsewhere and again["runs"] == result["runs"]


LOWERED: dict[str, Any] = {
    **{name: {k: {"value": v, "unit": "cycles"} for k in ("macs", "params", "latency")}
       for name, v in (("baseline", 2.0), ("result", 1.0))},
    "budgets": [{"met": True}, {"met": False}],
    "recovery": {"before": 0.1, "after": 0.2, "seconds": 3.0, "device": "cuda:1", "precision": "bf16", "curve": []},
    "artifacts": {"onnx": "model.onnx", "quantized": "model_int8.onnx"},
}  # fmt: skip


def classifier(path: Path, which: int, rows: int | str) -> None:
    """A network that always names class ``which``; its file takes ``rows`` samples at once."""
    text = f"net (float[{rows},3,8,8] input) => (float[{rows},4] y) {{\n"
    text += " f = Flatten (input)\n y = Gemm (f, w, b)\n}"
    bias = np.eye(4, dtype=np.float32)[which]
    graph = onnx_model(text, {"w": np.zeros((192, 4), np.float32), "b": bias})
    path.write_bytes(graph.SerializeToString())


def test_the_int8_network_and_missed_budgets_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowering = SMALL.partition("[[published]]")[0].replace(
        'name = "elrt"\nkind = "elrt"\noptions = { macs', 'name = "low"\nkind = "lower"\noptions = { macs'
    )
    lowering = re.sub(r'(kind = "lower"\noptions = ).*', r'\1{ budgets = { macs = "60%" } }', lowering)
    monkeypatch.setattr(experiments, "read", lambda name: experiments.parse(name, lowering))

    def lower(given: LowerConfig, events: Any) -> Any:
        assert given.output is not None
        given.output.mkdir(parents=True)
        classifier(given.output / "model.onnx", 1, "N")
        classifier(given.output / "model_int8.onnx", 2, 1)
        (given.output / "report.json").write_text(json.dumps(LOWERED))
        return SimpleNamespace(report=LOWERED)

    monkeypatch.setattr(stepping, "lower", lower)
    monkeypatch.setattr(stepping, "hardware", lambda group: {"processor": f"the GPU at {group.device}"})
    dense = tmp_path / "dense.onnx"
    classifier(dense, 0, "N")
    result = reproduce(config(tmp_path, dense=dense), QuietEvents())
    share = np.bincount(Synthetic(tmp_path).test()[1], minlength=4) / 480
    runs = {run["step"]: run for run in result["runs"]}
    assert (runs["low"]["accuracy"], runs["low"]["accuracy_int8"]) == (share[1], share[2])
    assert runs["dense"]["accuracy_int8"] is None and "trained_on" not in runs["dense"]
    assert runs["low"]["trained_on"] == {"device": "cuda:1", "precision": "bf16", "processor": "the GPU at cuda:1"}
    rows = {row["step"]: row for row in result["summary"]}
    assert rows["low"]["budgets_missed"] == 1 and rows["dense"]["budgets_missed"] is None
    assert rows["low"]["accuracy_int8_mean"] == share[2] and rows["dense"]["accuracy_int8_mean"] is None
    # without the note beside the report, what the report itself says
    (tmp_path / "out/small/short/seed0/low/machine.json").unlink()
    (again,) = [run for run in reproduce(config(tmp_path, dense=dense), QuietEvents())["runs"] if run["step"] == "low"]
    assert again["trained_on"] == {"device": "cuda:1", "precision": "bf16", "processor": None}


class Stopped(Exception):
    pass


def test_an_interrupted_experiment_goes_on(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first epoch of the second seed: only what was missing is done, to the same end."""
    done: list[str] = []
    stops = ["seed1/dense 0"]
    train = stepping.train

    def counted(given: Any, events: Any, on_epoch: Any) -> Any:
        name = f"{given.output.parent.parent.name}/{given.output.parent.name}"

        def told(phase: str, epoch: Any, total: int) -> None:
            if f"{name} {epoch.number}" in stops:
                raise Stopped
            done.append(f"{name} {epoch.number}")

        return train(given, events, told)

    monkeypatch.setattr(stepping, "train", counted)
    with pytest.raises(Stopped):
        reproduce(config(tmp_path, seeds=(0, 1)), QuietEvents())
    assert done == ["seed0/dense 0", "seed0/dense 1", "seed0/elrt 0"]
    assert not (tmp_path / "out/small/short/result.json").exists()
    stops.clear()
    result = reproduce(config(tmp_path, seeds=(0, 1)), QuietEvents())
    assert done[3:] == ["seed1/dense 1", "seed1/elrt 0"]
    fresh = [{k: v for k, v in run.items() if k not in ("seconds", "model_sha256")} for run in finished[1]["runs"]]
    again = [{k: v for k, v in run.items() if k not in ("seconds", "model_sha256")} for run in result["runs"]]
    assert again == fresh


def test_a_given_dense_network_is_not_trained(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    dense = finished[0] / "out/small/short/seed0/dense/result/model.onnx"
    result = reproduce(config(tmp_path, dense=dense, epochs=1), QuietEvents())
    assert result["dense_given"] and result["epochs"] == 1
    assert result["runs"][0]["accuracy"] == finished[1]["runs"][0]["accuracy"]
    assert not (tmp_path / "out/small/short-1-epochs/seed0/dense").exists()
    assert (tmp_path / "out/small/short-1-epochs/result.json").is_file()
    with pytest.raises(InputError, match="no such network; --dense says where it is"):
        reproduce(config(tmp_path, dense=tmp_path / "none.onnx"), QuietEvents())


def test_a_folder_of_another_recipe_is_refused(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SMALL.replace("epochs = 2", "epochs = 3")
    monkeypatch.setattr(experiments, "read", lambda name: experiments.parse(name, other))
    with pytest.raises(UsageError, match="seed0/dense: holds a step with another options; give another -o"):
        reproduce(config(finished[0]), QuietEvents())


def test_a_folder_of_other_data_is_refused(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Synthetic, "sha256", lambda self: "0" * 64)
    with pytest.raises(UsageError, match="its experiments saw other synthetic data"):
        reproduce(config(finished[0]), QuietEvents())


def test_missing_data_and_networks_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train_0\.npz: no such file.*--data"):
        reproduce(config(tmp_path, name="dense-resnet20"), QuietEvents())
    with pytest.raises(UsageError, match="--seeds 1,1"):
        reproduce(config(tmp_path, seeds=(1, 1)), QuietEvents())
    assert not (tmp_path / "out").exists()


def test_the_schema_is_strict() -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema": 1}, schema())


@pytest.mark.slow
def test_every_kind_of_step(tmp_path: Path) -> None:
    events = RecordingEvents()
    result = reproduce(config(tmp_path, name="self-test"), events)
    runs = {run["step"]: run for run in result["runs"]}
    assert set(runs) == {"dense", "milp", "elrt", "plan", "elrt-planned", "svd"}
    for step in ("milp", "elrt", "plan", "elrt-planned", "svd"):
        assert runs[step]["macs"][1] <= 0.6 * runs[step]["macs"][0] == 0.6 * runs["dense"]["macs"][0]
        assert runs[step]["accuracy"] > 0.5  # chance is a quarter
    assert 0.5 < runs["milp"]["accuracy_int8"] <= 1 and runs["milp"]["trained_on"]["device"] == "cpu"
    assert runs["milp"]["budgets_met"] and runs["milp"]["latency"][1] < runs["milp"]["latency"][0]
    assert runs["plan"]["held_out"] is None and runs["elrt-planned"]["macs"] == runs["plan"]["macs"]
    folders = {name: tmp_path / "out" / "self-test" / "short" / "seed0" / name / "result" for name in runs}
    planned = json.loads((folders["plan"] / "plan.json").read_text(encoding="utf-8"))["layers"]
    trained = json.loads((folders["elrt-planned"] / "train.json").read_text(encoding="utf-8"))["layers"]
    found = {layer["name"]: (layer["choice"], layer["rank"]) for layer in trained}
    assert all(found[layer["name"]] == (layer["choice"], layer["rank"]) for layer in planned)
    again = reproduce(config(tmp_path, name="self-test"), QuietEvents())
    assert again == result
