"""Operations that the machine has no instruction for, as float networks for the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from codegen.quantized.graph import Pool, QConv, QHost, QOperation, QPool, QProduct, QuantizedGraph
from codegen.quantized.operands import reads, writes

_OPSET = 17
_IR_VERSION = 8


def host_model(graph: QuantizedGraph, operation: QOperation) -> tuple[tuple[str, ...], tuple[str, ...], bytes]:
    """Inputs, outputs and the serialized ONNX graph between them, all floats; results are as near to the operation's
    bytes as floats are.
    """
    if isinstance(operation, QHost):
        return operation.inputs, operation.outputs, operation.model
    inputs, outputs = reads(operation), writes(operation)
    constants: dict[str, NDArray[np.float32]] = {}
    clamp: list[NodeProto] = []
    if isinstance(operation, QConv):
        node = _conv(graph, operation, constants)
        node.output[0] = "unclamped"
        clamp.append(helper.make_node("Clip", ["unclamped", "low", "high"], [operation.output]))
    elif isinstance(operation, QProduct):
        node = helper.make_node("Mul", [operation.a, operation.b], [operation.output])
    else:
        assert isinstance(operation, QPool), operation
        node = _pool(operation)
    before, after = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, graph.tensors[name].shape) for name in names]
        for names in (inputs, outputs)
    )
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph([node, *clamp], operation.name or "host", before, after, stored),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    return inputs, outputs, model.SerializeToString()


def _conv(graph: QuantizedGraph, operation: QConv, constants: dict[str, NDArray[np.float32]]) -> NodeProto:
    """With its weights' scales taken back out of the multipliers, x_scale * weight_scale / y_scale, and its limits."""
    x, y = graph.tensors[operation.input], graph.tensors[operation.output]
    g = operation.geometry
    scales = np.float32(y.scale) * operation.multipliers.astype(np.float32)
    weight = operation.weight.astype(np.float32) * (scales / np.float32(x.scale)).reshape(-1, *(1,) * (1 + g.ndim))
    if g.transposed:  # ONNX stores these input channels first, group by group
        outputs, inputs = len(weight) // g.groups, weight.shape[1]
        weight = weight.reshape(g.groups, outputs, inputs, *g.kernel).swapaxes(1, 2)
        weight = weight.reshape(g.groups * inputs, outputs, *g.kernel)
    for name, limit in (("low", operation.low), ("high", operation.high)):
        constants[name] = np.array((limit - y.zero_point) * np.float32(y.scale), np.float32)
    names = [operation.input, "weight"]
    constants["weight"] = np.ascontiguousarray(weight, np.float32)
    if operation.bias is not None:
        names.append("bias")
        constants["bias"] = np.asarray(operation.bias.astype(np.float32) * scales, np.float32)
    how: dict[str, Any] = {"strides": g.strides, "dilations": g.dilations, "pads": g.pads, "group": g.groups}
    if g.transposed:
        how["output_padding"] = g.output_padding
    return helper.make_node(
        "ConvTranspose" if g.transposed else "Conv", names, [operation.output], kernel_shape=g.kernel, **how
    )


def _pool(operation: QPool) -> NodeProto:
    how: dict[str, Any] = {"kernel_shape": operation.kernel, "strides": operation.strides, "pads": operation.pads}
    if operation.kind is Pool.MAX:
        return helper.make_node("MaxPool", [operation.input], [operation.output], dilations=operation.dilations, **how)
    return helper.make_node(
        "AveragePool", [operation.input], [operation.output], count_include_pad=int(operation.count_padding), **how
    )
