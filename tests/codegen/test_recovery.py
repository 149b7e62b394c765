"""Recovery in the pipeline, on the demo's network and data; the plan is replayed, so that little is searched."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from codegen import cli, driver
from codegen.config import LowerConfig
from codegen.emission import Emission, EmissionRequest
from codegen.events import Events, Progress, QuietEvents
from codegen.recovery import check_training
from codegen.recovery_processes import error_of, kind_of
from codegen.report.build import validate
from codegen.report.console import print_report
from codegen.result import LowerResult
from codegen.target import Target, parse_target
from examples.digits_data import digits
from passes.errors import InputError, RankcError, UnsupportedError, UsageError, VerificationError
from passes.onnx_graph import OnnxGraph
from passes.training.recovery import NotTrainedError

pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits.onnx"

PLAN = {
    "/down2/conv/Conv": ("channel_svd_in", [2]),
    "/block2/first/Conv": ("channel_svd_in", [3]),
    "/block2/second/Conv": ("spatial_svd_vh", [5]),
}


class Emitter:
    """Writes nothing and remembers what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[tuple[bool, bytes]] = []

    def __call__(self, request: EmissionRequest) -> Emission:
        self.requests.append((request.draft, request.model.read_bytes()))
        return Emission({"binary": None})


@pytest.fixture(autouse=True)
def emitter(monkeypatch: pytest.MonkeyPatch) -> Emitter:
    made = Emitter()

    def target(text: str) -> Target:
        return replace(parse_target(text), emit=made, baseline=None)

    monkeypatch.setattr(driver, "parse_target", target)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz, unlabelled.npz, test.npz and plan.json."""
    folder = tmp_path_factory.mktemp("files")
    for name, part in (("train", "train"), ("test", "test")):
        x, y = digits(part)
        np.savez(folder / f"{name}.npz", image=x, labels=y)
    np.savez(folder / "unlabelled.npz", image=digits("train")[0])
    layers = [{"name": name, "choice": choice, "rank": rank} for name, (choice, rank) in PLAN.items()]
    (folder / "plan.json").write_text(json.dumps({"layers": layers}))
    return folder


def run(out: Path, files: Path, events: Events | None = None, **options: Any) -> LowerResult:
    values = {
        "model": DIGITS, "output": out, "effort": "quick", "plan": files / "plan.json", "samples": 64,
        "train": str(files / "train.npz"), "eval": str(files / "test.npz"), "epochs": 3, **options,
    }  # fmt: skip
    return driver.lower(LowerConfig.from_values(values), events or QuietEvents())


def top1(path: Path) -> float:
    x, y = digits("test")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float((session.run(None, {"image": x})[0].argmax(1) == y).mean())


def test_accuracy_rises_within_the_budget(tmp_path: Path, files: Path, emitter: Emitter) -> None:
    before = run(tmp_path / "plain", files, train=None, epochs=None, calib=str(files / "train.npz"))
    result = run(tmp_path / "out", files, budgets={"latency": "80%", "params": "50%"})
    report = result.report
    validate(report)
    assert not result.missed and all(budget["met"] for budget in report["budgets"])
    for metric in ("latency", "energy", "macs", "params", "size"):
        assert report["result"][metric] == before.report["result"][metric], "weights change no cost"
    after = top1(tmp_path / "out" / "model.onnx")
    assert report["result"]["accuracy"]["value"] == pytest.approx(after)
    assert after > top1(tmp_path / "plain" / "model.onnx") + 0.05

    assert [draft for draft, _ in emitter.requests] == [False, True, False]
    assert emitter.requests[1][1] != emitter.requests[2][1], "what is emitted last is the trained network"
    assert (tmp_path / "out" / "model.onnx").read_bytes() == emitter.requests[2][1]

    recovery = report["recovery"]
    assert recovery["epochs"] == len(recovery["curve"]) == 3 and recovery["measure"] == "accuracy"
    assert recovery["samples"] + recovery["held_out"] == report["data"]["training"]["samples"] == 1078
    best = recovery["curve"][recovery["best_epoch"] - 1]
    assert recovery["after"] == best["held_out"] == max(row["held_out"] for row in recovery["curve"])
    assert recovery["dense"] > 0.95
    assert {"/down2/conv/Conv/channel_svd_in_0", "/down2/conv/Conv/channel_svd_in_1"} <= set(recovery["normalized"])
    assert any("samples of --train" in note["text"] for note in report["notes"])

    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Recovery</h2>" in page and 'aria-label="Learning curve"' in page
    stream = io.StringIO()
    print_report(report, stream=stream)
    assert "recovery " in stream.getvalue() and "held-out samples" in stream.getvalue()
    assert before.report["recovery"] is None
    assert "Learning curve" not in (tmp_path / "plain" / "report.html").read_text()


def test_the_output_error_is_that_of_the_trained_network(tmp_path: Path, files: Path) -> None:
    report = run(tmp_path / "out", files, epochs=1, calib=str(files / "train.npz")).report
    x = digits("train")[0][:64]
    runs = [OnnxGraph.read(path).run({"image": x})[0] for path in (DIGITS, tmp_path / "out" / "model.onnx")]
    wanted = np.linalg.norm(runs[1] - runs[0]) / np.linalg.norm(runs[0])
    assert report["output_error"]["relative_l2"] == pytest.approx(wanted, rel=1e-3)
    assert report["output_error"]["samples"] == 64


def test_labels_are_not_needed(tmp_path: Path, files: Path) -> None:
    report = run(tmp_path / "out", files, train=str(files / "unlabelled.npz"), epochs=2).report
    recovery = report["recovery"]
    assert recovery["measure"] == "-error" and recovery["dense"] is None
    assert recovery["before"] < recovery["after"] <= 0


class Interrupting(QuietEvents):
    """Ctrl-C at a step of recovery."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Progress]:
        yield _Interrupt(self.at if name == "recover" else -1)


