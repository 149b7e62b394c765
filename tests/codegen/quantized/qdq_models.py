"""QDQ networks out of single nodes, and how our integers compare with onnxruntime's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QuantizedGraph
from codegen.quantized.onnx_network import integer_options
from codegen.quantized.reference import dequantized_outputs, quantized_inputs, run_quantized

Array = NDArray[Any]


class QdqModel:
    """A QDQ network under construction. Scales and zero points are random unless given; names are those of floats."""

    def __init__(self, seed: int, signed: bool = True, opset: int = 17) -> None:
        self.rng = np.random.default_rng(seed)
        self.signed = signed
        self.opset = opset
        self.dtype = np.dtype(np.int8 if signed else np.uint8)
        self.kind = TensorProto.INT8 if signed else TensorProto.UINT8
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.outputs: list[onnx.ValueInfoProto] = []

    def scaling(self, name: str, scale: float | None = None, zero: int | None = None) -> list[str]:
        """Names of a scale and a zero point of activations."""
        low, high = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
        scale = float(np.exp(self.rng.uniform(-5, -2))) if scale is None else scale
        zero = int(self.rng.integers(low, high + 1)) if zero is None else zero
        self.constants[f"{name}.s"] = np.array(scale, np.float32)
        self.constants[f"{name}.z"] = np.array(zero, self.dtype)
        return [f"{name}.s", f"{name}.z"]

    def input(self, name: str, *shape: int, scale: float | None = None, zero: int | None = None) -> str:
        """An input of bytes, dequantized."""
        self.inputs[f"{name}.q"] = shape
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", *self.scaling(name, scale, zero)], [name]))
        return name

    def constant(self, name: str, value: Array) -> str:
        self.constants[name] = value
        return name

    def weight(self, name: str, shape: tuple[int, ...], axis: int | None, channels: int) -> str:
        """Random int8 weights, dequantized, with a scale for each of ``channels`` along ``axis`` or one for all."""
        count = () if axis is None else (channels,)
        self.constants[f"{name}.q"] = self.rng.integers(-127, 128, shape).astype(np.int8)
        self.constants[f"{name}.s"] = np.exp(self.rng.uniform(-6, -4, count)).astype(np.float32)
        self.constants[f"{name}.z"] = np.zeros(count, np.int8)
        keywords = {} if axis is None else {"axis": axis}
        inputs = [f"{name}.q", f"{name}.s", f"{name}.z"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], **keywords))
        return name

    def bias(self, name: str, x: str, weight: str, outputs: int) -> str:
        """An int32 bias with the scale that the quantizer gives it: that of the products."""
        scale = self.constants[f"{x}.s"] * self.constants[f"{weight}.s"]
        self.constants[f"{name}.q"] = self.rng.integers(-3000, 3000, outputs).astype(np.int32)
        self.constants[f"{name}.s"] = np.asarray(scale, np.float32)
        keywords = {"axis": 0} if np.ndim(scale) else {}
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.s"], [name], **keywords))
        return name

    def node(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **given: Any) -> str:
        """A node; the name of its (first) output."""
        name = f"{op}_{len(self.nodes)}"
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"node_{name}", domain=domain, **given))
        return name

    def requantize(self, name: str, scale: float | None = None, zero: int | None = None) -> str:
        """QuantizeLinear and DequantizeLinear behind ``name``."""
        parameters = self.scaling(f"{name}.r", scale, zero)
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.r.q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}.r.q", *parameters], [f"{name}.r"]))
        return f"{name}.r"

    def output(self, name: str, scale: float | None = None, zero: int | None = None) -> str:
        """An output of bytes."""
        parameters = self.scaling(f"{name}.y", scale, zero)
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.y.q"]))
        self.outputs.append(helper.make_tensor_value_info(f"{name}.y.q", self.kind, None))
        return f"{name}.y.q"

    def float_output(self, name: str) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def build(self) -> onnx.ModelProto:
        """The model, its input shapes concrete."""
        graph = helper.make_graph(
            self.nodes,
            "qdq",
            [helper.make_tensor_value_info(n, self.kind, s) for n, s in self.inputs.items()],
            self.outputs,
            [numpy_helper.from_array(v, n) for n, v in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain for node in self.nodes):
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return onnx.shape_inference.infer_shapes(model)

    def feeds(self) -> dict[str, Array]:
        low, high = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
        return {n: self.rng.integers(low, high + 1, s).astype(self.dtype) for n, s in self.inputs.items()}


def _is_signed(model: onnx.ModelProto) -> bool:
    """Whether activations are int8: those that are quantized, or else those that come in."""
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds = {constants.get(n.input[2]) for n in model.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2}
    return TensorProto.INT8 in (kinds or {i.type.tensor_type.elem_type for i in model.graph.input})


def ort(model: onnx.ModelProto, feeds: Mapping[str, Array], integers: bool = True) -> dict[str, Array]:
    """onnxruntime's outputs; ``integers``: int8 activations go through its integer kernels, as they do on Arm."""
    options = integer_options(signed=integers and _is_signed(model))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def ours(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> tuple[QuantizedGraph, dict[str, Array]]:
    graph = read_qdq(model)
    found = run_quantized(graph, quantized_inputs(graph, feeds))
    return graph, dequantized_outputs(graph, found)


def differences(one: Mapping[str, Array], other: Mapping[str, Array]) -> tuple[int, int, int]:
    """How many bytes differ, by how much at most, of how many; for outputs in bytes."""
    assert one.keys() == other.keys()
    count = most = total = 0
    for name, value in one.items():
        assert value.shape == other[name].shape and value.dtype == other[name].dtype
        gap = np.abs(value.astype(np.int64) - other[name].astype(np.int64))
        count, most, total = count + int((gap > 0).sum()), max(most, int(gap.max(initial=0))), total + gap.size
    return count, most, total


def kinds(graph: QuantizedGraph) -> list[str]:
    return [type(operation).__name__ for operation in graph.operations]
