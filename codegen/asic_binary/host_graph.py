"""The network around its segments as ONNX: what TVM compiles for the host; a segment is one node ``RankcProgram``."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from codegen.asic_binary.segments import Cut, Segment
from codegen.quantized.graph import QHost, QTensor

DOMAIN = "rankc"
NODE = "RankcProgram"
OPSET = 17


def host_graph(cut: Cut, name: str) -> onnx.ModelProto:
    """An ONNX model of the network's inputs and outputs. Segment k's node has the attribute ``segment`` = k.

    Floats become bytes by QuantizeLinear at the network's inputs and behind the host's parts, and floats again by
    DequantizeLinear before these and at the network's outputs.
    """
    graph = cut.graph
    build = _Builder(graph.tensors)
    taken = dict(zip(graph.inputs, zip(graph.input_names, graph.float_inputs, strict=True), strict=True))
    for tensor, (public, is_float) in taken.items():
        if is_float:
            build.quantize(public, tensor)
        else:
            build.node("Identity", [public], [_bytes(tensor)])
    segment = 0
    for index, part in enumerate(cut.parts):
        if isinstance(part, Segment):
            build.nodes.append(
                helper.make_node(
                    NODE,
                    [_bytes(n) for n in part.graph.inputs],
                    [_bytes(n) for n in part.graph.outputs],
                    name=f"segment_{segment}",
                    domain=DOMAIN,
                    segment=segment,
                )
            )
            segment += 1
        else:
            build.inline(part, f"host_{index}/")
    for tensor, public, is_float in zip(graph.outputs, graph.output_names, graph.float_outputs, strict=True):
        if is_float:
            build.dequantize(tensor, public)
        else:
            build.node("Identity", [_bytes(tensor)], [public])
    inputs = [_value(public, graph.tensors[tensor], is_float) for tensor, (public, is_float) in taken.items()]
    outputs = [
        _value(public, graph.tensors[tensor], is_float)
        for tensor, public, is_float in zip(graph.outputs, graph.output_names, graph.float_outputs, strict=True)
    ]
    opsets = {"": OPSET, DOMAIN: 1, **build.opsets}
    return helper.make_model(
        helper.make_graph(build.nodes, name, inputs, outputs, list(build.constants.values())),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=9,
    )


class _Builder:
    """Nodes and constants of the model in the making."""

    def __init__(self, tensors: dict[str, QTensor]) -> None:
        self.tensors = tensors
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.opsets: dict[str, int] = {}

    def node(self, op: str, inputs: list[str], outputs: list[str]) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}/{outputs[0]}"))

    def quantize(self, source: str, tensor: str) -> None:
        self.node("QuantizeLinear", [source, *self._parameters(tensor)], [_bytes(tensor)])

    def dequantize(self, tensor: str, target: str) -> None:
        self.node("DequantizeLinear", [_bytes(tensor), *self._parameters(tensor)], [target])

    def inline(self, part: QHost, prefix: str) -> None:
        """The part's own nodes, all names prefixed, between dequantized inputs and quantized outputs."""
        model = onnx.compose.add_prefix(onnx.load_from_string(part.model), prefix, inplace=True)
        for entry in model.opset_import:
            self.opsets[entry.domain] = max(entry.version, self.opsets.get(entry.domain, 0))
        for tensor, value in zip(part.inputs, model.graph.input, strict=True):
            self.dequantize(tensor, value.name)
        self.constants.update({constant.name: constant for constant in model.graph.initializer})
        self.nodes.extend(model.graph.node)
        for tensor, value in zip(part.outputs, model.graph.output, strict=True):
            self.quantize(value.name, tensor)

    def _parameters(self, tensor: str) -> list[str]:
        known = self.tensors[tensor]
        kind = np.int8 if known.signed else np.uint8
        values = {"scale": np.float32(known.scale), "zero_point": kind(known.zero_point)}
        names = []
        for key, value in values.items():
            name = f"{tensor}/{key}"
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
            names.append(name)
        return names


def _bytes(tensor: str) -> str:
    """The name of a tensor's bytes: the network's own name may be that of its floats."""
    return f"{tensor}/bytes"


def _value(name: str, tensor: QTensor, is_float: bool) -> onnx.ValueInfoProto:
    kind = TensorProto.FLOAT if is_float else TensorProto.INT8 if tensor.signed else TensorProto.UINT8
    return helper.make_tensor_value_info(name, kind, tensor.shape)
