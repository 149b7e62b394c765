"""An ONNX network on onnx-graphsurgeon, with everything that graphsurgeon would lose carried beside it.

Graphsurgeon holds the links between nodes and tensors and nothing else: its nodes are named by a label that is unique
in the network, and each label points to the node's own message (name, attributes, doc string, metadata), which is
written back as it was read. The same goes for each graph's inputs, outputs, types and annotations. Bodies of control
flow are scopes; a body sees the tensors of the scopes around it. Variables carry concrete shapes for pricing; the
written file keeps its symbolic ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx_graphsurgeon.logger import G_LOGGER

from passes.core.mapped import spilled
from passes.core.site import Array
from passes.onnx_parts import MAIN, Parts, unique, without
from passes.onnx_weights import Weight

LARGE_BYTES = 1 << 28
"""From this size of external data on, a network is not brought into memory."""
SPILLED_BYTES = 1 << 20


@dataclass(eq=False)
class Scope:
    """A graph: the main one (path "") or a body, named by the path "label of its node/attribute".

    ``frame`` is its message without nodes and initializers; ``weights`` are its initializers by name; ``owners`` the
    operators of the bodies around it (If, Loop, ...), innermost first.
    """

    path: str
    graph: gs.Graph
    frame: GraphProto
    weights: dict[str, gs.Constant]
    parent: Scope | None = None
    owners: tuple[str, ...] = ()

    def is_output(self, tensor: gs.Tensor) -> bool:
        return any(out is tensor for out in self.graph.outputs)


@dataclass(eq=False)
class Surgery:
    """The network under the knife. Labels, scopes and messages stay in step; use the methods to change anything."""

    head: ModelProto
    """Everything of the model but its graph. Shared between copies, never written to."""
    scopes: dict[str, Scope]
    messages: dict[str, NodeProto]
    """Node messages by label, without inputs, outputs and bodies. Shared between copies, never written to."""
    homes: dict[str, str]
    """Scope path by label."""
    names: set[str]
    """All tensor names that are or were in use."""
    pinned: frozenset[str] = frozenset()
    """Tensors that something refers to in a way graphsurgeon does not see; they must stay as they are."""
    emitted: dict[tuple[str, str], str] = field(default_factory=dict)
    """Scope path and digest of an emitted constant -> its name."""
    spills: bool = False
    """Emitted constants go to temporary files: the network is too large to hold what replaces it in memory."""

    @classmethod
    def from_model(cls, model: ModelProto, folder: Path | None = None, large_bytes: int = LARGE_BYTES) -> Surgery:
        """Takes a checked model apart; ``folder`` is where its external data lies.

        From ``large_bytes`` of external data on, constants that are added later go to temporary files.
        """
        head = without(model, ("graph",))
        parts = Parts(folder)
        shell = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        parts.strip(model.graph, MAIN, shell.graph)
        with G_LOGGER.suppress():
            root = gs.import_onnx(shell)
        surgery = cls(head, {}, parts.messages, parts.homes, parts.names, frozenset(parts.pinned))
        surgery._adopt(root, MAIN, None, (), parts)
        surgery._adopt_weights(parts)
        mapped = [w for weights in parts.weights.values() for w in weights.values() if isinstance(w.array, np.memmap)]
        surgery.spills = sum(weight.size_bytes for weight in mapped) >= large_bytes
        return surgery

    def _adopt(self, graph: gs.Graph, path: str, parent: Scope | None, owners: tuple[str, ...], parts: Parts) -> None:
        scope = Scope(path, graph, parts.frames[path], {}, parent, owners)
        self.scopes[path] = scope
        for node in graph.nodes:
            for name, body in node.attrs.items():
                self._adopt(body, f"{node.name}/{name}", scope, (node.op, *owners), parts)

    def _adopt_weights(self, parts: Parts) -> None:
        for scope in self.scopes.values():
            for tensor in [*(t for node in scope.graph.nodes for t in node.inputs), *scope.graph.outputs]:
                home: Scope | None = scope if isinstance(tensor, gs.Constant) else None
                while home is not None and tensor.name not in parts.weights[home.path]:
                    home = home.parent
                if home is not None:
                    home.weights[tensor.name] = tensor
        for path, weights in parts.weights.items():
            found = self.scopes[path].weights
            ordered = {name: found.get(name) or gs.Constant(name, weight) for name, weight in weights.items()}
            for name, constant in ordered.items():
                constant.values = weights[name]
            self.scopes[path].weights = ordered

    def clone(self) -> Surgery:
        """An independent copy; messages and weights are shared, since nobody writes into them."""
        copy = replace(
            self,
            scopes={},
            messages=dict(self.messages),
            homes=dict(self.homes),
            names=set(self.names),
            emitted=dict(self.emitted),
        )
        tensors: dict[int, gs.Tensor] = {}

        def twin(tensor: gs.Tensor) -> gs.Tensor:
            if tensor.is_empty():
                return gs.Variable.empty()
            return tensors.setdefault(id(tensor), tensor.copy())

        def follow(scope: Scope, parent: Scope | None) -> gs.Graph:
            graph = gs.Graph(name=scope.graph.name, opset=scope.graph.opset, functions=[])
            home = Scope(scope.path, graph, scope.frame, {}, parent, scope.owners)
            copy.scopes[scope.path] = home
            home.weights = {name: twin(constant) for name, constant in scope.weights.items()}
            for node in scope.graph.nodes:
                inputs, outputs = [twin(t) for t in node.inputs], [twin(t) for t in node.outputs]
                bodies = {name: follow(self.scopes[f"{node.name}/{name}"], home) for name in node.attrs}
                graph.nodes.append(gs.Node(node.op, node.name, bodies, inputs, outputs, node.domain))
            graph.inputs = [twin(t) for t in scope.graph.inputs]
            graph.outputs = [twin(t) for t in scope.graph.outputs]
            return graph

        follow(self.main, None)
        return copy

    @property
    def main(self) -> Scope:
        return self.scopes[MAIN]

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((o.version for o in self.head.opset_import if o.domain in ("", "ai.onnx")), 0)

    def nodes(self, path: str = MAIN) -> Iterator[tuple[Scope, gs.Node]]:
        """All nodes with their scopes, in execution order: a control-flow node, then the nodes of its bodies."""
        scope = self.scopes[path]
        for node in list(scope.graph.nodes):
            yield scope, node
            for name in node.attrs:
                yield from self.nodes(f"{node.name}/{name}")

    def attributes(self, node: gs.Node) -> dict[str, Any]:
        """The node's attributes by name, bodies apart; strings decoded, lists as lists."""
        out = {}
        for attribute in self.messages[node.name].attribute:
            if attribute.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                value = helper.get_attribute_value(attribute)
                if isinstance(value, bytes):
                    value = value.decode("utf-8", "replace")
                out[attribute.name] = list(value) if attribute.type in _LISTS else value
        return out

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Nodes that read ``tensor``, bodies included; a node that reads it twice stands there twice."""
        return list(tensor.outputs)

    def only_reader(self, scope: Scope, tensor: gs.Tensor) -> gs.Node | None:
        """The one node that reads ``tensor``: once, in the same scope, and the graph does not return it; or None."""
        if len(tensor.outputs) != 1 or tensor.name in self.pinned or scope.is_output(tensor):
            return None
        node = tensor.outputs[0]
        return node if self.homes[node.name] == scope.path else None

    def fresh_name(self, base: str) -> str:
        """A tensor name that was never used, like ``base``."""
        return unique(base, self.names)

    def insert(
        self, scope: Scope, at: int, message: NodeProto, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]
    ) -> gs.Node:
        """A new node in position ``at`` of the scope; its message's name becomes the label, made unique."""
        label = unique(message.name, self.homes)
        message.name = label
        self.messages[label] = message
        self.homes[label] = scope.path
        node = gs.Node(message.op_type, label, {}, list(inputs), list(outputs), message.domain or None)
        scope.graph.nodes.insert(at, node)
        return node

    def position(self, node: gs.Node) -> int:
        """Index of a node in its scope. Graphsurgeon's own ``index`` compares nodes by value."""
        nodes = self.scopes[self.homes[node.name]].graph.nodes
        return next(i for i, other in enumerate(nodes) if other is node)

    def remove(self, node: gs.Node) -> None:
        """Takes a node out; its tensors lose a reader or their writer, and what is unused then stays."""
        for name in node.attrs:
            path = f"{node.name}/{name}"
            for inner in list(self.scopes[path].graph.nodes):
                self.remove(inner)
            del self.scopes[path]
        at = self.position(node)
        node.inputs.clear()
        node.outputs.clear()
        del self.scopes[self.homes[node.name]].graph.nodes[at]
        del self.messages[node.name], self.homes[node.name]

    def is_unused(self, tensor: gs.Tensor) -> bool:
        if tensor.outputs or tensor.name in self.pinned:
            return False
        return not any(scope.is_output(tensor) for scope in self.scopes.values())

    def prune(self, tensors: Sequence[gs.Tensor]) -> None:
        """Removes what computed ``tensors`` as far as nothing else needs it: weights and nodes that unpack them."""
        todo = [t for t in tensors if not t.is_empty()]
        while todo:
            tensor = todo.pop()
            if not self.is_unused(tensor):
                continue
            if isinstance(tensor, gs.Constant):
                self.drop_weight(tensor)
            elif tensor.inputs and all(t.is_empty() or self.is_unused(t) for t in tensor.inputs[0].outputs):
                node = tensor.inputs[0]
                above = list(node.inputs)
                self.remove(node)
                todo.extend(above)

    def drop_weight(self, tensor: gs.Constant) -> None:
        name = tensor.name
        for scope in self.scopes.values():
            if scope.weights.get(name) is tensor:
                del scope.weights[name]
                return

    def add_weight(self, scope: Scope, base: str, array: Array) -> gs.Constant:
        """A constant for ``array`` in the scope; an equal one that was added before serves again."""
        if self.head.ir_version < 4:  # there, only the main graph may have constants that are no inputs
            scope = self.main
        if self.spills and array.nbytes >= SPILLED_BYTES:
            array = spilled(array)
        weight = Weight.from_array("", array)
        key = (scope.path, weight.digest())
        known = scope.weights.get(self.emitted.get(key, ""))
        if known is not None:
            return known
        name = weight.header.name = self.fresh_name(base)
        constant = gs.Constant(name, weight)
        scope.weights[name] = constant
        self.emitted[key] = name
        return constant

    def weight_of(self, tensor: gs.Constant) -> Weight:
        weight: Weight = tensor._values
        return weight

    def export(
        self, tensor: Callable[[Weight], TensorProto], main_weights: bool = True, labelled: bool = False
    ) -> ModelProto:
        """The network as a message. ``tensor`` gives the message of a dense constant.

        Without ``main_weights`` the main graph lacks its dense initializers: a writer streams them. ``labelled``: nodes
        take their labels for names, for those who have to find them again.
        """
        model = ModelProto()
        model.CopyFrom(self.head)
        self._export_scope(self.main, model.graph, tensor, main_weights, labelled)
        return model

    def export_scope(self, scope: Scope, tensor: Callable[[Weight], TensorProto]) -> ModelProto:
        """One graph as a model of its own; what a body reads from around it is left open."""
        model = ModelProto()
        model.CopyFrom(self.head)
        self._export_scope(scope, model.graph, tensor, True, False)
        return model

    def _export_scope(
        self, scope: Scope, out: GraphProto, tensor: Callable[[Weight], TensorProto], weights: bool, labelled: bool
    ) -> None:
        out.CopyFrom(scope.frame)
        for node in scope.graph.nodes:
            message = out.node.add()
            message.CopyFrom(self.messages[node.name])
            if labelled:
                message.name = node.name
            message.input.extend(t.name for t in node.inputs)
            message.output.extend(t.name for t in node.outputs)
            for attribute in message.attribute:
                if attribute.name in node.attrs:
                    body = self.scopes[f"{node.name}/{attribute.name}"]
                    self._export_scope(body, attribute.g, tensor, True, labelled)
        for constant in scope.weights.values():
            weight = self.weight_of(constant)
            if weight.sparse is not None:
                out.sparse_initializer.append(weight.sparse)
            elif weights:
                out.initializer.append(tensor(weight))
        self._keep_alive(scope, out)

    def _keep_alive(self, scope: Scope, out: GraphProto) -> None:
        """Drops types and annotations of tensors that are gone; keeps the inputs in step with the initializers."""
        alive = {t.name for node in scope.graph.nodes for t in node.outputs} | set(scope.weights)
        alive.update(t.name for t in scope.graph.inputs)
        _retain(out.value_info, lambda info: info.name in alive)
        _retain(out.quantization_annotation, lambda note: note.tensor_name in alive)
        real = {t.name for t in scope.graph.inputs}
        _retain(out.input, lambda info: info.name in real or info.name in scope.weights)
        if scope.path == MAIN and self.head.ir_version < 4:  # there, an initializer has to be an input as well
            known = {info.name for info in out.input}
            for name, constant in scope.weights.items():
                if name not in known:
                    header = self.weight_of(constant).header
                    out.input.append(helper.make_tensor_value_info(name, header.data_type, list(header.dims)))


_LISTS = frozenset({AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS})


def _retain(field: Any, wanted: Callable[[Any], bool]) -> None:
    for index in reversed(range(len(field))):
        if not wanted(field[index]):
            del field[index]
