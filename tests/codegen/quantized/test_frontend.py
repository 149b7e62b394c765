"""How whole networks are read: what is fused, what goes to the host and why, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QHost, QTable
from codegen.quantized.reference import dequantized_outputs, quantized_inputs, run_quantized
from passes.errors import InputError, UnsupportedError, UsageError
from tests.codegen.quantized.qdq_models import QdqModel, differences, kinds, ort, ours
from tests.onnx_models import normal, onnx_model


def host(graph: object) -> list[QHost]:
    return [operation for operation in graph.operations if isinstance(operation, QHost)]  # type: ignore[attr-defined]


def test_a_quantized_gate_becomes_one_table() -> None:
    m = QdqModel(3)
    x = m.input("x", 1, 300)
    m.output(m.node("Mul", x, m.requantize(m.node("Sigmoid", x))))
    graph = read_qdq(m.build())
    assert kinds(graph) == ["QTable"]
    assert graph.operations[0].op == "Sigmoid+Mul"


def test_a_gate_that_is_read_elsewhere_stays() -> None:
    m = QdqModel(3)
    x = m.input("x", 1, 300)
    gate = m.requantize(m.node("Sigmoid", x))
    m.output(m.node("Mul", x, gate))
    m.output(m.node("Add", gate, m.input("z", 1, 300)))
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    assert sorted(kinds(graph)) == ["QProduct", "QSum", "QTable"]
    assert differences(found, ort(model, feeds))[0] == 0


def test_moves_need_no_requantizing_and_take_the_names_of_the_network() -> None:
    m = QdqModel(4)
    x = m.input("x", 1, 4, 6, scale=0.5, zero=3)
    y = m.node("Transpose", x, perm=[0, 2, 1])
    name = m.output(y, 0.5, 3)
    graph = read_qdq(m.build())
    assert kinds(graph) == ["QMove"]
    assert graph.outputs == (name,)
    assert graph.tensors[name].shape == (1, 6, 4)


def test_floats_at_the_border_are_the_hosts() -> None:
    m = QdqModel(5)
    w = m.weight("w", (6, 5), 0, 6)
    parameters = m.scaling("x")
    m.nodes.insert(0, helper.make_node("QuantizeLinear", ["x", *parameters], ["x.q"]))
    m.nodes.insert(1, helper.make_node("DequantizeLinear", ["x.q", *parameters], ["x.d"]))
    y = m.requantize(m.node("Gemm", "x.d", w, transB=1))
    m.nodes[-1].output[0] = "y"
    m.float_output("y")
    model = m.build()
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5]))
    graph = read_qdq(model)
    assert y and kinds(graph) == ["QConv"]
    assert (graph.inputs, graph.input_names, graph.float_inputs) == (("x.q",), ("x",), (True,))
    assert (graph.output_names, graph.float_outputs) == (("y",), (True,))
    feeds = {"x": normal(7, 5)}
    found = dequantized_outputs(graph, run_quantized(graph, quantized_inputs(graph, feeds)))
    assert np.array_equal(found["y"], ort(model, feeds)["y"])


def test_connected_floats_are_one_host_operation() -> None:
    m = QdqModel(6)
    x = m.input("x", 1, 8)
    soft = m.node("Softmax", x, axis=-1)
    m.output(m.node("Mul", soft, x))
    m.output(soft)
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    (only,) = host(graph)
    assert only.inputs == ("x.q",)
    assert len(only.outputs) == 2
    assert only.reason == "Softmax is no operation on bytes"
    assert differences(found, ort(model, feeds))[0] == 0


def test_host_operations_do_not_wait_for_each_other_in_a_circle() -> None:
    """softmax -> integers -> a node that also reads the softmax: one part would have to wait for itself."""
    m = QdqModel(7)
    x, w = m.input("x", 1, 8), m.weight("w", (8, 8), 0, 8)
    soft = m.node("Softmax", x, axis=-1)
    layer = m.requantize(m.node("Gemm", m.requantize(soft), w, transB=1))
    m.output(m.node("Div", layer, m.node("Exp", soft)))
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    assert kinds(graph) == ["QHost", "QConv", "QHost"]
    assert differences(found, ort(model, feeds))[1] <= 1


def test_an_output_in_floats_is_a_tensor_of_the_host() -> None:
    m = QdqModel(8)
    m.float_output(m.node("Softmax", m.input("x", 1, 8), axis=-1))
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    name = graph.outputs[0]
    assert graph.float_outputs == (False,)
    assert graph.host_tensors[name].dtype == "float32"
    assert np.allclose(found[name], ort(model, feeds)[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("operator", "shape", "given", "reason"),
    [
        ("LpNormalization", (1, 8), {}, "LpNormalization is no operation on bytes"),
        ("ReduceMean", (1, 8, 4), {"axes": [1]}, "reduces the axes [1] of 3"),
        ("Cast", (1, 8), {"to": TensorProto.DOUBLE}, "Cast converts to another type"),
    ],
)
def test_reasons_name_the_node(operator: str, shape: tuple[int, ...], given: dict[str, object], reason: str) -> None:
    m = QdqModel(9)
    y = m.node(operator, m.input("x", *shape), **given)
    y = m.node("Cast", y, to=TensorProto.FLOAT) if operator == "Cast" else y
    m.output(y)
    (only,) = host(read_qdq(m.build()))
    assert reason in only.reason


def test_weights_in_floats_are_the_hosts() -> None:
    m = QdqModel(10)
    m.output(m.node("Conv", m.input("x", 1, 3, 5, 5), m.constant("w", normal(4, 3, 3, 3))))
    (only,) = host(read_qdq(m.build()))
    assert only.reason == "Conv has weights in floats: they were not quantized"
    # The host's part stands alone and is valid.
    onnx.checker.check_model(onnx.load_from_string(only.model), full_check=True)


def test_shape_arithmetic_is_folded() -> None:
    m = QdqModel(11)
    x = m.input("x", 2, 3, 4)
    lead = m.node("Gather", m.node("Shape", x), m.constant("zero", np.array(0)), axis=0)
    lead = m.node("Unsqueeze", lead, m.constant("axes", np.array([0])))
    target = m.node("Concat", lead, m.constant("rest", np.array([-1])), axis=0)
    m.output(m.node("Reshape", x, target), 0.1, 0)
    graph = read_qdq(m.build())
    assert "QHost" not in kinds(graph)
    assert graph.tensors[graph.outputs[0]].shape == (2, 12)


def test_weights_that_are_quantized_in_the_network_are_folded() -> None:
    m = QdqModel(12)
    x = m.input("x", 1, 6)
    m.constants["w.s"], m.constants["w.z"] = np.full(4, 0.01, np.float32), np.zeros(4, np.int8)
    m.nodes.append(helper.make_node("QuantizeLinear", [m.constant("w.f", normal(4, 6)), "w.s", "w.z"], ["w.q"], axis=0))
    m.nodes.append(helper.make_node("DequantizeLinear", ["w.q", "w.s", "w.z"], ["w"], axis=0))
    m.output(m.node("Gemm", x, "w", transB=1))
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    assert kinds(graph) == ["QConv"]
    assert differences(found, ort(model, feeds))[0] == 0


def test_unsigned_weights_lose_their_zero_point() -> None:
    m = QdqModel(13, signed=False)
    x = m.input("x", 1, 6)
    m.constants["w.q"] = m.rng.integers(0, 256, (4, 6)).astype(np.uint8)
    m.constants["w.s"], m.constants["w.z"] = np.array(0.01, np.float32), np.array(128, np.uint8)
    m.nodes.append(helper.make_node("DequantizeLinear", ["w.q", "w.s", "w.z"], ["w"]))
    m.output(m.node("Gemm", x, "w", transB=1))
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    assert kinds(graph) == ["QConv"]
    assert differences(found, ort(model, feeds))[0] == 0


def test_bytes_under_two_scales_are_two_tensors() -> None:
    m = QdqModel(14)
    m.input("x", 1, 50, scale=0.5, zero=0)
    m.nodes.append(helper.make_node("DequantizeLinear", ["x.q", *m.scaling("again", 0.25, 7)], ["x2"]))
    m.output(m.node("Add", "x", "x2"))
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    assert any(isinstance(o, QTable) and o.table == bytes(range(256)) for o in graph.operations) or kinds(graph) == [
        "QTable"
    ]
    assert differences(found, ort(model, feeds))[0] == 0


def test_a_network_of_floats_is_refused_with_what_to_do() -> None:
    model = onnx_model("f (float[1,4] x) => (float[1,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)})
    with pytest.raises(UnsupportedError, match=r"network of floats.*quantize it first|Quantize it first"):
        read_qdq(model)


def test_integer_operators_are_refused() -> None:
    m = QdqModel(15)
    m.input("x", 1, 4)
    del m.nodes[:]
    node = helper.make_node("QLinearMatMul", ["x.q", "x.s", "x.z", "w", "x.s", "x.z", "x.s", "x.z"], ["y"], name="n")
    m.nodes.append(node)
    m.constant("w", np.ones((4, 2), np.int8))
    m.outputs.append(helper.make_tensor_value_info("y", TensorProto.INT8, None))
    with pytest.raises(UnsupportedError, match="integer operators"):
        read_qdq(m.build())


def test_shapes_are_checked() -> None:
    m = QdqModel(16)
    m.output(m.node("Relu", m.input("x", 1, 3, 4)))
    model = m.build()
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_param, dims[2].dim_param = "N", "W"
    with pytest.raises(InputError, match=r"'W' on axis 2"):
        read_qdq(model)
    with pytest.raises(UsageError, match=r"no input is called 'z'; inputs: x\.q"):
        read_qdq(model, {"z": (1, 3, 4)})
    with pytest.raises(UsageError, match="does not fit"):
        read_qdq(model, {"x.q": (1, 5, 4)})
    assert read_qdq(model, {"x.q": (2, 3, 9)}).tensors["x.q"].shape == (2, 3, 9)
