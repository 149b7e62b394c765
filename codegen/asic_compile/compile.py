"""Compiles a quantized network: the price list's plan, layer by layer, into one program.

The plan says which layers run one after another with the maps between them on chip, which sums are made on the way
out, and what the vector unit and the host run; the program carries out exactly that, in an order in which all operands
are there, so that program and price list stand for one schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.isa import HostCall, Marker, Output, Program, Sum
from accel_sim.spec import MachineSpec
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.host_layer import host_model
from codegen.asic_compile.layer import WORD_BYTES, LayerTask, lower_layer
from codegen.asic_compile.places import rows_shape, whole_map
from codegen.asic_compile.tensors import TensorPlaces
from codegen.asic_compile.transfers import WholeMap
from codegen.asic_compile.units import Unit, WayOut, units, way_out
from codegen.asic_compile.vector_operations import VectorAmount, lower_move, lower_vector, vector_reason
from codegen.asic_compile.works import op_works, stage_work
from codegen.asic_latency import AsicLatency, LayerRow, NetworkPlan
from codegen.asic_ops import vector_operations
from codegen.quantized.graph import QConv, QHost, QOperation, QPool, QReshape, QuantizedGraph
from codegen.quantized.operands import reads, writes
from passes.core.cost import Cost, Kind
from passes.errors import UnsupportedError


@dataclass(frozen=True)
class CompiledRow:
    """One operation of the network: what the price list says of it, and how the program carries it out.

    ``marker``: the layer of the program that it is part of; -1 for what takes no instruction, and for what the host
    runs behind the program. ``reason``: why the host runs it.
    """

    name: str
    op: str
    price: LayerRow
    marker: int
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A program and what it is made from.

    ``rows``: one per operation of ``graph``. ``saved_bytes``: DRAM bytes that maps on chip save, by the price list.
    ``layout_changes``: tensors that are copied into another order of bytes. ``tail``: what the host runs behind the
    program, since it gives floats that are no tensor of bytes.
    """

    graph: QuantizedGraph
    program: Program
    rows: tuple[CompiledRow, ...]
    plan: NetworkPlan
    saved_bytes: int
    layout_changes: tuple[str, ...]
    tail: tuple[QHost, ...]

    @property
    def predicted_cycles(self) -> int:
        """Cycles of all layers as their markers have them; the host's are not among them."""
        return sum(max(marker.predicted_cycles, 0) for marker in self.program.markers)

    @property
    def host_rows(self) -> tuple[CompiledRow, ...]:
        """What the machine cannot run, with the reasons; ``price`` holds an estimate of its cost."""
        return tuple(row for row in self.rows if row.reason)


def compile_graph(graph: QuantizedGraph, spec: MachineSpec, prices: AsicLatency) -> Compiled:
    """The program of ``graph`` on ``spec``, whose price list is ``prices``.

    Raises UnsupportedError for a machine of other widths than 8-bit data and 32-bit accumulators, or no systolic array;
    for networks whose host parts hand each other what is no tensor of bytes, unless they stand at the very end; and
    where no tiling fits.
    """
    check_machine(spec)
    return _Compiler(graph, spec, prices).run()


def check_machine(spec: MachineSpec) -> None:
    """UnsupportedError, with all reasons, for a machine that no program is made for; its prices hold all the same."""
    data, sums = spec.datatypes.data_bits, spec.datatypes.accumulator_bits
    others = [
        text
        for other, text in (
            (spec.row_stationary is not None, "its array is row-stationary"),
            (data != 8, f"its data have {data} bits"),
            (sums != 8 * WORD_BYTES, f"its accumulators have {sums} bits"),
        )
        if other
    ]
    if others:
        raise UnsupportedError(
            f"{spec.name} has prices and no programs: {', '.join(others)}; programs are made for systolic arrays with "
            "8-bit data and 32-bit accumulators"
        )