class _Interrupt:
    def __init__(self, at: int) -> None:
        self.at, self.done = at, 0

    def advance(self, n: int = 1, note: str = "") -> None:
        if self.done < self.at <= self.done + n:
            signal.raise_signal(signal.SIGINT)
        self.done += n


def test_an_interrupted_run_goes_on_to_the_same_network(tmp_path: Path, files: Path) -> None:
    run(tmp_path / "whole", files, epochs=2)
    out = tmp_path / "out"
    watcher = Interrupting(at=24)  # of 2 x 16 steps
    with pytest.raises(KeyboardInterrupt):
        run(out, files, watcher, epochs=2)
    assert not out.exists() and list((tmp_path / ".out.rankc" / "training").glob("*/training.pt"))
    assert any("epoch 1 of 2" in note for note in watcher.notes)
    with pytest.raises(UsageError, match="epochs was 2 and is 3"):
        run(out, files, epochs=3, resume=True)
    again = Interrupting(at=-1)
    run(out, files, again, epochs=2, resume=True)
    assert not any("epoch 1 of 2" in note for note in again.notes), "it is not trained anew"
    assert any("epoch 2 of 2" in note for note in again.notes)
    assert (out / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert not (tmp_path / ".out.rankc").exists()


def test_other_data_are_another_run(tmp_path: Path, files: Path) -> None:
    data = tmp_path / "data.npz"
    data.write_bytes((files / "train.npz").read_bytes())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", files, Interrupting(at=1), train=str(data))
    data.write_bytes((files / "test.npz").read_bytes())
    with pytest.raises(UsageError, match="has changed"):
        run(tmp_path / "out", files, train=str(data), resume=True)


def test_what_training_takes_beyond_the_error_limit_is_not_kept(tmp_path: Path, files: Path, emitter: Emitter) -> None:
    """Without a budget the output error is the promise: here it is met by the plan and would not be after training."""
    result = run(
        tmp_path / "out", files, plan=None, max_error=0.05, epochs=1, lr=0.5, include=("*block2*",),
        calib=str(files / "train.npz"),
    )  # fmt: skip
    report = result.report
    assert report["recovery"]["best_epoch"] == 0 and report["recovery"]["after"] == report["recovery"]["before"]
    assert report["output_error"]["relative_l2"] <= 0.05
    assert emitter.requests[-1] == (False, emitter.requests[-2][1]), "the untrained network, in full"
    assert any(text.startswith("recovery: ") for text in report["warnings"])


def test_nothing_rewritten_is_nothing_to_recover(tmp_path: Path, files: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"layers": []}))
    report = run(tmp_path / "out", files, plan=tmp_path / "plan.json").report
    assert report["recovery"] is None
    assert any("no layer was rewritten" in note["text"] for note in report["notes"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_diverges_keeps_the_plan_s_network(
    tmp_path: Path, files: Path, emitter: Emitter, processes: int
) -> None:
    report = run(tmp_path / "out", files, epochs=1, lr=1e30, train_processes=processes, device="cpu").report
    assert report["recovery"] is None and any("training diverged" in text for text in report["warnings"])
    assert emitter.requests == [(True, emitter.requests[0][1]), (False, emitter.requests[0][1])]


def test_a_checkpoint_that_cannot_be_written_or_read_ends_the_run_and_stays(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, full = tmp_path / "out", InputError("training.pt: cannot be written: No space left on device")

    def failing(path: Path, state: dict[str, Any]) -> None:
        raise full

    with pytest.raises(KeyboardInterrupt):
        run(out, files, Interrupting(at=24), epochs=2)
    (kept,) = (tmp_path / ".out.rankc" / "training").glob("*/training.pt")
    whole = kept.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left on device"):
        patch.setattr("passes.training.checkpoint.save", failing)
        run(out, files, epochs=2, resume=True)
    assert kept.read_bytes() == whole and not out.exists()
    kept.write_bytes(whole[:100])
    with pytest.raises(InputError, match="is no checkpoint"):
        run(out, files, epochs=2, resume=True)
    assert kept.read_bytes() == whole[:100] and not out.exists()


def test_processes_must_fit_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)

    def check(processes: int, device: str | None) -> None:
        values = {"model": DIGITS, "train": "no such file", "train_processes": processes, "device": device}
        check_training(LowerConfig.from_values(values))

    for device in (None, "auto", "cuda"):
        check(2, device)
        with pytest.raises(UsageError, match="--train-processes 3: takes a GPU each, this machine has 2"):
            check(3, device)
    check(3, "cpu")
    check(1, "cuda:1")
    with pytest.raises(UsageError, match="--device cuda:1: is one GPU, --train-processes 2 takes as many"):
        check(2, "cuda:1")


def test_two_processes_share_a_recovery(tmp_path: Path, files: Path) -> None:
    report = run(tmp_path / "out", files, epochs=2, train_processes=2, device="cpu").report
    recovery = report["recovery"]
    assert recovery["processes"] == 2 and recovery["epochs"] == 2
    assert recovery["after"] > recovery["before"]
    x, _ = digits("test")
    trained, dense = (OnnxGraph.read(p) for p in (tmp_path / "out" / "model.onnx", DIGITS))
    assert [spec.name for spec in trained.outputs] == [spec.name for spec in dense.outputs]
    assert trained.run({"image": x[:2]})[0].shape == (2, 10)


def control_flow(path: Path) -> Path:
    """conv -> If: cannot be trained."""
    rng = np.random.default_rng(0)
    weight = helper.make_tensor("w", TensorProto.FLOAT, (4, 1, 3, 3), rng.standard_normal(36).astype(np.float32))

    def branch(name: str, op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["c"], [f"{name}_y"], f"{name}_node")], name, [], [out])

    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], "conv"),
        helper.make_node("ReduceMax", ["c"], ["m"], "max", keepdims=0),
        helper.make_node("Cast", ["m"], ["b"], "cast", to=TensorProto.BOOL),
        helper.make_node("If", ["b"], ["y"], "choice", then_branch=branch("t", "Relu"), else_branch=branch("e", "Abs")),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 14, 14])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_what_cannot_be_trained_ends_at_once(tmp_path: Path, files: Path) -> None:
    model = control_flow(tmp_path / "if.onnx")
    with pytest.raises(UnsupportedError, match=r"cannot be trained, leave out --train: .*choice"):
        run(tmp_path / "out", files, model=model, plan=None)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.rankc").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": None}, "--epochs is for training: give --train data"),
        ({"epochs": 0}, "epochs"),
        ({"held_out": 1.0}, "held_out"),
        ({"augment": "mirror"}, "augment"),
        ({"augment": "script"}, "defines no augment"),
        ({"device": "tpu"}, "--device 'tpu'"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    tmp_path: Path, files: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "out", files, **options)


