"""What stays in floats, cut out as ONNX models: one for each connected part, so that the host is called seldom."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx import NodeProto, ValueInfoProto, helper, numpy_helper

from codegen.quantized.graph import HostTensor, QHost, QOperation
from codegen.quantized.onnx_network import reads
from codegen.quantized.operands import reads as operands_of
from codegen.quantized.reader import Reader
from passes.errors import UnsupportedError


@dataclass
class _Part:
    """The way from byte tensors (``inputs``: name of the floats -> tensor) to the host's results."""

    level: int
    outputs: list[str]
    nodes: set[int] = field(default_factory=set)
    inputs: dict[str, str] = field(default_factory=dict)


def cut(reader: Reader, results: tuple[str, ...]) -> list[QHost]:
    """The host's operations: those that make ``reader.wanted``, and ``results``, outputs of the network in floats.

    A node that two parts of different depth need is in both. Raises UnsupportedError where the host would have to
    read what it cannot.
    """
    levels = _levels(reader)
    parts: list[_Part] = []
    for tensor in [*reader.wanted, *results]:
        part = _Part(0, [tensor])
        _collect(reader, reader.wanted.get(tensor, tensor), part)
        part.level = 1 + max((levels.get(name, 0) for name in part.inputs.values()), default=0)
        for other in [p for p in parts if p.level == part.level and _share(reader, p, part)]:
            parts.remove(other)
            part.outputs = other.outputs + part.outputs
            part.nodes |= other.nodes
            part.inputs = {**other.inputs, **part.inputs}
        parts.append(part)
    return [_operation(reader, part) for part in parts]


def _levels(reader: Reader) -> dict[str, int]:
    """How many host operations lie before each byte tensor."""
    levels: dict[str, int] = {}
    makers: dict[str, QOperation] = {}
    for operation in reader.operations:
        assert not isinstance(operation, QHost)
        makers[operation.output] = operation

    def level(name: str) -> int:
        stack = [name]
        while stack:
            top = stack[-1]
            if top in levels:
                stack.pop()
                continue
            if top in makers:
                before = operands_of(makers[top])
                missing = [n for n in before if n not in levels]
                value = max((levels.get(n, 0) for n in before), default=0)
            elif top in reader.wanted:
                part = _Part(0, [top])
                _collect(reader, reader.wanted[top], part)
                missing = [n for n in part.inputs.values() if n not in levels]
                value = 1 + max((levels.get(n, 0) for n in part.inputs.values()), default=0)
            else:
                missing, value = [], 0
            if missing:
                stack.extend(missing)
            else:
                levels[top] = value
                stack.pop()
        return levels[name]

    for name in [*makers, *reader.wanted]:
        level(name)
    return levels


def _collect(reader: Reader, name: str, part: _Part) -> None:
    """Adds the nodes that compute ``name`` from bytes, and those bytes."""
    network = reader.network
    stack = [name]
    while stack:
        name = stack.pop()
        if name in network.constants or name in part.inputs:
            continue
        view = reader.views.get(name)
        if view is not None and reader.is_plain(view):
            part.inputs[name] = view.tensor
            continue
        index = network.writer.get(name)
        if index is None:
            if name not in network.inputs:
                raise UnsupportedError(f"nothing gives the tensor {name!r}")
            part.inputs[name] = name
        elif index not in part.nodes:
            part.nodes.add(index)
            stack.extend(reads(network.nodes[index]))


def _share(reader: Reader, one: _Part, other: _Part) -> bool:
    nodes = (reader.network.nodes[i] for i in one.nodes & other.nodes)
    return any(node.op_type != "DequantizeLinear" for node in nodes)


def _operation(reader: Reader, part: _Part) -> QHost:
    network = reader.network
    order = sorted(part.nodes)
    nodes: list[NodeProto] = []
    inputs: list[ValueInfoProto] = []
    tensors: list[str] = []
    stands: dict[str, str] = {}
    for name, tensor in part.inputs.items():
        view = reader.views.get(name)
        if tensor in stands:
            nodes.append(helper.make_node("Identity", [stands[tensor]], [name]))
            continue
        if view is not None and not view.floating:
            raise UnsupportedError(f"{_first(reader, order)} reads the bytes of {name!r} without dequantizing them")
        stands[tensor] = name
        tensors.append(tensor)
        inputs.append(helper.make_tensor_value_info(name, network.types[name], network.shapes[name]))
        if tensor not in reader.tensors:
            dtype = helper.tensor_dtype_to_np_dtype(network.types[name]).name
            reader.host_tensors[tensor] = HostTensor(tensor, network.shapes[name], dtype)
    nodes += [network.nodes[i] for i in order]
    outputs: list[ValueInfoProto] = []
    for k, tensor in enumerate(part.outputs):
        source = reader.wanted.get(tensor, tensor)
        name = source
        if source in part.inputs or any(o.name == source for o in outputs):
            name = f"{source}:{k}"
            nodes.append(helper.make_node("Identity", [source], [name]))
        outputs.append(helper.make_tensor_value_info(name, network.types[source], network.shapes[source]))
        if tensor not in reader.wanted:
            dtype = helper.tensor_dtype_to_np_dtype(network.types[source]).name
            reader.host_tensors[tensor] = HostTensor(tensor, network.shapes[source], dtype)
    used = {name for node in nodes for name in reads(node)}
    constants = [numpy_helper.from_array(v, n) for n, v in network.constants.items() if n in used]
    model = network.model(helper.make_graph(nodes, "host", inputs, outputs, constants))
    names = tuple(network.nodes[i].name for i in order if network.nodes[i].op_type != "DequantizeLinear")
    kinds = dict.fromkeys(network.nodes[i].op_type for i in order if network.nodes[i].op_type != "DequantizeLinear")
    return QHost(
        names[0] if names else f"host/{part.outputs[0]}",
        "+".join(kinds) or "Identity",
        tuple(tensors),
        tuple(part.outputs),
        _reason(reader, order),
        model.SerializeToString(),
        names,
    )


def _first(reader: Reader, order: list[int]) -> str:
    nodes = [reader.network.nodes[i] for i in order]
    return f"{nodes[0].op_type} {nodes[0].name!r}" if nodes else "an output"


def _reason(reader: Reader, order: list[int]) -> str:
    """Why the nodes are the host's: what was said of them, the consequences of an earlier refusal left out."""
    said: dict[str, None] = {}
    for index in order:
        node, reason = reader.network.nodes[index], reader.refused.get(index)
        if reason is not None:
            said[f"{node.op_type} {reason}"] = None
    own = [text for text in said if not text.endswith("that is not quantized")] or list(said)
    return "; ".join(own[:3]) or "its result is needed in floats"
