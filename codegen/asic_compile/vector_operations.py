"""Which operations the vector unit carries out, and with what parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.isa import Sum, VectorFunction, VectorSpec, Window
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.places import Place
from codegen.asic_compile.tensors import TensorPlaces
from codegen.asic_compile.vector import ElementTask, PoolTask, lower_elements, lower_pool
from codegen.quantized.graph import (
    Pool,
    QMove,
    QOperation,
    QPool,
    QProduct,
    QSum,
    QTable,
    QuantizedGraph,
)

_COPY = VectorSpec(VectorFunction.COPY)


@dataclass(frozen=True)
class VectorAmount:
    """Elementary operations, and the number of chunks, of the price list."""

    operations: int
    chunks: int


def vector_reason(graph: QuantizedGraph, operation: QOperation) -> str:
    """Why the vector unit cannot run ``operation``; empty where it can, or where it is no operation of its own."""
    if isinstance(operation, QProduct) and graph.tensors[operation.a].signed != graph.tensors[operation.b].signed:
        return "a product of a signed and an unsigned map"
    if isinstance(operation, QPool) and len(operation.kernel) > 3:
        return f"a pool of {len(operation.kernel)} axes"
    return ""


def lower_vector(
    builder: Builder,
    graph: QuantizedGraph,
    operation: QOperation,
    places: TensorPlaces,
    amount: VectorAmount,
) -> int:
    """Appends the instructions of ``operation``, in as many pieces as the price list has where that many make sense;
    gives its cycles by the event model.
    """
    tensors = graph.tensors
    if isinstance(operation, QPool):
        return _lower_pool(builder, graph, operation, places, amount)
    if isinstance(operation, QMove):
        return _lower_moves(builder, graph, operation, places, amount)
    if isinstance(operation, QSum):
        a, b, y = (tensors[name] for name in (operation.a, operation.b, operation.output))
        a_ratio, b_ratio, offset = (
            float(np.float32(v)) for v in (operation.a_ratio, operation.b_ratio, operation.offset)
        )
        limits = operation.low, operation.high
        entry = Sum(a_ratio, b_ratio, offset, *limits, True, a.signed, b.signed, y.signed)
        spec = VectorSpec(VectorFunction.SUM, sum=builder.sums.number(entry), signed=y.signed)
        names = [operation.a, operation.b]
    elif isinstance(operation, QProduct):
        a, b, y = (tensors[name] for name in (operation.a, operation.b, operation.output))
        spec = VectorSpec(
            VectorFunction.PRODUCT,
            ratio=float(np.float32(operation.ratio)),
            a_zero=a.zero_point,
            b_zero=b.zero_point,
            zero_point=y.zero_point,
            low=y.limits[0],
            high=y.limits[1],
            signed=a.signed,
        )
        names = [operation.a, operation.b]
    else:
        assert isinstance(operation, QTable), operation
        spec = VectorSpec(VectorFunction.TABLE, table=builder.tables.number(operation.table))
        names = [operation.input]
    target = places[operation.output]
    shape = tensors[operation.output].shape
    order = np.argsort(target.offsets.reshape(-1))
    operands = tuple(_addresses(places[name], shape).reshape(-1)[order] for name in names)
    return lower_elements(builder, ElementTask(spec, operands, target.address, amount.operations, amount.chunks))


def lower_move(builder: Builder, source: Place, target: Place) -> int:
    """Copies a tensor into another order of its bytes; gives the cycles by the event model."""
    order = np.argsort(target.offsets.reshape(-1))
    sources = _addresses(source, target.offsets.shape).reshape(-1)[order]
    chunks = _fitting_chunks(builder, len(order))
    return lower_elements(builder, ElementTask(_COPY, (sources,), target.address, len(order), chunks))


def _fitting_chunks(builder: Builder, elements: int) -> int:
    pads = builder.spec.scratchpads
    room = min(pads.input_kib, pads.accumulator_kib) * 1024 // 2
    return max(1, -(-elements // room))


def _addresses(place: Place, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """DRAM addresses of a tensor's elements, broadcast to ``shape``."""
    return np.asarray(np.broadcast_to(place.address + place.offsets, shape))


def _lower_moves(
    builder: Builder, graph: QuantizedGraph, operation: QMove, places: Mapping[str, Place], amount: VectorAmount
) -> int:
    target = places[operation.output]
    tensor = graph.tensors[operation.output]
    sources = np.full(tensor.shape, -1, np.int64)
    for piece in operation.pieces:
        place = places[piece.input]
        at = place.address + place.offsets
        if operation.permutation is not None:
            at = at.transpose(operation.permutation)
        steps = piece.step or (1,) * len(piece.shape)
        to = [b + np.arange(n) * s for b, n, s in zip(piece.begin, piece.shape, steps, strict=True)]
        from_ = [
            b + np.arange(n) * s for b, n, s in zip(piece.source_begin, piece.shape, piece.source_step, strict=True)
        ]
        sources[np.ix_(*to)] = at[np.ix_(*from_)]
    order = np.argsort(target.offsets.reshape(-1))
    wanted = sources.reshape(-1)[order]
    holes = wanted < 0
    fill = VectorSpec(VectorFunction.FILL, zero_point=0 if operation.fill is None else operation.fill)
    missing = (holes, fill) if holes.any() else None
    return lower_elements(builder, ElementTask(_COPY, (wanted,), target.address, len(order), amount.chunks, missing))


def _lower_pool(
    builder: Builder, graph: QuantizedGraph, operation: QPool, places: TensorPlaces, amount: VectorAmount
) -> int:
    x, y = graph.tensors[operation.input], graph.tensors[operation.output]
    n = len(operation.kernel)
    fill = (1,) * (3 - n)
    kernel: Any = (*fill, *operation.kernel)
    strides: Any = (*fill, *operation.strides)
    dilations: Any = (*fill, *operation.dilations)
    origin: Any = (*(0,) * (3 - n), *(-before for before in operation.pads[:n]))
    source, target = places.as_map(operation.input), places.as_map(operation.output)
    pad = x.limits[0] if operation.kind is Pool.MAX else x.zero_point
    window = Window(1, 1, source.size, target.size, kernel, strides, dilations, origin, pad, x.signed)
    if operation.kind is Pool.MAX:
        spec = VectorSpec(VectorFunction.MAX_POOL, signed=x.signed)
    else:
        spec = VectorSpec(
            VectorFunction.AVERAGE_POOL,
            ratio=float(np.float32(x.scale)),
            divisor=float(np.float32(y.scale)),
            a_zero=x.zero_point,
            zero_point=y.zero_point,
            low=y.limits[0],
            high=y.limits[1],
            signed=x.signed,
            count_padding=operation.count_padding,
        )
    return lower_pool(builder, PoolTask(source, target, window, spec, amount.operations, amount.chunks))