def test_under_torchrun_lower_says_what_to_do(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"--train-processes N, or train with tools/train\.py"):
        run(tmp_path / "out", files)


def test_the_command_line_knows_the_options(tmp_path: Path, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["lower", str(DIGITS), "-o", str(tmp_path / "out"), "--train", str(files / "train.npz")]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--lr", "-1"])
    assert end.value.code == 2 and "--lr" in capfd.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(
            [
                *arguments,
                *("--plan", str(files / "plan.json"), "--effort", "quick", "--samples", "64", "--epochs", "1"),
                *("--batch", "128", "--lr", "0.01", "--augment", "flip", "--label-smoothing", "0.1"),
                *("--held-out", "0.2", "--device", "cpu", "--json", "-", "-q"),
            ]
        )
    assert end.value.code == 0
    out, err = capfd.readouterr()
    options = json.loads(out)["recovery"]["options"]
    assert err == ""
    wanted = {"epochs": 1, "batch": 128, "lr": 0.01, "augment": "flip", "label_smoothing": 0.1, "held_out": 0.2}
    assert {name: options[name] for name in wanted} == wanted
    again = LowerConfig.from_toml(tmp_path / "out" / "config.toml")
    assert (again.epochs, again.batch, again.lr, again.augment, again.device) == (1, 128, 0.01, "flip", "cpu")
    assert again.train == str(files / "train.npz") and again.train_processes is None


@pytest.mark.parametrize(
    "kind", [RankcError, InputError, UnsupportedError, UsageError, VerificationError, NotTrainedError]
)
def test_an_error_of_a_process_is_one_of_the_run(kind: type[RankcError]) -> None:
    class Special(kind):  # type: ignore[misc, valid-type]
        pass

    assert error_of({"error": "why", "kind": kind_of(Special("why"))}).exit_code == kind.exit_code
    assert type(error_of({"error": "why", "kind": kind_of(kind("why"))})) is kind
