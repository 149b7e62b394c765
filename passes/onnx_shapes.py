"""Concrete shapes for pricing: symbolic input dimensions are bound, the rest is inferred, holes are observed.

The written network keeps its symbolic shapes; only the variables under the knife carry concrete ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto

from passes.core.site import Array
from passes.errors import UsageError
from passes.graph import Note
from passes.onnx_parts import MAIN
from passes.onnx_sites import StaticDims
from passes.onnx_surgery import Scope, Surgery
from passes.onnx_weights import Weight

BATCH = 1
IMAGE = 320
"""Height and width of an image whose size is open."""
VOLUME = 32
LENGTHS = (256, 512, 128, 1024, 64)
"""Samples, frames or tokens of a sequence whose length is open, in the order in which they are tried."""
_BATCH_NAMES = re.compile(r"^(n|b|bs|batch.*|.*batch|.*batch_?size|none|num_samples)$", re.IGNORECASE)
_OBSERVED = "observed"
"""Domain of nodes that inference shall pass over."""
_LIGHT_BYTES = 1024
"""Constants up to this size take part in shape inference by value."""


@dataclass(frozen=True)
class Binding:
    """Concrete shape of each input, and a note for every dimension that was chosen here."""

    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[Note, ...]


def bind(
    inputs: Mapping[str, ValueInfoProto], asked: Mapping[str, tuple[int, ...]], length: int = LENGTHS[0]
) -> Binding:
    """Binds every open dimension, those of sequences to ``length``.

    Raises UsageError where ``asked`` does not fit the inputs.
    """
    unknown = sorted(set(asked) - set(inputs))
    if unknown:
        raise UsageError(f"shape given for input '{unknown[0]}': the model's inputs are {', '.join(inputs)}")
    named: dict[str, int] = {}
    for name, shape in asked.items():
        _check_fit(name, inputs[name], shape)
        for dim, size in zip(inputs[name].type.tensor_type.shape.dim, shape, strict=True):
            if dim.dim_param and named.setdefault(dim.dim_param, size) != size:
                raise UsageError(f"dimension '{dim.dim_param}' is given as {named[dim.dim_param]} and as {size}")
    shapes: dict[str, tuple[int, ...]] = {}
    notes: list[Note] = []
    for name, info in inputs.items():
        if not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape"):
            continue
        dims = info.type.tensor_type.shape.dim
        fixed = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]
        chosen: list[int] = []
        sizes: list[int] = []
        for axis, dim in enumerate(dims):
            known = asked[name][axis] if name in asked else fixed[axis] or named.get(dim.dim_param or " ")
            if known is None:
                chosen.append(axis)
                known = _default(dim.dim_param, axis, fixed, length)
                if dim.dim_param:
                    named[dim.dim_param] = known
            sizes.append(known)
        shapes[name] = tuple(sizes)
        full = ",".join(map(str, sizes))
        for axis in chosen:
            label = f"'{dims[axis].dim_param}'" if dims[axis].dim_param else str(axis)
            reason = f"dimension {label} of input '{name}' is symbolic: priced at {sizes[axis]}"
            notes.append(Note(name, "input", f"{reason}; set it with --shape {name}={full}"))
    return Binding(shapes, tuple(notes))


def _check_fit(name: str, info: ValueInfoProto, shape: tuple[int, ...]) -> None:
    dims = info.type.tensor_type.shape.dim
    declared = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]
    fits = len(shape) == len(dims) and all(
        not (d.HasField("dim_value") and d.dim_value > 0) or d.dim_value == size
        for d, size in zip(dims, shape, strict=False)
    )
    if not fits or any(size < 1 for size in shape):
        raise UsageError(f"shape {list(shape)} given for input '{name}' does not fit the model's {declared}")


def _default(label: str, axis: int, fixed: list[int | None], length: int) -> int:
    """A size for an open dimension: batches are 1, images 320 x 320, sequences ``length``."""
    rank = len(fixed)
    if axis == 0 or (label and _BATCH_NAMES.match(label)):
        return BATCH
    if rank >= 4 and axis >= 2:
        return IMAGE if rank == 4 else VOLUME
    if axis == 1 and rank == 3 and not label and fixed[0] not in (None, 1):
        return BATCH  # a recurrent state: (layers, batch, hidden)
    return length


def skeleton(surgery: Surgery) -> tuple[ModelProto, dict[str, Array]]:
    """The network with stubs for the larger constants of its main graph, and the values of those by name."""
    outside: dict[str, Array] = {}
    main = {id(surgery.weight_of(constant)) for constant in surgery.main.weights.values()}

    def tensor(weight: Weight) -> TensorProto:
        if weight.array is None or weight.size_bytes <= _LIGHT_BYTES or id(weight) not in main:
            return weight.tensor()
        outside[weight.header.name] = weight.array
        return _stub(weight)

    return surgery.export(tensor), outside


def _stub(weight: Weight) -> TensorProto:
    out = TensorProto()
    out.CopyFrom(weight.header)
    out.data_location = TensorProto.EXTERNAL
    out.external_data.add(key="location", value="left_out")
    return out


def light(surgery: Surgery, bound: Mapping[str, tuple[int, ...]] | None) -> ModelProto:
    """The network without its large values and declared shapes; inputs take the bound ones (None: stay symbolic)."""

    def tensor(weight: Weight) -> TensorProto:
        return weight.tensor() if weight.size_bytes <= _LIGHT_BYTES else _stub(weight)

    model = surgery.export(tensor, labelled=True)
    known = {(f.domain, f.name) for f in surgery.head.functions} | {("", ""), ("ai.onnx", "")}
    _strip_shapes(model.graph, known)
    model.opset_import.add(domain=_OBSERVED, version=1)
    for info in model.graph.input:
        if bound is not None and info.name in bound:
            del info.type.tensor_type.shape.dim[:]
            for size in bound[info.name]:
                info.type.tensor_type.shape.dim.add(dim_value=size)
    return model


def _strip_shapes(graph: GraphProto, known: set[tuple[str, str]]) -> None:
    """Drops declared shapes, for they may be symbolic or of another batch; those behind foreign operators stay."""
    foreign = {
        name
        for node in graph.node
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in known
        for name in node.output
    }
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name not in foreign:
            del graph.value_info[index]
    for info in graph.output:
        if info.type.HasField("tensor_type") and info.name not in foreign:
            info.type.tensor_type.ClearField("shape")
    for node in graph.node:
        if node.op_type == "ConvTranspose" and any(a.name == "output_shape" for a in node.attribute):
            node.domain = _OBSERVED  # ONNX infers a wrong rank where such an output is smaller than the input
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _strip_shapes(attribute.g, known)


def infer(surgery: Surgery, bound: Mapping[str, tuple[int, ...]]) -> None:
    """Writes concrete shapes and types onto the variables, as far as ONNX's own inference gets; None elsewhere.

    Raises whatever ONNX raises on a network that contradicts itself.
    """
    dims, types = _inferred(light(surgery, bound))
    for scope in surgery.scopes.values():
        for tensor in variables(scope):
            known = dims.get((scope.path, tensor.name))
            tensor.shape = None if known is None or None in known else known
            tensor.dtype = types.get((scope.path, tensor.name))


def static_dims(surgery: Surgery) -> StaticDims:
    """Dimensions that hold whatever the size of the inputs is."""
    return _inferred(light(surgery, None))[0]


def variables(scope: Scope) -> Iterator[gs.Variable]:
    """Inputs of a scope and everything its nodes write."""
    yield from (t for t in scope.graph.inputs if isinstance(t, gs.Variable))
    yield from (t for node in scope.graph.nodes for t in node.outputs if not t.is_empty())


def _inferred(model: ModelProto) -> tuple[StaticDims, dict[tuple[str, str], int]]:
    """(scope path, name) -> dimensions (None where open), and -> element type."""
    done = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=True)
    dims: StaticDims = {}
    types: dict[tuple[str, str], int] = {}
    _collect(done.graph, MAIN, dims, types)
    return dims, types


def _collect(graph: GraphProto, path: str, dims: StaticDims, types: dict[tuple[str, str], int]) -> None:
    for info in [*graph.input, *graph.value_info, *graph.output]:
        if info.type.HasField("tensor_type"):
            tensor = info.type.tensor_type
            types[path, info.name] = tensor.elem_type
            if tensor.HasField("shape"):
                sizes = (d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
                dims[path, info.name] = tuple(sizes)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _collect(attribute.g, f"{node.name}/{attribute.name}", dims, types)
