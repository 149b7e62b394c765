from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from codegen.tvm_network_rewrites import rewritten


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, ...]], outputs: list[str], opset: int = 17, **constants
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def results(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def check(model: onnx.ModelProto, lacking: set[str], **feeds: np.ndarray) -> onnx.ModelProto:
    """Rewrites ``model`` for an importer without ``lacking`` and compares both in onnxruntime."""
    known = {schema.name for schema in onnx.defs.get_all_schemas()} - lacking
    want = results(model, feeds)
    new = rewritten(model, known)
    assert not lacking & {node.op_type for node in new.graph.node}
    assert {node.domain for node in new.graph.node} == {""} and not new.functions
    for have, reference in zip(results(new, feeds), want, strict=True):
        np.testing.assert_allclose(have, reference, rtol=0, atol=2e-6)
    return new


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("stateful", [False, True])
def test_recurrent_layers_are_unrolled(op: str, direction: str, stateful: bool) -> None:
    rng = np.random.default_rng(7)
    steps, batch, width, hidden = 5, 2, 3, 4
    gates, ways = {"LSTM": 4, "GRU": 3}[op], 2 if direction == "bidirectional" else 1
    constants = {
        "w": rng.standard_normal((ways, gates * hidden, width)).astype(np.float32),
        "r": rng.standard_normal((ways, gates * hidden, hidden)).astype(np.float32),
    }
    inputs, names = {"x": (steps, batch, width)}, ["x", "w", "r"]
    if stateful:
        constants["b"] = rng.standard_normal((ways, 2 * gates * hidden)).astype(np.float32)
        inputs |= dict.fromkeys(["h", "c"] if op == "LSTM" else ["h"], (ways, batch, hidden))
        names += ["b", "", *[name for name in inputs if name != "x"]]
    outputs = ["y", "yh", "yc"] if op == "LSTM" else ["y", "yh"]
    more = {"linear_before_reset": 1} if op == "GRU" and stateful else {}
    node = helper.make_node(op, names, outputs, "layer", hidden_size=hidden, direction=direction, **more)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in inputs.items()}
    check(model_of([node], inputs, outputs, **constants), {op}, **feeds)


def test_recurrent_layers_that_are_none_of_those_stay() -> None:
    weights = {"w": np.ones((1, 8, 3), np.float32), "r": np.ones((1, 8, 2), np.float32)}
    for attributes, steps in [({"clip": 1.0}, 5), ({"activations": ["Relu", "Tanh", "Tanh"]}, 5), ({}, 65)]:
        node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=2, **attributes)
        model = rewritten(model_of([node], {"x": (steps, 1, 3)}, ["y"], **weights), {"Conv"})
        assert [node.op_type for node in model.graph.node] == ["LSTM"]


def test_integer_layers_are_computed_between_quantizations() -> None:
    rng = np.random.default_rng(0)
    x_scale, y_scale = np.float32(0.02), np.float32(0.05)
    constants = {
        "xs": x_scale, "xz": np.uint8(120), "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "ws": rng.uniform(0.005, 0.02, 4).astype(np.float32), "wz": np.zeros(4, np.int8),
        "ys": y_scale, "yz": np.uint8(100), "b": rng.integers(-900, 900, 4).astype(np.int32),
        "m": rng.integers(-127, 128, (6, 5)).astype(np.int8), "ms": np.float32(0.01), "mz": np.int8(3),
    }  # fmt: skip
    constants = {name: np.asarray(value) for name, value in constants.items()}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QLinearMatMul", ["c", "ys", "yz", "m", "ms", "mz", "ys", "yz"], ["d"]),
        helper.make_node("DequantizeLinear", ["d", "ys", "yz"], ["y"]),
    ]
    model = model_of(nodes, {"x": (1, 3, 6, 6)}, ["y"], **constants)
    feeds = {"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)}
    (want,) = results(model, feeds)
    known = {schema.name for schema in onnx.defs.get_all_schemas()} - {"QLinearConv", "QLinearMatMul"}
    (have,) = results(rewritten(model, known), feeds)
    # a sum that lies on a rounding step may fall to either side: one step in a few values
    assert np.abs(have - want).max() <= y_scale * 1.001
    assert np.mean(have != want) < 0.05


def test_operators_with_a_body_and_functions_of_the_model_are_put_in_place(tmp_path: Path) -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)}
    nodes = [
        helper.make_node("Celu", ["x"], ["a"], alpha=0.7),
        helper.make_node("HardSwish", ["a"], ["b"]),
        helper.make_node("LpNormalization", ["b"], ["y"], axis=1, p=1),
        helper.make_node("LpNormalization", ["b"], ["z"], axis=0),
    ]
    check(model_of(nodes, {"x": (2, 5)}, ["y", "z"]), {"Celu", "HardSwish", "LpNormalization"}, **feeds)
    model = model_of([helper.make_node("Twice", ["x"], ["y"], domain="own")], {"x": (2, 5)}, ["y"])
    model.functions.append(
        helper.make_function(
            "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
        )
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    assert [node.op_type for node in check(model, {"Twice"}, **feeds).graph.node] == ["Add"]


def test_what_has_no_other_form_stays() -> None:
    model = rewritten(model_of([helper.make_node("Det", ["x"], ["y"])], {"x": (3, 3)}, ["y"]), {"Conv"})
    assert [node.op_type for node in model.graph.node] == ["Det"]
