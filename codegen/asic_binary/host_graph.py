"""The network around its segments as ONNX: what TVM compiles for the host; a segment is one node ``RankcProgram``."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from codegen.asic_binary.segments import Cut, Segment
from codegen.quantized.graph import QHost, QuantizedGraph

DOMAIN = "rankc"
NODE = "RankcProgram"
OPSET = 17


def host_graph(cut: Cut, name: str) -> onnx.ModelProto:
    """An ONNX model of the network's inputs and outputs. Segment k's node has the attribute ``segment`` = k.

    Floats become bytes by QuantizeLinear at the network's inputs and behind the host's parts, and floats again by
    DequantizeLinear before these and at the network's outputs.
    """
    graph = cut.graph
    build = _Builder(graph)
    for tensor, public, is_float in zip(graph.inputs, graph.input_names, graph.float_inputs, strict=True):
        build.take(public, tensor, is_float)
    segment = 0
    for index, part in enumerate(cut.parts):
        if isinstance(part, Segment):
            inputs, outputs = [list(map(_inner, names)) for names in (part.graph.inputs, part.graph.outputs)]
            label = f"segment_{segment}"
            build.nodes.append(helper.make_node(NODE, inputs, outputs, name=label, domain=DOMAIN, segment=segment))
            segment += 1
        else:
            build.inline(part, f"host_{index}/")
    for tensor, public, is_float in zip(graph.outputs, graph.output_names, graph.float_outputs, strict=True):
        build.give(tensor, public, is_float)
    opsets = {"": OPSET, DOMAIN: 1, **build.opsets}
    return helper.make_model(
        helper.make_graph(build.nodes, name, build.inputs, build.outputs, list(build.constants.values())),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=9,
    )


class _Builder:
    """Inputs, outputs, nodes and constants of the model in the making."""

    def __init__(self, graph: QuantizedGraph) -> None:
        self.graph = graph
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {_inner(name): numpy_helper.from_array(v, _inner(name)) for name, v in graph.constants.items()}
        self.opsets: dict[str, int] = {}

    def node(self, op: str, inputs: list[str], outputs: list[str]) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}/{outputs[0]}"))

    def take(self, public: str, tensor: str, is_float: bool) -> None:
        """An input of the network."""
        self.inputs.append(self._value(public, tensor, is_float))
        if is_float and tensor in self.graph.tensors:
            self._quantize(public, tensor)
        else:
            self.node("Identity", [public], [_inner(tensor)])

    def give(self, tensor: str, public: str, is_float: bool) -> None:
        """An output of the network."""
        self.outputs.append(self._value(public, tensor, is_float))
        if is_float and tensor in self.graph.tensors:
            self._dequantize(tensor, public)
        else:
            self.node("Identity", [_inner(tensor)], [public])

    def inline(self, part: QHost, prefix: str) -> None:
        """The part's own nodes, all names prefixed, between dequantized inputs and quantized outputs."""
        model = onnx.compose.add_prefix(onnx.load_from_string(part.model), prefix, inplace=True)
        for entry in model.opset_import:
            self.opsets[entry.domain] = max(entry.version, self.opsets.get(entry.domain, 0))
        for tensor, value in zip(part.inputs, model.graph.input, strict=True):
            if tensor in self.graph.tensors:
                self._dequantize(tensor, value.name)
            else:
                self.node("Identity", [_inner(tensor)], [value.name])
        self.constants.update({constant.name: constant for constant in model.graph.initializer})
        self.nodes.extend(model.graph.node)
        for tensor, value in zip(part.outputs, model.graph.output, strict=True):
            if tensor in self.graph.tensors:
                self._quantize(value.name, tensor)
            else:
                self.node("Identity", [value.name], [_inner(tensor)])

    def _quantize(self, source: str, tensor: str) -> None:
        self.node("QuantizeLinear", [source, *self._parameters(tensor)], [_inner(tensor)])

    def _dequantize(self, tensor: str, target: str) -> None:
        self.node("DequantizeLinear", [_inner(tensor), *self._parameters(tensor)], [target])

    def _parameters(self, tensor: str) -> list[str]:
        known = self.graph.tensors[tensor]
        kind = np.int8 if known.signed else np.uint8
        values = {"scale": np.float32(known.scale), "zero_point": kind(known.zero_point)}
        names = []
        for key, value in values.items():
            name = f"{tensor}/{key}"
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
            names.append(name)
        return names

    def _value(self, public: str, tensor: str, is_float: bool) -> onnx.ValueInfoProto:
        if tensor not in self.graph.tensors:
            other = self.graph.host_tensors[tensor]
            return helper.make_tensor_value_info(
                public, helper.np_dtype_to_tensor_dtype(np.dtype(other.dtype)), other.shape
            )
        known = self.graph.tensors[tensor]
        kind = TensorProto.FLOAT if is_float else TensorProto.INT8 if known.signed else TensorProto.UINT8
        return helper.make_tensor_value_info(public, kind, known.shape)


def _inner(tensor: str) -> str:
    """The name of a tensor as it lies between the parts: the network's own name may be that of its floats."""
    return f"{tensor}/inner"