def _tail(graph: QuantizedGraph) -> tuple[set[int], tuple[str, ...]]:
    """Operations that the host runs behind the program, and the byte tensors that it needs."""
    for name in graph.inputs:
        if name in graph.host_tensors:
            raise UnsupportedError(f"the input {name} is no tensor of bytes")
    tail: set[int] = set()
    late = set(graph.host_tensors)
    for i, op in enumerate(graph.operations):
        if late.intersection(reads(op)) or late.intersection(writes(op)):
            if not isinstance(op, QHost):
                raise UnsupportedError(f"{op.name} follows {next(iter(late))}, which is no tensor of bytes")
            tail.add(i)
            late.update(writes(op))
    needed = [name for i in sorted(tail) for name in reads(graph.operations[i]) if name not in late]
    return tail, tuple(dict.fromkeys(needed))


class _Compiler:
    def __init__(self, graph: QuantizedGraph, spec: MachineSpec, prices: AsicLatency) -> None:
        tail, needed = _tail(graph)
        outputs = [name for name in graph.outputs if name in graph.tensors]
        made_late = {name for i in tail for name in writes(graph.operations[i])}
        self.whole = graph
        self.tail = tuple(op for i, op in enumerate(graph.operations) if i in tail and isinstance(op, QHost))
        self.graph = graph = replace(
            graph,
            operations=tuple(op for i, op in enumerate(graph.operations) if i not in tail),
            outputs=tuple(dict.fromkeys(name for name in (*outputs, *needed) if name not in made_late)),
            host_tensors={},
        )
        self.spec = spec
        self.builder = Builder(spec)
        self.works = op_works(graph)
        self.reasons = {i: reason for i, op in enumerate(graph.operations) if (reason := _host_reason(graph, op))}
        self.plan = prices.plan(self.works, self.reasons.keys(), vector_epilogues=False)
        self.ways_out = {i: way_out(graph, self.plan, i) for i in self.plan.stages}
        self.places = TensorPlaces(graph, self.builder)
        self.markers = [-1] * len(graph.operations)
        self.layout_changes: list[str] = []

    def run(self) -> Compiled:
        graph = self.graph
        found = units(graph, self.plan, self.ways_out)
        on_chip = {self.ways_out[i].tensor for i, price in self.plan.stages.items() if price.output_on_chip}
        made = [name for unit in found for i in unit.operations for name in writes(graph.operations[i])]
        inner = [name for i, way in self.ways_out.items() for name in self._passed(i) if name != way.tensor]
        self.places.place_all(made, {*on_chip, *inner}, self._read_as_maps)
        for role, names in (("input", graph.inputs), ("output", graph.outputs)):
            for name in names:
                self.places.announce(name, role)
        for name in graph.inputs:
            self._copy(name)
        for unit in found:
            self._lower(unit)
        rows = [
            CompiledRow(op.name, op.op, row, marker, self.reasons.get(i, ""))
            for i, (op, row, marker) in enumerate(zip(graph.operations, self.plan.rows, self.markers, strict=False))
        ]
        for op in self.tail:
            rows.append(CompiledRow(op.name, op.op, LayerRow(op.name, op.op, "host", _no_cost()), -1, op.reason))
        saved = sum(price.layerwise_dram_bytes - price.dram_bytes for price in self.plan.chain_prices if price.fused)
        program = self.builder.program()
        return Compiled(self.whole, program, tuple(rows), self.plan, saved, tuple(self.layout_changes), self.tail)

    def _passed(self, stage: int) -> list[str]:
        """Tensors that a layer's result is on its way out."""
        members = [stage, *self.ways_out[stage].operations]
        return [name for i in members for name in writes(self.graph.operations[i])]

    def _read_as_maps(self) -> list[str]:
        """Tensors that are read in the layout of maps and no other."""
        found = list(self.graph.outputs)
        for i, op in enumerate(self.graph.operations):
            if i in self.reasons:
                found += reads(op)
            elif isinstance(op, QConv):
                residual = self.ways_out[i].residual
                found += [] if residual is None else [residual]
                found += [] if op.geometry.ndim == 0 and self._feature_order(op) is not None else [op.input]
            elif isinstance(op, QPool):
                found.append(op.input)
        return found

    def _copy(self, name: str) -> None:
        """Makes the copies of a tensor that has just been written, its reshaped views' among them."""
        for copied, target in self.places.copies.items():
            source = self.places[copied]
            if source.address == self.places[name].address and copied not in self.layout_changes:
                self.layout_changes.append(copied)
                self.builder.begin(Marker(f"layout of {copied}", "layout"))
                self.builder.predict(lower_move(self.builder, source, target))

    def _lower(self, unit: Unit) -> None:
        first = unit.operations[0]
        operation = self.graph.operations[first]
        if isinstance(operation, QReshape):
            return
        if first in self.reasons:
            self._lower_host(first)
        elif isinstance(operation, QConv):
            self._lower_chain([i for i in unit.operations if i in self.plan.stages])
        else:
            self._begin([first])
            amount = VectorAmount(vector_operations(self.works[first]) or 0, max(self.plan.rows[first].chunks, 1))
            self.builder.predict(lower_vector(self.builder, self.graph, operation, self.places, amount))
        for name in sorted(unit.outputs & self.places.keys()):
            self._copy(name)

    def _begin(self, operations: Sequence[int]) -> None:
        first = operations[0]
        row, operation = self.plan.rows[first], self.graph.operations[first]
        nodes = tuple(node for i in operations for node in self.graph.operations[i].nodes)
        predicted = -1 if first in self.reasons else row.cycles
        for i in operations:
            self.markers[i] = len(self.builder.markers)
        self.builder.begin(Marker(operation.name, operation.op, nodes, predicted, row.cost.macs))

    def _lower_chain(self, stages: Sequence[int]) -> None:
        pads = self.spec.scratchpads
        room = 1024 * (pads.input_kib + (pads.weight_kib if pads.shared_input_weight else 0))
        source: WholeMap | None = None
        begin, end = 0, room
        for number, stage in enumerate(stages):
            operation, price, way = self.graph.operations[stage], self.plan.stages[stage], self.ways_out[stage]
            assert isinstance(operation, QConv)
            weight = operation.weight.reshape(*operation.weight.shape[:2], -1)
            if source is None or not price.input_on_chip:
                begin, end = 0, room
                source, weight = self._input(operation, weight)
            # A map on chip lies at the one end of the scratchpad, the next one at the other.
            next_begin, next_end = 0, room
            if price.output_on_chip:
                work = stage_work(self.graph, operation)
                shape = (work.batch, work.out_channels, *work.output_spatial)
                size = whole_map(0, shape).bytes
                target = whole_map(0 if number % 2 else room - size, shape)
                if number % 2:
                    begin = next_begin = size
                else:
                    end = next_end = room - size
            else:
                target = whole_map(self.places[way.tensor].address, self.places.stored_shape(way.tensor))
            self._begin([stage, *way.operations])
            lower_layer(self.builder, self._task(stage, operation, source, target, weight, (begin, end)))
            source, begin, end = target, next_begin, next_end

    def _feature_order(self, operation: QConv) -> NDArray[np.int64] | None:
        """Where the features of a linear layer's input lie within a row; None where they do not lie row by row."""
        shape = rows_shape(self.graph.tensors[operation.input].shape)
        if operation.input not in self.places:
            return None
        offsets = self.places[operation.input].offsets.reshape(shape)
        rows = np.arange(shape[0])[:, None] * shape[1] + offsets[0]
        if np.array_equal(rows, offsets) and np.array_equal(np.sort(offsets[0]), np.arange(shape[1])):
            order: NDArray[np.int64] = offsets[0]
            return order
        return None

    def _input(self, operation: QConv, weight: NDArray[np.int8]) -> tuple[WholeMap, NDArray[np.int8]]:
        """The input in DRAM; a linear layer takes its weights in the order in which the features lie."""
        order = self._feature_order(operation) if operation.geometry.ndim == 0 else None
        if order is None:
            return self.places.as_map(operation.input), weight
        permuted = np.empty_like(weight)
        permuted[:, order] = weight
        shape = rows_shape(self.graph.tensors[operation.input].shape)
        return whole_map(self.places[operation.input].address, shape), permuted

    def _task(
        self,
        stage: int,
        operation: QConv,
        source: WholeMap,
        target: WholeMap,
        weight: NDArray[np.int8],
        free: tuple[int, int],
    ) -> LayerTask:
        price, way = self.plan.stages[stage], self.ways_out[stage]
        x, g = self.graph.tensors[operation.input], operation.geometry
        bias = None
        if price.layer.bias:
            sums = operation.weight.reshape(len(operation.weight), -1).sum(axis=1, dtype=np.int64)
            own = np.zeros_like(sums) if operation.bias is None else operation.bias.astype(np.int64)
            bias = (own - x.zero_point * sums).astype(np.int32)
        return LayerTask(
            price=price,
            weight=weight,
            bias=bias,
            kernel=_three(g.kernel),
            dilations=_three(g.dilations),
            pad_value=x.zero_point,
            signed=x.signed,
            input=source,
            output=target,
            residual=None if way.residual is None else self.places.as_map(way.residual),
            output_entry=self.builder.outputs.number(self._output(operation, way)),
            input_begin=free[0],
            input_end=free[1],
        )

    def _output(self, operation: QConv, way: WayOut) -> Output:
        tensors = self.graph.tensors
        y = tensors[operation.output]
        total = -1
        if way.sum is not None and way.residual is not None:
            own_first = way.sum.a == way.own
            ratios = np.array([way.sum.a_ratio, way.sum.b_ratio], np.float32)[:: 1 if own_first else -1]
            total = self.builder.sums.number(
                Sum(
                    own_ratio=float(ratios[0]),
                    other_ratio=float(ratios[1]),
                    offset=float(np.float32(way.sum.offset)),
                    low=way.sum.low,
                    high=way.sum.high,
                    own_first=own_first,
                    own_signed=tensors[way.own].signed,
                    other_signed=tensors[way.residual].signed,
                    signed=tensors[way.sum.output].signed,
                )
            )
        return Output(
            scales=self.builder.scales(operation.multipliers),
            per_channel=len(operation.multipliers) > 1,
            zero_point=y.zero_point,
            low=operation.low,
            high=operation.high,
            signed=y.signed,
            table=-1 if way.table is None else self.builder.tables.number(way.table),
            sum=total,
            sum_table=-1 if way.sum_table is None else self.builder.tables.number(way.sum_table),
        )

    def _lower_host(self, index: int) -> None:
        operation = self.graph.operations[index]
        self._begin([index])
        inputs, outputs, model = host_model(self.graph, operation)
        for name in (*inputs, *outputs):
            self.places.announce(name, "internal")
        self.builder.call(HostCall(operation.name, self.reasons[index], inputs, outputs, model))


def _host_reason(graph: QuantizedGraph, operation: QOperation) -> str:
    """Why the host runs an operation; empty where the machine does."""
    if isinstance(operation, QHost):
        return operation.reason
    if isinstance(operation, QConv):
        if operation.geometry.transposed:
            return "a transposed convolution has no instruction"
        return f"a convolution of {operation.geometry.ndim} axes" if operation.geometry.ndim > 3 else ""
    return vector_reason(graph, operation)


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (*(1,) * (3 - len(values)), *values)
    return a, b, c


def _no_cost() -> Cost:
    return Cost(kind=Kind.ESTIMATED)
