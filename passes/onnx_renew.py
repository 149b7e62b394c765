"""Other numbers in an ONNX network: trained weights go back to where the file keeps them.

Names stay wherever they can: a constant is written to in its own initializer, in its own type, as long as nothing else
reads it. A weight that the file unpacks first (behind a Transpose, say) or that others read too gets a new initializer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import NodeProto, TensorProto, numpy_helper

from passes.core.site import Array, Chain, Stage
from passes.onnx_emit import emit
from passes.onnx_sites import Reading, StaticDims, read
from passes.onnx_surgery import Surgery
from passes.onnx_weights import Weight


def renew_constant(surgery: Surgery, name: str, value: Array) -> None:
    """Puts ``value`` into an initializer, or a Constant node, by name; whoever reads it sees it. KeyError without."""
    tensor = surgery.main.weights.get(name)
    if tensor is None:
        tensor = next(t for node in surgery.main.graph.nodes for t in node.outputs if t.name == name)
    held = _held(surgery, tensor)
    if held is None:
        raise KeyError(f"'{name}' is no constant that could be written to")
    if not _equal(held, value):
        _write(surgery, tensor, value)


def renew_norm(surgery: Surgery, output: str, values: Sequence[Array]) -> None:
    """Puts scale, shift, mean and variance into the BatchNormalization that writes ``output``."""
    node = next(n for n in surgery.main.graph.nodes if n.outputs and n.outputs[0].name == output)
    for slot, value in enumerate(values, 1):
        tensor = node.inputs[slot]
        held = _held(surgery, tensor)
        if held is not None and _equal(held, value):
            continue
        if held is not None and len(tensor.outputs) == 1:
            _write(surgery, tensor, value)
        else:  # others read it as well
            stored = value.astype(np.float32 if held is None else held.dtype)
            node.inputs[slot] = surgery.add_weight(surgery.main, f"{node.name}/{_NORM[slot - 1]}", stored)
            surgery.prune([tensor])


_NORM = ("scale", "shift", "mean", "variance")


def renew_sites(surgery: Surgery, wanted: Sequence[tuple[Reading, Stage]], static: StaticDims) -> None:
    """Puts stages, which have the structure of their sites' own, into the sites' nodes."""
    changed = [(spot, stage) for spot, stage in wanted if not _same(spot.site.stage, stage, spot.dtype)]
    asked: dict[str, list[Array]] = {}
    for spot, stage in wanted:
        for slot, array in _arrays(surgery, spot, stage):
            asked.setdefault(spot.nodes[0].inputs[slot].name, []).append(array)
    for spot, stage in changed:
        if not _in_place(surgery, spot, stage, static, asked):
            emit(surgery, spot, Chain((stage,)), [spot.site.name])


def _arrays(surgery: Surgery, spot: Reading, stage: Stage) -> list[tuple[int, Array]]:
    """What each of the node's constants has to hold, by the position of the input."""
    slot = 0 if spot.nodes[0].inputs[0] is not spot.source else 1
    arrays = [(slot, _stored(surgery, spot, slot, stage))]
    return arrays if stage.bias is None else [*arrays, (2, stage.bias)]


def _in_place(
    surgery: Surgery, spot: Reading, stage: Stage, static: StaticDims, asked: Mapping[str, Sequence[Array]]
) -> bool:
    """Writes into the node's own constants; False where that does not make it the layer that is wanted.

    ``asked``: by name of a constant what the layers that read it want it to hold. One that others read too, and that
    not all want alike, gives way to a new one.
    """
    node = spot.nodes[0]
    before = []
    for slot, array in _arrays(surgery, spot, stage):
        tensor = node.inputs[slot]
        held = _held(surgery, tensor)
        if held is None or held.size != array.size:
            return False
        before.append((slot, tensor, held, array))
    for slot, tensor, held, array in before:
        claims = asked[tensor.name]
        agreed = len(claims) == len(tensor.outputs) and all(np.array_equal(claim, array) for claim in claims)
        if len(tensor.outputs) == 1 or agreed:
            _write(surgery, tensor, array)
        elif not _equal(held, array):
            base = f"{spot.site.name}/{'bias' if slot == 2 else 'weight'}"
            own = np.ascontiguousarray(array, dtype=held.dtype).reshape(held.shape)
            node.inputs[slot] = surgery.add_weight(spot.scope, base, own)
    if _same(read(surgery, spot.scope, node, static).site.stage, stage, spot.dtype):
        return True
    for slot, tensor, held, _ in before:  # the node scales what it reads
        node.inputs[slot] = tensor
        if len(tensor.outputs) == 1:
            _write(surgery, tensor, held)
    return False


def _stored(surgery: Surgery, spot: Reading, slot: int, stage: Stage) -> Array:
    """The stage's weight in the order of axes that the node reads."""
    node, weight = spot.nodes[0], stage.weight
    if node.op == "ConvTranspose":
        turned = stage.grouped_weight().swapaxes(1, 2)
        return turned.reshape(stage.in_channels, -1, *stage.geometry.kernel)
    if node.op == "Gemm":
        attributes = surgery.attributes(node)
        turn = bool(attributes.get("transA", 0)) if slot == 0 else not attributes.get("transB", 0)
        return weight.T if turn else weight
    return weight.T if node.op == "MatMul" and slot == 1 else weight


def _same(have: Stage, want: Stage, dtype: np.dtype[np.generic]) -> bool:
    """True if both are the same once stored in the file's type."""
    if (have.bias is None) != (want.bias is None):
        return False
    pairs = [(have.weight, want.weight)]
    if have.bias is not None and want.bias is not None:
        pairs.append((have.bias, want.bias))
    return all(np.array_equal(a.astype(dtype), b.astype(dtype)) for a, b in pairs)


def _equal(held: Array, value: Array) -> bool:
    return np.array_equal(held, value.astype(held.dtype).reshape(held.shape))


def _held(surgery: Surgery, tensor: gs.Tensor) -> Array | None:
    """The values of an initializer or a plain Constant node; None for anything else."""
    if isinstance(tensor, gs.Constant):
        return surgery.weight_of(tensor).array
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op != "Constant" or node.domain:
        return None
    value = surgery.attributes(node).get("value")
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else None


def _write(surgery: Surgery, tensor: gs.Tensor, array: Array) -> None:
    """Writes into a constant that :func:`_held` knows, in its own type and shape."""
    held = _held(surgery, tensor)
    assert held is not None
    stored = np.ascontiguousarray(array, dtype=held.dtype).reshape(held.shape)
    if isinstance(tensor, gs.Constant):
        stored.flags.writeable = False
        tensor.values = Weight(surgery.weight_of(tensor).header, stored, None)
        for key in [key for key, name in surgery.emitted.items() if name == tensor.name]:
            del surgery.emitted[key]
        return
    label = tensor.inputs[0].name
    message = NodeProto()
    message.CopyFrom(surgery.messages[label])  # copies of the network share the message
    for attribute in message.attribute:
        if attribute.name == "value":
            attribute.t.CopyFrom(numpy_helper.from_array(stored, attribute.t.name))
    surgery.messages[label] = message
