"""Every way in which exporters write a weight down, and every reason why one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from passes.core.reference import relative_l2
from passes.onnx_graph import OnnxGraph
from tests.passes.onnx.exact import model_of, outer, run

RNG = np.random.default_rng(7)
W = RNG.standard_normal((6, 4)).astype(np.float32)
"""(O, I)."""
X = RNG.standard_normal((3, 4)).astype(np.float32)
Spelling = tuple[list[NodeProto], dict[str, NDArray[Any]]]


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs, [output], f"make_{output}", **attributes)


def ints(*values: int) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


SPELLINGS: dict[str, Callable[[], Spelling]] = {  # each yields "w" of shape (I, O)
    "initializer": lambda: ([], {"w": W.T.copy()}),
    "Constant": lambda: ([node("Constant", [], "w", value=numpy_helper.from_array(W.T.copy()))], {}),
    "Transpose": lambda: ([node("Transpose", ["v"], "w", perm=[1, 0])], {"v": W}),
    "Transpose without perm": lambda: ([node("Transpose", ["v"], "w")], {"v": W}),
    "Identity": lambda: ([node("Identity", ["v"], "w")], {"v": W.T.copy()}),
    "Cast": lambda: ([node("Cast", ["v"], "w", to=TensorProto.FLOAT)], {"v": W.T.astype(np.float16)}),
    "Cast of integers": lambda: ([node("Cast", ["v"], "w", to=1)], {"v": (W.T * 50).astype(np.int8)}),
    "Reshape": lambda: ([node("Reshape", ["v", "s"], "w")], {"v": W.T.ravel(), "s": ints(4, -1)}),
    "Reshape keeping": lambda: ([node("Reshape", ["v", "s"], "w")], {"v": W.T[:, None], "s": ints(0, 6)}),
    "Squeeze": lambda: ([node("Squeeze", ["v", "a"], "w")], {"v": W.T[None], "a": ints(0)}),
    "Unsqueeze": lambda: (
        [node("Unsqueeze", ["v", "a"], "u"), node("Squeeze", ["u"], "w")],
        {"v": W.T.copy(), "a": ints(0, 3)},
    ),
    "Flatten": lambda: ([node("Flatten", ["v"], "w", axis=1)], {"v": W.T.reshape(4, 2, 3)}),
    "several": lambda: (
        [
            node("Constant", [], "c", value=numpy_helper.from_array(W.astype(np.float64)[None])),
            node("Identity", ["c"], "i"),
            node("Cast", ["i"], "f", to=TensorProto.FLOAT),
            node("Squeeze", ["f", "a"], "q"),
            node("Transpose", ["q"], "w", perm=[1, 0]),
        ],
        {"a": ints(0)},
    ),
}


def linear(spelling: Spelling, op: str = "MatMul") -> onnx.ModelProto:
    nodes, weights = spelling
    layer = helper.make_node(op, ["x", "w"], ["y"], "fc")
    return model_of([*nodes, layer], {"x": ["N", 4]}, {"y": ["N", 6]}, weights)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_weight_is_read_by_value(name: str, op: str) -> None:
    model = linear(SPELLINGS[name](), op)
    (reference,) = run(model, {"x": X})
    graph = OnnxGraph.from_model(model)
    (site,) = graph.sites().sites
    assert relative_l2(X @ site.stage.weight.T, reference) < 1e-6
    stored = sum(op.weight_bytes for op in graph.workload())
    assert stored > 0
    graph.replace(site, outer(site.stage))
    assert [n.op_type for n in graph.model().graph.node] == [op, op], "what unpacked the weight goes with it"
    assert len(graph.model().graph.initializer) == 2
    assert relative_l2(graph.run({"x": X})[0], reference) < 1e-5


def test_weight_that_is_also_an_input_goes_with_its_declaration() -> None:
    for ir_version in (3, 4, 8):
        model = linear(SPELLINGS["initializer"]())
        model.ir_version = ir_version
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 6]))
        if ir_version == 3:
            model.opset_import[0].version = 8
        graph = OnnxGraph.from_model(model)
        assert [spec.name for spec in graph.inputs] == ["x"]
        (reference,) = run(model, {"x": X})
        (site,) = graph.sites().sites
        graph.replace(site, outer(site.stage))
        after = graph.model()
        onnx.checker.check_model(after, full_check=True)
        declared = [info.name for info in after.graph.input]
        stored = [tensor.name for tensor in after.graph.initializer]
        assert declared == (["x", *stored] if ir_version == 3 else ["x"])
        assert after.graph.input[0] == model.graph.input[0]
        assert relative_l2(run(after, {"x": X})[0], reference) < 1e-5


def test_shared_weights_stay_for_those_who_still_use_them() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "one"), helper.make_node("Relu", ["h"], ["r"], "relu")]
    nodes.append(helper.make_node("MatMul", ["r", "w"], ["y"], "two"))
    square = RNG.standard_normal((4, 4)).astype(np.float32)
    model = model_of(nodes, {"x": [3, 4]}, {"y": [3, 4]}, {"w": square})
    (reference,) = run(model, {"x": X})
    graph = OnnxGraph.from_model(model)
    one, two = graph.sites().sites
    assert one.weight_key == two.weight_key
    ops = {op.name: op.weight_params for op in graph.workload()}
    assert ops == {"one": 16, "relu": 0, "two": 0}, "a shared weight is stored and counted once"
    graph.replace(one, outer(one.stage))
    assert len(graph.model().graph.initializer) == 3
    graph.replace(two, outer(two.stage))
    assert len(graph.model().graph.initializer) == 2, "equal factors are stored once, the original is gone"
    assert relative_l2(graph.run({"x": X})[0], reference) < 1e-5


def test_sites_that_unpack_one_weight_differently_have_different_keys() -> None:
    square = RNG.standard_normal((4, 4)).astype(np.float32)
    nodes = [
        node("Transpose", ["w"], "t"),
        helper.make_node("MatMul", ["x", "w"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "t"], ["y"], "two"),
    ]
    one, two = OnnxGraph.from_model(model_of(nodes, {"x": [3, 4]}, {"y": [3, 4]}, {"w": square})).sites().sites
    assert one.weight_key != two.weight_key
    np.testing.assert_array_equal(one.stage.weight, two.stage.weight.T)


def kept(model: onnx.ModelProto) -> dict[str, str]:
    scan = OnnxGraph.from_model(model).sites()
    return {note.node: note.reason for note in scan.kept}


def conv(attributes: dict[str, Any], shape: list[Any], weights: dict[str, Any], op: str = "Conv") -> onnx.ModelProto:
    layer = helper.make_node(op, ["x", *weights], ["y"], "conv", **attributes)
    return model_of([layer], {"x": shape}, {"y": [None] * len(shape)}, weights)


def test_refusals_name_the_reason() -> None:
    batch = RNG.standard_normal((2, 4, 6)).astype(np.float32)
    two_inputs = model_of(
        [helper.make_node("MatMul", ["x", "z"], ["y"], "mm")], {"x": [3, 4], "z": [4, 6]}, {"y": [3, 6]}, {}
    )
    assert kept(two_inputs) == {"mm": "both operands are computed"}
    assert kept(linear(([], {"w": batch}))) == {"fc": "its constant of shape (2, 4, 6) is a batch of matrices"}
    assert kept(linear(([], {"w": W.T[:, 0].copy()}))) == {"fc": "its constant is a vector"}
    computed = linear(([node("Relu", ["v"], "w")], {"v": W.T.copy()}))
    assert kept(computed) == {"fc": "both operands are computed"}
    kernel = {"w": RNG.standard_normal((2, 3, 3, 3)).astype(np.float32)}
    moving = conv({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, [1, 3, "h", "w"], kernel)
    assert kept(moving) == {"conv": "its padding (SAME_UPPER) depends on an input size that varies"}
    assert kept(conv({"auto_pad": "SAME_UPPER"}, [1, 3, "h", "w"], kernel)) == {}
    shaped = {"w": RNG.standard_normal((3, 2, 3)).astype(np.float32)}
    varying = conv({"output_shape": [20], "strides": [2]}, [1, 3, "t"], shaped, "ConvTranspose")
    assert kept(varying) == {"conv": "its padding follows from output_shape and an input size that varies"}
    rows = model_of(
        [helper.make_node("Gemm", ["x", "w", "c"], ["y"], "fc")],
        {"x": [3, 4]},
        {"y": [3, 6]},
        {"w": W.T.copy(), "c": np.ones((3, 1), np.float32)},
    )
    assert kept(rows) == {"fc": "its C of shape (3, 1) is not one number per output channel"}


def test_types_without_arithmetic_pass_through_untouched() -> None:
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [4, 6], W.T.ravel().tolist())
    int4 = helper.make_tensor("q", TensorProto.INT4, [3], [1, -2, 7])
    text = helper.make_tensor("s", TensorProto.STRING, [1], [b"\xffbinary"])
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], "narrow", to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["b", "w"], ["y"], "fc"),
        helper.make_node("Identity", ["q"], ["p"], "int4"),
        helper.make_node("Identity", ["s"], ["t"], "text"),
    ]
    model = model_of(nodes, {"x": [3, 4]}, {}, {}, opset=21, ir_version=10)
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [3, 6]))
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.INT4, [3]))
    model.graph.output.append(helper.make_tensor_value_info("t", TensorProto.STRING, [1]))
    model.graph.initializer.extend([weight, int4, text])
    graph = OnnxGraph.from_model(model)
    assert [(n.node, n.reason) for n in graph.sites().kept] == [("fc", "its weight is stored as bfloat16")]
    assert graph.model() == model
    assert graph.clone().model() == model


def test_quantized_layers_are_kept_with_the_reason() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "dequantize"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
    ]
    stored = {"q": (W.T * 50).astype(np.int8), "s": np.asarray(0.02, np.float32)}
    model = model_of(nodes, {"x": [3, 4]}, {"y": [3, 6]}, stored)
    assert kept(model) == {"fc": "its weight is quantized: it stands behind DequantizeLinear"}
    (op,) = OnnxGraph.from_model(model).workload()
    assert (op.name, op.weight_params, op.weight_bytes) == ("fc", 25, 28)
    assert op.stage is not None
    assert op.stage.macs == 3 * 4 * 6


def test_sparse_weights_are_kept() -> None:
    dense = linear(([], {}))
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [0, 5])
    dense.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 6]))
    graph = OnnxGraph.from_model(dense)
    assert [note.reason for note in graph.sites().kept] == ["its weight is stored sparse"]
    assert graph.model() == dense


def test_every_kin_operator_is_accounted_for() -> None:
    weights = {"w": RNG.integers(-9, 9, (4, 6)).astype(np.int8), "z": np.asarray(0, np.int8)}
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], "cast", to=TensorProto.INT8),
        helper.make_node("MatMulInteger", ["i", "w", "z"], ["y32"], "integer"),
        helper.make_node("Cast", ["y32"], ["y"], "back", to=TensorProto.FLOAT),
        helper.make_node("Einsum", ["y", "y"], ["e"], "einsum", equation="ij,kj->ik"),
    ]
    model = model_of(nodes, {"x": [3, 4]}, {"e": [3, 3]}, weights)
    assert kept(model) == {"integer": "its weight is quantized", "einsum": "an Einsum is not rewritten"}
