"""What runs come to: the dense recipe against the trainer itself, low-rank training against dense on real digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from codegen.events import QuietEvents
from codegen.train.config import TrainConfig
from codegen.train.network import data_specs, load
from codegen.train.run import train
from passes.errors import UsageError
from passes.training.data import TrainingSet
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
