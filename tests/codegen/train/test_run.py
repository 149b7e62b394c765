"""What runs come to: the dense recipe against the trainer itself, low-rank training against dense on real digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from codegen.events import QuietEvents
from codegen.train.config import TrainConfig
from codegen.train.export import run
from codegen.train.methods import METHODS, Work
from codegen.train.network import data_specs, load
from codegen.train.run import train
from passes.errors import UsageError
from passes.training.data import TrainingSet
from passes.training.factored import scan, selected
from passes.training.objective import CrossEntropy
from passes.training.options import TrainingOptions
from passes.training.svd_training import SvdOptions
from passes.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[3]
DIGITS = str(ROOT / "examples" / "digits_data.py")

OPTIONS = TrainingOptions(epochs=2, batch=32, held_out=0.2, augment="crop_flip", precision="fp32", seed=3)


def test_the_dense_method_is_the_trainer_on_the_seeded_network(script: Path, data: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    try:
        from net import network  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    torch.manual_seed(3)
    module: nn.Module = network()
    arrays = np.load(data)
    Trainer(module, CrossEntropy(), TrainingSet.of({"image": arrays["image"]}, arrays["labels"]), OPTIONS).run()
    out = tmp_path / "out"
    train(TrainConfig("dense", f"{script}:network", str(data), out, options=OPTIONS, device="cpu"), QuietEvents())
    found = torch.load(out / "model.pt", weights_only=True)
    wanted = module.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_built_in_network_starts_from_the_seed(tmp_path: Path) -> None:
    from codegen.reproduce.networks import resnet20

    data = tmp_path / "images.npy"
    np.save(data, np.zeros((2, 3, 32, 32), np.float32))
    torch.manual_seed(7)
    wanted = resnet20().state_dict()
    source = load("resnet20", str(data), (), (), seed=7)
    assert all(torch.equal(value, wanted[name]) for name, value in source.module.state_dict().items())
    assert [(s.name, s.shape) for s in source.inputs] == [("input", ("batch", 3, 32, 32))]
    assert source.outputs == ("logits",)


def test_inputs_are_called_what_the_data_calls_them(data: Path, script: Path, tmp_path: Path) -> None:
    assert [s.name for s in data_specs(str(data), ())] == ["image"]
    two = tmp_path / "two.npz"
    np.savez(two, a=np.zeros((2, 3), np.float64), b=np.zeros((2, 4), np.int64), labels=np.zeros(2, np.int64))
    assert [(s.name, s.dtype, s.shape) for s in data_specs(str(two), ("b", "a"))] == [
        ("b", "int64", ("batch", 4)),
        ("a", "float32", ("batch", 3)),
    ]
    with pytest.raises(UsageError, match="the data has the inputs a, b; give --input in the order of the forward"):
        data_specs(str(two), ())
    with pytest.raises(UsageError, match="2 names for 1 outputs"):
        load(f"{script}:network", str(data), (), ("a", "b"), 0)


def test_a_network_from_onnx_keeps_its_names_and_a_plan_gives_the_ranks(
    script: Path, data: Path, tmp_path: Path
) -> None:
    first = TrainConfig("dense", f"{script}:network", str(data), tmp_path / "dense", options=OPTIONS, device="cpu")
    train(first, QuietEvents())
    path = tmp_path / "dense" / "model.onnx"
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.save(model, path)
    plan = tmp_path / "plan.json"
    layers = [{"name": "3", "choice": "tucker2", "rank": [5, 6]}, {"name": "6", "choice": "dense", "rank": []}]
    plan.write_text(json.dumps({"layers": [*layers, {"name": "0", "choice": "dense", "rank": []}]}))
    config = TrainConfig("elrt", str(path), str(data), tmp_path / "low", ranks=plan, options=OPTIONS, device="cpu")
    report = train(config, QuietEvents())
    assert report is not None
    assert {r["name"]: (r["choice"], r["rank"]) for r in report["layers"] if r["rank"]} == {"3": ("tucker2", [5, 6])}
    assert report["result"]["macs"] - report["baseline"]["macs"] == 64 * 12 * 5 + 16 * (
        5 * 6 * 9 + 6 * 16 - 12 * 16 * 9
    )
    low = onnx.load(tmp_path / "low" / "model.onnx")
    for one, two in zip((*model.graph.input, *model.graph.output), (*low.graph.input, *low.graph.output), strict=True):
        assert one == two


def fixed_batch(path: Path, size: int) -> None:
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(model, path)


def test_a_network_of_one_sample_a_run_is_trained_verified_and_scored(script: Path, data: Path, tmp_path: Path) -> None:
    first = TrainConfig("dense", f"{script}:network", str(data), tmp_path / "dense", options=OPTIONS, device="cpu")
    train(first, QuietEvents())
    path = tmp_path / "dense" / "model.onnx"
    fixed_batch(path, 1)
    out = tmp_path / "low"
    config = TrainConfig("elrt", str(path), str(data), out, eval=str(data), macs="60%", options=OPTIONS, device="cpu")
    report = train(config, QuietEvents())
    assert report is not None and report["verification"]["samples"] == 64
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert session.get_inputs()[0].shape[0] == 1
    arrays = np.load(data)
    scores = np.concatenate([session.run(None, {"image": image[None]})[0] for image in arrays["image"]])
    assert report["result"]["accuracy"] == np.mean(scores.argmax(1) == arrays["labels"])


def test_a_file_of_any_fixed_batch_gives_a_row_a_sample(script: Path, data: Path, tmp_path: Path) -> None:
    config = TrainConfig("dense", f"{script}:network", str(data), tmp_path / "out", options=OPTIONS, device="cpu")
    train(config, QuietEvents())
    path = tmp_path / "out" / "model.onnx"
    images = np.load(data)["image"]
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"image": images[:50]})[0]
    fixed_batch(path, 16)  # 50 are three batches and two samples
    found = np.concatenate(list(run(path, TrainingSet.of({"image": images}), 50)))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_plan_of_another_network_is_refused_and_dropped_layers_are_told(
    script: Path, data: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"

    def trained(name: str, *layers: dict[str, Any], **more: Any) -> dict[str, Any] | None:
        plan.write_text(json.dumps({"layers": layers}))
        network = f"{script}:network"
        return train(
            TrainConfig("elrt", network, str(data), tmp_path / name, ranks=plan, options=OPTIONS, device="cpu", **more),
            QuietEvents(),
        )

    foreign = {"name": "/layer1/layer1.0/conv1/Conv", "choice": "tucker2", "rank": [5, 6]}
    with pytest.raises(UsageError, match=r"names none of the layers to factorize \(3, 6\); it names /layer1/.*/Conv"):
        trained("foreign", foreign)
    last = {"name": "9", "choice": "dense", "rank": []}
    report = trained("partly", {"name": "3", "choice": "tucker2", "rank": [5, 6]}, foreign, last)
    assert report is not None
    (warning,) = report["warnings"]
    assert warning.endswith("not low-rank here: /layer1/layer1.0/conv1/Conv")
    rows = {row["name"]: (row["choice"], row["reason"]) for row in report["layers"]}
    assert rows["3"] == ("tucker2", "") and rows["6"] == ("dense", "kept: not in the plan")
    report = trained(
        "dense", {"name": "3", "choice": "tucker2", "rank": [5, 6]}, {"name": "6", "choice": "dense", "rank": []}
    )
    assert report is not None and report["warnings"] == []
    assert {row["name"]: row["reason"] for row in report["layers"]}["6"] == "kept: dense in the plan"


def test_pruning_takes_statistics_of_the_samples_that_are_trained_with(
    script: Path, data: Path, tmp_path: Path
) -> None:
    source = load(f"{script}:network", str(data), (), (), seed=3)
    layers = scan(source.module, source.example())
    sites, notes = selected(layers, (), ())
    config = TrainConfig("svd", f"{script}:network", str(data), tmp_path / "out", macs="60%", options=OPTIONS)
    arrays = np.load(data)
    whole = TrainingSet.of({"image": arrays["image"]}, arrays["labels"])
    phases = METHODS["svd"]().phases(Work(config, source, layers, sites, whole, notes))
    phases[1].enter()
    norm, conv = source.module.get_submodule("1"), source.module.get_submodule("0")
    kept = whole.split(OPTIONS.held_out, OPTIONS.seed)[0].inputs["image"]
    assert len(kept) == 128 and isinstance(norm, nn.BatchNorm2d)

    def mean(images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = conv(images).double().mean((0, 2, 3))
        return found

    with torch.no_grad():
        torch.testing.assert_close(norm.running_mean, mean(kept).float(), rtol=0, atol=1e-6)
        assert (mean(kept) - mean(whole.inputs["image"])).abs().max() > 1e-4  # which held-out samples would shift


def digits(tmp_path: Path, script: Path, method: str, **more: Any) -> dict[str, Any]:
    pytest.importorskip("sklearn")
    options = TrainingOptions(epochs=8, batch=64, precision="fp32", held_out=0.1)
    config = TrainConfig(
        method,
        f"{script}:digits",
        f"{DIGITS}:train",
        tmp_path / method,
        eval=f"{DIGITS}:evaluation",
        options=more.pop("options", options),
        device="cpu",
        **more,
    )
    report = train(config, QuietEvents())
    assert report is not None
    return report


@pytest.mark.slow
def test_half_the_multiply_adds_cost_a_few_points_on_digits(tmp_path: Path, script: Path) -> None:
    script.write_text(
        script.read_text()
        + """
def digits():
    def block(i, o, stride):
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    parts = [*block(1, 16, 2), *block(16, 32, 1), *block(32, 32, 1), *block(32, 32, 2), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32, 10))
"""
    )
    dense = digits(tmp_path, script, "dense")
    elrt = digits(tmp_path, script, "elrt", macs="50%")
    short = TrainingOptions(epochs=5, batch=64, precision="fp32", held_out=0.1)
    svd = digits(tmp_path, script, "svd", macs="50%", options=short, finetune_epochs=3, svd=SvdOptions())
    assert dense["result"]["accuracy"] > 0.9
    for low in (elrt, svd):
        assert low["result"]["macs"] <= 0.5 * dense["result"]["macs"]
        assert low["result"]["accuracy"] > dense["result"]["accuracy"] - 0.05
