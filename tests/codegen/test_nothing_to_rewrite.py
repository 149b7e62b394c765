"""Networks with no layer to rewrite, and layers that calibration data do not reach: a clean result that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from codegen import driver
from codegen.config import LowerConfig
from codegen.emission import Emission
from codegen.events import QuietEvents
from codegen.result import LowerResult
from codegen.results import IN_BODY, NO_GAIN
from codegen.target import Target, parse_target


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(text: str) -> Target:
        return replace(parse_target(text), emit=lambda *_: Emission({"binary": None}))

    monkeypatch.setattr(driver, "parse_target", target)


def saved(
    folder: Path, nodes: Sequence[NodeProto], shape: Sequence[int | str], weights: dict[str, NDArray[Any]]
) -> Path:
    """A network from x to y, both of ``shape`` or nearly so, and calibration data beside it."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], stored)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    sizes = [n for n in shape if isinstance(n, int)]
    data = np.random.default_rng(0).standard_normal((24, *sizes)).astype(np.float32)
    np.savez(folder / "calib.npz", x=data)
    return folder / "model.onnx"


def lowered(model: Path, **options: Any) -> LowerResult:
    values = {"model": model, "output": model.parent / "out", **options}
    return driver.lower(LowerConfig.from_values(values), QuietEvents())


NODES = {
    "no layer": [helper.make_node("Relu", ["x"], ["y"])],
    "no constant": [helper.make_node("MatMul", ["x", "x"], ["y"], "mm")],
    "nothing to gain": [helper.make_node("Conv", ["x", "w"], ["y"], "dw", group=4)],
}
REASONS = {"no layer": [], "no constant": ["both operands are computed"], "nothing to gain": [NO_GAIN]}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("what", NODES)
def test_the_network_comes_back_as_it_was(what: str, calibrated: bool, tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 1, 1, 1), np.float32)} if what == "nothing to gain" else {}
    model = saved(tmp_path, NODES[what], ["N", 4, 6, 6], weights)
    calib = {"calib": str(tmp_path / "calib.npz")} if calibrated else {}
    result = lowered(model, **calib)
    assert not result.missed
    assert [layer["choice"] for layer in result.report["layers"]] == ["dense"] * len(REASONS[what])
    assert [layer["reason"] for layer in result.report["layers"]] == REASONS[what]
    assert result.report["result"]["latency"] == result.report["baseline"]["latency"]
    x = np.ones((1, 4, 6, 6), np.float32)
    outputs = [
        onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (model, tmp_path / "out/model.onnx")
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("what", NODES)
def test_a_budget_is_missed_with_the_whole_network_as_its_bound(what: str, tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 1, 1, 1), np.float32)} if what == "nothing to gain" else {}
    result = lowered(saved(tmp_path, NODES[what], ["N", 4, 6, 6], weights), budgets={"latency": "60%"})
    (budget,) = result.report["budgets"]
    assert result.missed and not budget["met"]
    assert budget["bound"] == budget["value"] == result.report["baseline"]["latency"]["value"]


def test_a_glob_that_matches_no_layer_is_warned_of(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 4, 1, 1), np.float32)}
    model = saved(tmp_path, [helper.make_node("Conv", ["x", "w"], ["y"], "conv")], ["N", 4, 6, 6], weights)
    result = lowered(model, include=("cnov*",))
    assert any("no layer that could be rewritten is named by --include cnov*" in w for w in result.report["warnings"])
    assert [layer["reason"] for layer in result.report["layers"]] == ["not named by --include"]


def test_layers_in_bodies_say_that_the_data_did_not_reach_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((96, 8)) @ rng.standard_normal((8, 96)) / 30
    weights = {"w": factors.astype(np.float32), "yes": np.array(True)}
    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [32, 96])
    bodies = [
        helper.make_graph([helper.make_node(op, inputs, ["inner"], name)], f"{name}_body", [], [out])
        for op, inputs, name in (("MatMul", ["x", "w"], "then"), ("Identity", ["x"], "else"))
    ]
    nodes = [helper.make_node("If", ["yes"], ["y"], "choice", then_branch=bodies[0], else_branch=bodies[1])]
    model = saved(tmp_path, nodes, [32, 96], weights)
    result = lowered(model, calib=str(tmp_path / "calib.npz"), budgets={"params": "50%"})
    (layer,) = [row for row in result.report["layers"] if row["op"] == "MatMul"]
    assert layer["choice"] == "svd"
    assert layer["reason"].endswith(IN_BODY)
