"""Takes an ONNX model apart before graphsurgeon sees it.

Graphsurgeon gets a shell: nodes without attributes, named by labels, tensors without types or values. All that it
would lose or stumble over (metadata, doc strings, attributes of rare kinds, types without a NumPy equivalent) is put
away here under the same labels and paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto

from passes.onnx_weights import Weight

MAIN = ""
"""Path of the main graph's scope."""


class Parts:
    """The messages, weights and names of a model, by scope path and by label, filled by :meth:`strip`."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.messages: dict[str, NodeProto] = {}
        self.homes: dict[str, str] = {}
        self.frames: dict[str, GraphProto] = {}
        self.weights: dict[str, dict[str, Weight]] = {}
        self.names: set[str] = set()
        self.pinned: set[str] = set()

    def strip(self, graph: GraphProto, path: str, shell: GraphProto) -> None:
        """Fills ``shell`` with bare nodes, tensor names and bodies, and puts the rest away."""
        self.frames[path] = without(graph, ("node", "initializer", "sparse_initializer"))
        weights = [Weight.from_tensor(t, self.folder) for t in graph.initializer]
        weights += [Weight.from_sparse(t) for t in graph.sparse_initializer]
        self.weights[path] = {w.header.name: w for w in weights}
        shell.name = graph.name
        shell.initializer.extend(TensorProto(name=name, data_type=TensorProto.FLOAT) for name in self.weights[path])
        shell.input.extend(ValueInfoProto(name=info.name) for info in graph.input)
        shell.output.extend(ValueInfoProto(name=info.name) for info in graph.output)
        self.names.update(self.weights[path], (i.name for i in graph.input), (i.name for i in graph.output))
        made = {name for node in graph.node for name in node.output} | self.weights[path].keys()
        made.update(info.name for info in graph.input)
        self.pinned.update(info.name for info in graph.output if info.name not in made)
        for node in graph.node:
            self._strip_node(node, path, shell.node.add())

    def _strip_node(self, node: NodeProto, path: str, bare: NodeProto) -> None:
        own = node.name or f"{node.op_type}:{next((o for o in node.output if o), '')}"
        full = own if not path or own.startswith(f"{path}/") else f"{path}/{own}"
        label = unique(full, self.homes)
        self.homes[label] = path
        self.names.update(node.output)
        bare.op_type, bare.domain, bare.name = node.op_type, node.domain, label
        bare.input.extend(node.input)
        bare.output.extend(node.output)
        message = without(node, ("input", "output", "attribute"))
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                message.attribute.append(without(attribute, ("g",)))
                body = bare.attribute.add(name=attribute.name, type=AttributeProto.GRAPH)
                self.strip(attribute.g, f"{label}/{attribute.name}", body.g)
            else:
                message.attribute.append(attribute)
                for graph in attribute.graphs:
                    self.pinned.update(_mentioned(graph))
        self.messages[label] = message


def _mentioned(graph: GraphProto) -> set[str]:
    names = {name for node in graph.node for name in [*node.input, *node.output]}
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                names |= _mentioned(inner)
    return names


def without(message: Any, dropped: tuple[str, ...]) -> Any:
    """A copy of a message without some of its fields; those are not even touched, for they may be large."""
    out = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name in dropped:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(out, descriptor.name, value)
        elif hasattr(value, "CopyFrom"):
            getattr(out, descriptor.name).CopyFrom(value)
        else:
            getattr(out, descriptor.name).extend(value)
    return out


def unique(base: str, taken: Any) -> str:
    """``base``, or ``base`` with the first free number behind it. A set of names takes the new one in."""
    name, count = base, 1
    while name in taken or not name:
        count += 1
        name = f"{base}_{count}"
    if isinstance(taken, set):
        taken.add(name)
    return name
