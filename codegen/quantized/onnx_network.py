"""An ONNX network with concrete shapes, its shape arithmetic folded away: what the frontend walks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from passes import onnx_reader
from passes.errors import InputError, UnsupportedError, UsageError

Array = NDArray[Any]

_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"})
_KEPT = frozenset({"DequantizeLinear", *_RANDOM})
"""Never folded: a dequantized constant is wanted as the integers it is."""


class Network:
    """``nodes`` in topological order without those that constants alone decide; ``constants`` by name.

    ``shapes`` and ``types`` (ONNX's element types) of every tensor; ``readers``: tensor -> indices of nodes,
    ``writer``: tensor -> index of the node. Bodies of control flow read what they capture.
    """

    def __init__(self, model: ModelProto) -> None:
        self.opsets = list(model.opset_import)
        self.ir_version = model.ir_version
        self.functions = list(model.functions)
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.inputs = [i.name for i in model.graph.input if i.name not in self.constants]
        self.outputs = [o.name for o in model.graph.output]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, int] = {}
        self._settle(model)
        self.readers: dict[str, list[int]] = {}
        self.writer: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for name in dict.fromkeys(reads(node)):
                self.readers.setdefault(name, []).append(index)
            self.writer.update(dict.fromkeys((name for name in node.output if name), index))

    @classmethod
    def read(cls, source: str | Path | ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Network:
        """Raises InputError where the file cannot be used, UsageError where ``shapes`` do not fit it."""
        if isinstance(source, ModelProto):
            model = ModelProto()
            model.CopyFrom(source)
        else:
            path = Path(source)
            model, _ = onnx_reader.load(path)
            onnx.load_external_data_for_model(model, str(path.parent))
        if model.functions:
            model = inline_local_functions(model)
        _bind(model, shapes)
        with onnx_reader.refusing("the network" if isinstance(source, ModelProto) else source):
            return cls(model)

    def _settle(self, model: ModelProto) -> None:
        """Infers shapes and folds until neither finds anything new; what is open then is read off a run."""
        del model.graph.value_info[:]
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        while True:
            del model.graph.node[:]
            model.graph.node.extend(self.nodes)
            del model.graph.initializer[:]
            model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in self.constants.items())
            done = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=True)
            for info in [*done.graph.input, *done.graph.value_info, *done.graph.output]:
                self._note(info.name, info.type.tensor_type)
            for name, value in self.constants.items():
                self.shapes[name] = value.shape
                self.types[name] = helper.np_dtype_to_tensor_dtype(value.dtype)
            if not self._fold():
                break
        names = {name for node in self.nodes for name in node.output if name}
        if names - self.shapes.keys():
            self._observe(model, sorted(names - self.shapes.keys()))

    def _note(self, name: str, tensor: onnx.TypeProto.Tensor) -> None:
        if tensor.elem_type:
            self.types[name] = tensor.elem_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            self.shapes[name] = tuple(d.dim_value for d in tensor.shape.dim)

    def _fold(self) -> bool:
        """Evaluates every node that constants (and shapes that are known) decide; False if there is none."""
        kept: list[NodeProto] = []
        found: list[NodeProto] = []
        known = set(self.constants)
        for node in self.nodes:
            if node.op_type == "Shape" and node.input[0] in self.shapes and node.input[0] not in known:
                shape = self.shapes[node.input[0]]
                ends = attributes(node)
                part = shape[ends.get("start", 0) : ends.get("end", len(shape))]
                self.constants[node.output[0]] = np.array(part, np.int64)
                known.add(node.output[0])
            elif node.op_type not in _KEPT and not has_body(node) and all(not n or n in known for n in node.input):
                found.append(node)
                known.update(node.output)
            else:
                kept.append(node)
        changed = len(kept) < len(self.nodes)
        if found:
            names = [name for node in found for name in node.output if name]
            values = self.evaluate(found, names, {})
            self.constants.update(zip(names, values, strict=True))
        self.nodes = kept
        return changed

    def evaluate(self, nodes: list[NodeProto], outputs: list[str], feeds: Mapping[str, Array]) -> list[Array]:
        """``nodes`` run by onnxruntime, without fusing any, on constants of the network and on ``feeds``."""
        wanted = {name for node in nodes for name in node.input if name}
        graph = helper.make_graph(
            nodes,
            "part",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for n, v in feeds.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(v, n) for n, v in self.constants.items() if n in wanted and n not in feeds],
        )
        options = quiet_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return run(self.model(graph), options, feeds, outputs)

    def model(self, graph: GraphProto) -> ModelProto:
        """``graph`` as a model in the network's own operator sets."""
        return helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)

    def _observe(self, model: ModelProto, names: list[str]) -> None:
        """Shapes of ``names`` from one run on zeros. Raises UnsupportedError where the network does not run on them."""
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        feeds = {
            name: np.zeros(self.shapes[name], helper.tensor_dtype_to_np_dtype(self.types[name])) for name in self.inputs
        }
        options = quiet_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            values = run(model, options, feeds, names)
        except Exception as error:
            reason = onnx_reader.one_line(error)
            raise UnsupportedError(f"the shape of {names[0]!r} cannot be found out: {reason}") from error
        for name, value in zip(names, values, strict=True):
            self.shapes[name] = value.shape
            self.types[name] = helper.np_dtype_to_tensor_dtype(value.dtype)


