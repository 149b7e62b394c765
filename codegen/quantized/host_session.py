"""Runs the host's parts of an integer network by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from codegen.quantized.graph import QHost, QTensor, QuantizedGraph
from codegen.quantized.onnx_network import integer_options

Array = NDArray[Any]


def host_session(graph: QuantizedGraph, operation: QHost) -> Callable[[Mapping[str, Array]], list[Array]]:
    """From the values of ``operation.inputs`` by name to those of its outputs in order, bytes on both sides."""
    model = ModelProto.FromString(operation.model)
    inner = model.graph
    nodes: list[NodeProto] = []
    inputs: list[ValueInfoProto] = []
    outputs: list[ValueInfoProto] = []
    constants: list[TensorProto] = []

    def parameters(tensor: QTensor) -> list[str]:
        kind = np.int8 if tensor.signed else np.uint8
        names = [f"{tensor.name}/scale", f"{tensor.name}/zero"]
        values: list[Array] = [np.array(tensor.scale, np.float32), np.array(tensor.zero_point, kind)]
        known = {c.name for c in constants}
        constants.extend(numpy_helper.from_array(v, n) for v, n in zip(values, names, strict=True) if n not in known)
        return names

    names: dict[str, str] = {}
    for place, (name, value) in enumerate(zip(operation.inputs, inner.input, strict=True)):
        if name not in graph.tensors:
            inputs.append(value)
            names[name] = value.name
            continue
        tensor = graph.tensors[name]
        names[name] = f"in/{place}"
        inputs.append(helper.make_tensor_value_info(names[name], _kind(tensor), tensor.shape))
        nodes.append(helper.make_node("DequantizeLinear", [names[name], *parameters(tensor)], [value.name]))
    nodes.extend(inner.node)
    for place, (name, value) in enumerate(zip(operation.outputs, inner.output, strict=True)):
        if name not in graph.tensors:
            outputs.append(value)
            continue
        tensor = graph.tensors[name]
        outputs.append(helper.make_tensor_value_info(f"out/{place}", _kind(tensor), tensor.shape))
        nodes.append(helper.make_node("QuantizeLinear", [value.name, *parameters(tensor)], [f"out/{place}"]))
    whole = helper.make_model(
        helper.make_graph(nodes, "host", inputs, outputs, [*inner.initializer, *constants]),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    options = integer_options(graph.signed)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, ["CPUExecutionProvider"])
    wanted = [o.name for o in outputs]

    def call(feeds: Mapping[str, Array]) -> list[Array]:
        return list(session.run(wanted, {names[name]: value for name, value in feeds.items()}))

    return call


def _kind(tensor: QTensor) -> int:
    return TensorProto.INT8 if tensor.signed else TensorProto.UINT8
