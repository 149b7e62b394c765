"""``rankc train`` from outside: files, streams, exit codes, interrupts, several processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from codegen.cli import main
from codegen.train.console import TrainingConsole
from codegen.train.report import checked
from passes.fold_batchnorm import FoldBatchNorm
from passes.fuse_pointwise import FusePointwise
from passes.onnx_graph import OnnxGraph
from passes.training.progress import Epoch

ROOT = Path(__file__).resolve().parents[3]
Arguments = Callable[..., list[str]]
Rankc = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture
def rankc(capfd: pytest.CaptureFixture[str]) -> Rankc:
    """The command line in this process: exit code, stdout, stderr."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "train.json").read_text())
    return found


def test_a_run_leaves_a_network_its_weights_and_its_record(
    arguments: Arguments, rankc: Rankc, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = rankc(arguments("elrt", out, "--macs", "60%", "--json", "-"))
    assert code == 0, stderr
    report = checked(json.loads(stdout))
    assert report == report_of(out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "log.csv", "model.onnx", "model.pt", "train.json"]
    assert "train 2/2: loss" in stderr and "held out" in stderr
    # the file: names, symbolic batch, BatchNorm, factored layers as ordinary nodes
    model = onnx.load(out / "model.onnx")
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["image", "logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    ops = [node.op_type for node in model.graph.node]
    low = [row for row in report["layers"] if row["choice"] == "tucker2"]
    assert ops.count("BatchNormalization") == 3 and ops.count("Conv") == 3 + 2 * len(low) and len(low) == 2
    # what it says it costs is what the compiler counts
    work = OnnxGraph.read(out / "model.onnx", {}).workload()
    assert report["result"]["macs"] == sum(op.stage.macs for op in work if op.stage is not None)
    assert report["result"]["macs"] <= 0.6 * report["baseline"]["macs"]
    # and what it says it scores is what onnxruntime makes of it
    arrays = np.load(data)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    scores = session.run(None, {"image": arrays["image"]})[0]
    assert report["result"]["accuracy"] == np.mean(scores.argmax(1) == arrays["labels"])
    # lowering has nothing to decompose: what it folds and fuses first leaves the outputs as they are
    graph = OnnxGraph.read(out / "model.onnx", {})
    assert FoldBatchNorm().run(graph).modified
    FusePointwise().run(graph)
    np.testing.assert_allclose(graph.run({"image": arrays["image"][:1]})[0], scores[:1], rtol=0, atol=1e-4)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["rankc.recipe"]) == report["recipe"]
    assert json.loads(facts["rankc.accuracy"]) == report["result"]["accuracy"]
    weights = torch.load(out / "model.pt", weights_only=True)
    assert report["result"]["params"] == sum(
        w.numel() for n, w in weights.items() if "running" not in n and "num_batches" not in n
    )
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [(r["phase"], r["epoch"]) for r in rows] == [("train", "1"), ("train", "2")]
    assert [float(r["loss"]) for r in rows] == [e["loss"] for e in report["phases"][0]["epochs"]]
    # a second run does not touch it, --resume shows it again
    assert rankc(arguments("elrt", out, "--macs", "60%"))[0] == 2
    code, stdout, _ = rankc(arguments("elrt", out, "--macs", "60%", "--resume", "--json", "-"))
    assert code == 0 and json.loads(stdout) == report
    code, _, stderr = rankc(arguments("elrt", out, "--macs", "70%", "--resume"))
    assert code == 2 and 'its run had macs "60%", this one has "70%"' in stderr


def test_an_interrupted_run_goes_on_to_the_same_weights(
    arguments: Arguments, rankc: Rankc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--macs", "60%", "--layout", "spatial", "--finetune-epochs", "6")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert rankc(arguments("svd", whole, *options, "-q"))[0] == 0
    say = TrainingConsole.epoch

    def interrupted(console: TrainingConsole, phase: str, epoch: Epoch, epochs: int) -> None:
        say(console, phase, epoch, epochs)
        if (phase, epoch.number) == ("finetune", 2):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingConsole, "epoch", interrupted)
        code, _, stderr = rankc(arguments("svd", cut, *options))
    assert code == 130, stderr
    assert "interrupted: the state is saved, --resume goes on from it" in stderr and "finetune 4/6" not in stderr
    assert not (cut / "model.onnx").exists() and (cut / "checkpoint" / "finetune" / "training.pt").exists()
    code, _, stderr = rankc(arguments("svd", cut, *options, "--resume"))
    assert code == 0 and "finetune 4/6" in stderr and "finetune 3/6" not in stderr
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    curves = [
        [(r["phase"], r["epoch"], r["loss"]) for r in csv.DictReader((f / "log.csv").open())] for f in (whole, cut)
    ]
    assert len(curves[0]) == 8 and curves[0] == curves[1]
    assert report_of(cut)["phases"][1]["entered"] == report_of(whole)["phases"][1]["entered"]


@pytest.mark.slow
def test_two_processes_share_a_run(arguments: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tool = [str(ROOT / "tools" / "train.py"), *arguments("elrt", out, "--macs", "60%", "--json", "-")[1:]]
    done = subprocess.run(
        [*launch, *tool], capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one process speaks
    assert report["hardware"]["processes"] == 2 and report == report_of(out)
    assert done.stderr.count("train 2/2: loss") == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--macs", "1%"], 2, "no rank meets"),
        (["--macs", "50%", "--lr", "0"], 2, "lr is 0.0"),
        (["--macs", "50%", "--include", "nothing*"], 2, "no layer that could be factorized matches 'nothing*'"),
        (["--macs", "50%", "--layout", "spatial"], 2, "--layout goes with --method svd"),
        ([], 2, "--method elrt needs --macs or --ranks, one of them"),
        (["--macs", "50%", "--train", "nowhere.npz"], 4, "nowhere.npz: no such file or folder"),
        (["--macs", "50%", "--network", "{net}:wrong"], 4, "net.py:wrong: returned a int, expected a torch.nn.Module"),
        (["--macs", "50%", "--network", "{net}:broken"], 4, "net.py:broken: raised RuntimeError: no such luck"),
        (["--macs", "50%", "--network", "alexnet"], 2, "give one of resnet20, resnet56, vgg16"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: Arguments, rankc: Rankc, script: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    given = [option.format(net=script) for option in options]
    found, stdout, stderr = rankc([*arguments("elrt", tmp_path / "out"), *given])
    lines = [line for line in stderr.splitlines() if not line.startswith("done")]
    assert (found, stdout) == (code, ""), lines
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_force_replaces_a_run_and_nothing_else(arguments: Arguments, rankc: Rankc, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    code, _, stderr = rankc(arguments("dense", out, "--force"))
    assert code == 2 and "holds 'thesis.tex', which is of no training run" in stderr
    assert (out / "thesis.tex").exists()
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    (out / "config.json").write_text("{}")
    (out / "model.pt").write_text("of an earlier run")
    (out / "checkpoint" / "train").mkdir(parents=True)
    (out / "checkpoint" / "train" / "training.pt").write_text("of an earlier run")
    assert rankc(arguments("dense", out, "--force", "-q")) == (0, "", "")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "log.csv", "model.onnx", "model.pt", "train.json"]
    assert json.loads((out / "config.json").read_text()) == report_of(out)["recipe"]
    assert torch.load(out / "model.pt", weights_only=True)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--network", "alexnet"], 2),
        (["--train", "nowhere.npz"], 4),
        (["--eval", "nowhere.npz"], 4),
        (["--macs", "1%"], 2),
        (["--held-out", "0.999"], 4),  # the Trainer's own check: no sample is left
    ],
)
def test_force_touches_nothing_until_the_new_run_trains(
    arguments: Arguments, rankc: Rankc, tmp_path: Path, options: list[str], code: int
) -> None:
    out = tmp_path / "out"
    old = ("config.json", "log.csv", "model.onnx", "model.pt", "train.json", "checkpoint/train/training.pt")
    (out / "checkpoint" / "train").mkdir(parents=True)
    for name in old:
        (out / name).write_text(f"{name} of an earlier run")
    found, _, stderr = rankc(arguments("elrt", out, "--macs", "60%", "--force", *options))
    assert found == code, stderr
    left = {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert left == {name: f"{name} of an earlier run" for name in old}