def _bind(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Makes every input's shape concrete: ``shapes`` first, then 1 for a symbolic leading dimension."""
    constants = {t.name for t in model.graph.initializer}
    inputs = {i.name: i for i in model.graph.input if i.name not in constants}
    for name in shapes:
        if name not in inputs:
            raise UsageError(f"no input is called {name!r}; inputs: {', '.join(inputs)}")
    symbols: dict[str, int] = {}
    for name, shape in shapes.items():
        dims = inputs[name].type.tensor_type.shape.dim
        if len(dims) != len(shape) or any(
            d.HasField("dim_value") and d.dim_value != s for d, s in zip(dims, shape, strict=False)
        ):
            have = ", ".join(d.dim_param or str(d.dim_value or "?") for d in dims)
            raise UsageError(f"shape {shape} does not fit the input {name!r}, which has ({have})")
        symbols.update({d.dim_param: s for d, s in zip(dims, shape, strict=True) if d.dim_param})
    for name, info in inputs.items():
        dims = info.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            size = shapes[name][axis] if name in shapes else symbols.get(dim.dim_param, 0) or (axis == 0)
            if not size:
                raise InputError(
                    f"input {name!r} has the symbolic dimension {dim.dim_param or '?'!r} on axis {axis}; give its shape"
                )
            dim.dim_value = int(size)


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values, strings decoded."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def has_body(node: NodeProto) -> bool:
    return any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)


def reads(node: NodeProto) -> list[str]:
    """The tensors that a node reads, what its bodies capture included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            body = attribute.g
            own = {t.name for t in body.initializer} | {i.name for i in body.input}
            own |= {name for inner in body.node for name in inner.output}
            captured = [name for inner in body.node for name in reads(inner)] + [o.name for o in body.output]
            names += [name for name in captured if name not in own]
    return names


def quiet_options() -> onnxruntime.SessionOptions:
    """One thread, no warnings: these sessions are small."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


def integer_options(signed: bool, threads: int = 1) -> onnxruntime.SessionOptions:
    """:func:`quiet_options` for integer kernels that are exact, for activations of int8 (``signed``) or uint8.

    ``threads`` 0: as many as there are cores.

    Left alone, x86 computes int8 as uint8 or in floats; and processors without VNNI add pairs of products of uint8 up
    in 16 bits, where they saturate. The option against the one has no kernels for the other.
    """
    options = quiet_options()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdqisint8allowed" if signed else "session.x64quantprecision", "1")
    return options


def run(
    model: ModelProto, options: onnxruntime.SessionOptions, feeds: Mapping[str, Array], outputs: list[str]
) -> list[Array]:
    """One run on the CPU. Raises what onnxruntime raises."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(outputs, dict(feeds)))


def byte_type(element_type: int) -> bool | None:
    """True for int8, False for uint8, None for any other type."""
    if element_type == TensorProto.INT8:
        return True
    return False if element_type == TensorProto.UINT8 else None
