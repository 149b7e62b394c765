"""Removes what changes nothing: nodes that pass their input on, and what no output depends on."""

from __future__ import annotations

from torch import fx, nn

from passes.fx_network import Network, flat_inputs, forms, is_item, label
from passes.fx_operators import bound, has_hooks, is_removable, onnx_name, torch_name, writes
from passes.graph import Note

_DROPOUTS = ("dropout", "featuredropout", "alphadropout", "featurealphadropout")


def drop_identities(net: Network) -> tuple[Note, ...]:
    """Takes out nodes whose output equals their input; names them."""
    notes = []
    changes_in_place = any(writes(net, node) for node in net.nodes())
    for node in list(net.nodes()):
        reason = _passes_on(net, node, changes_in_place)
        if not reason:
            continue
        source = flat_inputs(node)[0]
        if source.op in ("placeholder", "get_attr") and net.output in node.users:
            continue  # the caller would be handed the input, or a weight, itself
        notes.append(Note(label(node), onnx_name(net, node), reason))
        node.replace_all_uses_with(source)
        net.erase([node])
    return tuple(notes)


def _passes_on(net: Network, node: fx.Node, changes_in_place: bool) -> str:
    """Why the node's output is its input; "" if it is not. A copy matters where something is changed in place."""
    reads = flat_inputs(node)
    if not reads or forms(node) != forms(reads[0]) or len(forms(node)) != 1 or is_item(node):
        return ""
    name = torch_name(net, node)
    if name in _DROPOUTS:
        return "does nothing at inference" if _is_off(net, node, name) else ""
    if len(reads) != 1 or writes(net, node):
        return ""
    if name in ("detach", "alias") or (name == "identity" and not has_hooks(net.called(node))):
        return "passes its input on"
    if name in ("clone", "liftfreshcopy"):
        return "" if changes_in_place else "copies its input"
    if name in ("to", "float", "double", "half", "type", "tocopy"):
        copies = name == "tocopy" or node.kwargs.get("copy") or True in node.args[1:]
        return "" if changes_in_place and copies else "casts to the type it has"
    if name in ("cat", "concat"):
        return "" if changes_in_place else "has one input"
    if name == "permute":
        given = bound(node, ("input", "dims"))
        dims = given["dims"] if isinstance(given.get("dims"), tuple | list) else node.args[1:]
        return "leaves all axes in place" if list(dims) == list(range(len(forms(node)[0].shape))) else ""
    return ""


def _is_off(net: Network, node: fx.Node, name: str) -> bool:
    """True for a dropout that does not drop."""
    if node.op == "call_module":
        module = net.called(node)
        return isinstance(module, nn.modules.dropout._DropoutNd) and not module.training and not has_hooks(module)
    aten = getattr(node.target, "__module__", "") != "torch.nn.functional"
    given = bound(node, ("input", "p", "train" if aten else "training"))
    # torch.nn.functional's dropouts train unless they are told not to, the others of them do not
    default = name == "dropout" or aten
    return given.get("train" if aten else "training", default) is False


def drop_dead_code(net: Network) -> tuple[Note, ...]:
    """Removes nodes, and the constants that they alone read; names both. What may have other effects stays."""
    notes = []
    stored = set(net.stored())
    for node in reversed(list(net.nodes())):
        if not node.users and is_removable(net, node):
            if not is_item(node):
                notes.append(Note(label(node), onnx_name(net, node), "no output depends on it"))
            net.erase([node])
    net.prune([node for node in net.graph.nodes if node.op == "get_attr"])
    gone = stored - set(net.stored())
    notes.extend(Note(path, "parameter", "nothing reads it") for path in sorted(gone))
    return tuple(notes)
