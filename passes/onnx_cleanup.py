"""Removes what changes nothing: nodes that pass their input on, and what no output depends on."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from passes.graph import Note
from passes.onnx_constants import Refusal, constant
from passes.onnx_surgery import Scope, Surgery


def drop_identities(surgery: Surgery) -> tuple[Note, ...]:
    """Takes out nodes whose output equals their input, in bodies too; names them."""
    notes = []
    for scope, node in list(surgery.nodes()):
        reason = _passes_on(surgery, node)
        if reason and _bypass(surgery, scope, node):
            notes.append(Note(node.name, node.op, reason))
    return tuple(notes)


def _passes_on(surgery: Surgery, node: gs.Node) -> str:
    """Why the node's output is its input; "" if it is not."""
    others = (out for out in node.outputs[1:] if not out.is_empty())
    if node.domain or not node.inputs or not all(surgery.is_unused(out) for out in others):
        return ""
    attributes = surgery.attributes(node)
    if node.op == "Identity":
        return "passes its input on"
    if node.op == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
        return "does nothing at inference" if training is None or _is_false(surgery, training) else ""
    if node.op == "Cast":
        return "casts to the type it has" if _dtype(surgery, node.inputs[0]) == attributes["to"] else ""
    if node.op == "Transpose":
        perm = attributes.get("perm")
        return "leaves all axes in place" if perm is not None and perm == sorted(perm) else ""
    if node.op in ("Concat", "Sum", "Max", "Min", "Mean") and len(node.inputs) == 1:
        return "has one input"
    return ""


def _is_false(surgery: Surgery, tensor: gs.Tensor) -> bool:
    try:
        return not constant(surgery, tensor).value.any()
    except Refusal:
        return False  # decided at run time


def _dtype(surgery: Surgery, tensor: gs.Tensor) -> int | None:
    if isinstance(tensor, gs.Constant):
        return int(surgery.weight_of(tensor).header.data_type)
    return tensor.dtype if isinstance(tensor.dtype, int) else None


def _bypass(surgery: Surgery, scope: Scope, node: gs.Node) -> bool:
    """Lets readers of the node's output read its input; False where the node has to stay."""
    x, y = node.inputs[0], node.outputs[0]
    if y.name in surgery.pinned or x.name in surgery.pinned:
        return False
    if scope.is_output(y):
        # The graph's output keeps its name: the writer of x writes y instead, where it may.
        writer = x.inputs[0] if isinstance(x, gs.Variable) and x.inputs else None
        local = writer is not None and surgery.homes[writer.name] == scope.path
        if writer is None or not local or scope.is_output(x) or _is_input(surgery, x):
            return False
        slot = next(i for i, out in enumerate(writer.outputs) if out is x)
        others = [reader for reader in x.outputs if reader is not node]
        y_readers_see = y
        surgery.remove(node)
        writer.outputs[slot] = y_readers_see
        _redirect(others, x, y)
        return True
    readers = surgery.readers(y)
    rest = list(node.inputs[1:])
    surgery.remove(node)
    _redirect(readers, y, x)
    surgery.prune(rest)
    return True


def _is_input(surgery: Surgery, tensor: gs.Tensor) -> bool:
    return any(tensor is t for scope in surgery.scopes.values() for t in scope.graph.inputs)


def _redirect(readers: list[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    for reader in readers:
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new


def drop_dead_code(surgery: Surgery) -> tuple[Note, ...]:
    """Removes nodes and constants that no output depends on; names them."""
    notes = []
    for path in reversed(list(surgery.scopes)):
        scope = surgery.scopes.get(path)
        if scope is None:  # its node went away meanwhile
            continue
        for node in reversed(list(scope.graph.nodes)):
            if all(out.is_empty() or surgery.is_unused(out) for out in node.outputs):
                notes.append(Note(node.name, node.op, "no output depends on it"))
                surgery.remove(node)
        for name, weight in list(scope.weights.items()):
            if surgery.is_unused(weight):
                del scope.weights[name]
                notes.append(Note(name, "initializer", "nothing reads it"))
    return tuple(notes)
