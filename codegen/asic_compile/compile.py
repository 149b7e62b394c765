"""Compiles a quantized network: the price list's plan, layer by layer, into one program.

The plan says which layers run one after another with the maps between them on chip, which sums are made on the way
out, and what the vector unit and the host run; the program carries out exactly that, in an order in which all operands
are there, so that program and price list stand for one schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from accel_sim.engine.layout import byte_offsets, pack_map
from accel_sim.pricing.price_list import LayerPrice
from accel_sim.program.isa import HostCall, Marker, Output, Program, Sum, Tensor
from accel_sim.spec import MachineSpec
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.host_layer import host_model
from codegen.asic_compile.layer import WORD_BYTES, LayerTask, lower_layer
from codegen.asic_compile.places import Place, rows_shape, whole_map
from codegen.asic_compile.transfers import WholeMap
from codegen.asic_compile.vector_operations import lower_move, lower_vector, vector_reason
from codegen.asic_compile.works import op_works, stage_work
from codegen.asic_latency import AsicLatency, LayerRow, NetworkPlan
from codegen.asic_network import Role
from codegen.quantized.graph import (
    QConv,
    QHost,
    QOperation,
    QPool,
    QReshape,
    QSum,
    QTable,
    QuantizedGraph,
)
from codegen.quantized.operands import reads, writes
from passes.core.cost import OpWork
from passes.errors import UnsupportedError


@dataclass(frozen=True)
class CompiledRow:
    """One operation of the network: what the price list says of it, and how the program carries it out.

    ``marker``: the layer of the program that it is part of; -1 for what takes no instruction. ``reason``: why the host
    runs it.
    """

    name: str
    op: str
    price: LayerRow
    marker: int
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A program, one row per operation of the network, and the DRAM bytes that the maps on chip save.

    ``layout_changes``: moves that the network does not have, by the name of the tensor.
    """

    program: Program
    rows: tuple[CompiledRow, ...]
    plan: NetworkPlan
    saved_bytes: int
    layout_changes: tuple[str, ...]

    @property
    def predicted_cycles(self) -> int:
        """Cycles of all layers by the price list, without the host's."""
        return sum(max(marker.predicted_cycles, 0) for marker in self.program.markers)

    @property
    def host_rows(self) -> tuple[CompiledRow, ...]:
        return tuple(row for row in self.rows if row.reason)


@dataclass(frozen=True)
class _Unit:
    """Operations that run together: a chain with what is applied on its way out, or a single operation."""

    operations: tuple[int, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]


@dataclass(frozen=True)
class _WayOut:
    """What is applied to a stage's result: operations, the tensor that leaves, the residual."""

    operations: tuple[int, ...]
    tensor: str
    table: bytes | None
    sum: QSum | None
    own: str
    sum_table: bytes | None

    @property
    def residual(self) -> str | None:
        if self.sum is None:
            return None
        return self.sum.b if self.sum.a == self.own else self.sum.a


def compile_graph(graph: QuantizedGraph, spec: MachineSpec, prices: AsicLatency) -> Compiled:
    """The program of ``graph`` on ``spec``, whose price list is ``prices``.

    Raises UnsupportedError for a machine of other widths than 8-bit data and 32-bit accumulators, for networks in which
    parts of the host exchange what is no tensor of bytes, and where no tiling fits.
    """
    widths = spec.datatypes
    if widths.data_bits != 8 or widths.accumulator_bytes != WORD_BYTES:
        raise UnsupportedError(f"{spec.name}: programs are made for 8-bit data and 32-bit accumulators")
    if spec.row_stationary is not None:
        raise UnsupportedError(f"{spec.name} is row-stationary: programs are made for systolic arrays")
    if graph.host_tensors:
        raise UnsupportedError(f"{next(iter(graph.host_tensors))} is no tensor of bytes: the host alone can use it")
    return _Compiler(graph, spec, prices).run()


class _Compiler:
    def __init__(self, graph: QuantizedGraph, spec: MachineSpec, prices: AsicLatency) -> None:
        self.graph = graph
        self.spec = spec
        self.builder = Builder(spec)
        self.columns = self.builder.columns
        self.works: list[OpWork] = op_works(graph)
        self.reasons = {i: reason for i, op in enumerate(graph.operations) if (reason := self._host_reason(op))}
        self.plan = prices.plan(self.works, self.reasons.keys(), vector_epilogues=False)
        self.ways_out = {i: self._way_out(i) for i in self.plan.stages}
        self.places: dict[str, Place] = {}
        self.markers = [-1] * len(graph.operations)
        self.layout_changes: list[str] = []
        self._copies: dict[str, tuple[Place, WholeMap]] = {}

    def run(self) -> Compiled:
        units = self._ordered(self._units())
        self._place_tensors(units)
        for unit in units:
            self._lower(unit)
        rows = tuple(
            CompiledRow(op.name, op.op, row, marker, self.reasons.get(i, ""))
            for i, (op, row, marker) in enumerate(
                zip(self.graph.operations, self.plan.rows, self.markers, strict=False)
            )
        )
        saved = sum(price.layerwise_dram_bytes - price.dram_bytes for price in self.plan.chain_prices if price.fused)
        return Compiled(self.builder.program(), rows, self.plan, saved, tuple(self.layout_changes))

    # The plan.

    def _host_reason(self, operation: QOperation) -> str:
        """Why the host runs an operation; empty where the machine does."""
        if isinstance(operation, QHost):
            return operation.reason
        if isinstance(operation, QConv):
            if operation.geometry.transposed:
                return "a transposed convolution has no instruction"
            if operation.geometry.ndim > 3:
                return f"a convolution of {operation.geometry.ndim} axes"
            return ""
        return vector_reason(self.graph, operation)

    def _way_out(self, stage: int) -> _WayOut:
        """Follows a stage's result through the tables and the sum that the plan applies on its way out."""
        operation = self.graph.operations[stage]
        assert isinstance(operation, QConv)
        add = self.plan.sums.get(stage)
        tensor = own = operation.output
        done: list[int] = []
        tables: list[bytes | None] = [None, None]
        sum_: QSum | None = None
        following = {name: i for i, op in enumerate(self.graph.operations) for name in reads(op)}
        while tensor in following:
            i = following[tensor]
            op = self.graph.operations[i]
            if i == add:
                assert isinstance(op, QSum)
                sum_, own = op, tensor
            elif self.plan.roles[i] is Role.EPILOGUE and isinstance(op, QTable):
                at = 0 if sum_ is None else 1
                before = tables[at]
                tables[at] = op.table if before is None else bytes(op.table[byte] for byte in before)
            else:
                break
            done.append(i)
            tensor = writes(op)[0]
        return _WayOut(tuple(done), tensor, tables[0], sum_, own, tables[1])

    def _units(self) -> list[_Unit]:
        units = []
        taken: set[int] = set()
        for chain in self.plan.chains:
            operations: list[int] = []
            for stage in chain:
                operations += [stage, *self.ways_out[stage].operations]
            units.append(self._unit(operations))
            taken.update(operations)
        units += [self._unit([i]) for i in range(len(self.graph.operations)) if i not in taken]
        return sorted(units, key=lambda unit: unit.operations[0])

    def _unit(self, operations: Sequence[int]) -> _Unit:
        made = {name for i in operations for name in writes(self.graph.operations[i])}
        read = {name for i in operations for name in reads(self.graph.operations[i])}
        return _Unit(tuple(operations), frozenset(read - made), frozenset(made))

    def _ordered(self, units: list[_Unit]) -> list[_Unit]:
        """Units in an order in which their inputs are there, as near to the network's as that allows."""
        known = {*self.graph.inputs, *self.graph.constants}
        ordered = []
        waiting = list(units)
        while waiting:
            ready = next((unit for unit in waiting if unit.inputs <= known), None)
            assert ready is not None, "the operations of a network depend on each other in a circle"
            waiting.remove(ready)
            ordered.append(ready)
            known |= ready.outputs
        return ordered

    # Places.

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape whose map a tensor is stored as: a matrix with leading axes as rows, if a linear layer uses it."""
        shape = self.graph.tensors[name].shape
        linear = any(
            isinstance(op, QConv) and op.geometry.ndim == 0 and name in (op.input, op.output)
            for op in self.graph.operations
        )
        return rows_shape(shape) if linear and len(shape) != 2 else shape

    def _place_tensors(self, units: list[_Unit]) -> None:
        on_chip = {self.ways_out[i].tensor for i, price in self.plan.stages.items() if price.output_on_chip}
        inner = set()
        for i, way in self.ways_out.items():
            operation = self.graph.operations[i]
            made = [operation, *(self.graph.operations[j] for j in way.operations)]
            inner |= {name for op in made for name in writes(op)} - {way.tensor}
        reshaped = {op.output for op in self.graph.operations if isinstance(op, QReshape)}
        made = [name for unit in units for name in sorted(unit.outputs)]
        for name in [*self.graph.inputs, *made]:
            if name in on_chip or name in inner or name in reshaped or name in self.places:
                continue
            shape = self._stored_shape(name)
            room = whole_map(0, shape)
            address = self.builder.place(room.images, room.channels, room.size).address
            offsets = byte_offsets(shape, self.columns).reshape(self.graph.tensors[name].shape)
            self.places[name] = Place(address, offsets)
        for op in self.graph.operations:  # in an order in which they can run
            if isinstance(op, QReshape) and op.input not in self.graph.constants:
                self.places[op.output] = self.places[op.input].reshaped(self.graph.tensors[op.output].shape)
        # Room for what is not laid out as its readers want it.
        for i, op in enumerate(self.graph.operations):
            for name in self._wanted_as_maps(i, op):
                self._reserve_copy(name, self._stored_shape(name))
        for name in self.graph.outputs:
            self._reserve_copy(name, self._stored_shape(name))
        for name, values in self.graph.constants.items():
            if name in self.graph.tensors and name not in self.places:
                shape = self._stored_shape(name)
                self.builder.separate_constants()
                data = pack_map(np.asarray(values).reshape(1, *shape), shape, self.columns).tobytes()
                offsets = byte_offsets(shape, self.columns).reshape(self.graph.tensors[name].shape)
                self.places[name] = Place(self.builder.constant(data), offsets)
        for op in self.graph.operations:
            if isinstance(op, QReshape) and op.output not in self.places:
                self.places[op.output] = self.places[op.input].reshaped(self.graph.tensors[op.output].shape)
        named = set()
        for role, names in (("input", self.graph.inputs), ("output", self.graph.outputs)):
            for name in names:
                if name not in named:
                    self._name_tensor(name, role)
                    named.add(name)

    def _wanted_as_maps(self, index: int, op: QOperation) -> tuple[str, ...]:
        """Tensors that ``op`` reads, in DRAM, in the layout of maps and no other."""
        if index in self.reasons:
            return reads(op)
        if isinstance(op, QConv):
            way = self.ways_out[index]
            names = [op.input] if op.geometry.ndim else []
            names += [] if way.residual is None else [way.residual]
            return tuple(names)
        return (op.input,) if isinstance(op, QPool) else ()

    def _reserve_copy(self, name: str, shape: tuple[int, ...]) -> None:
        if name in self.graph.constants or name not in self.places or name in self._copies:
            return
        if not self.places[name].is_map(shape, self.columns):
            room = whole_map(0, shape)
            place = self.builder.place(room.images, room.channels, room.size)
            offsets = byte_offsets(shape, self.columns).reshape(self.graph.tensors[name].shape)
            self._copies[name] = Place(place.address, offsets), place

    def _name_tensor(self, name: str, role: str) -> None:
        tensor = self.graph.tensors[name]
        place = self._copies[name][0] if name in self._copies else self.places[name]
        self.builder.tensors.append(
            Tensor(
                name,
                self._stored_shape(name),
                place.address,
                float(np.float32(tensor.scale)),
                tensor.zero_point,
                tensor.signed,
                role,
            )
        )

    def _map(self, name: str, shape: tuple[int, ...] | None = None) -> WholeMap:
        """A tensor in DRAM as a map; of its copy, where it does not lie as one."""
        shape = self._stored_shape(name) if shape is None else shape
        place = self.places[name]
        if name in self._copies:
            place = self._copies[name][0]
        return whole_map(place.address, shape)

    def _finish(self, name: str) -> None:
        """Makes the copies of a tensor, once it is there, and of those that are the same bytes."""
        for copied, (place, _) in self._copies.items():
            if copied not in self.layout_changes and self.places[copied].address == self.places[name].address:
                self.layout_changes.append(copied)
                self.builder.begin(Marker(f"layout of {copied}", "layout"))
                lower_move(self.builder, self.places[copied], place)

    # Lowering.

    def _lower(self, unit: _Unit) -> None:
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
            lower_vector(self.builder, self.graph, operation, self.places, self._map, self._chunks(first))
        for name in sorted(unit.outputs & self.places.keys()):
            self._finish(name)

    def _chunks(self, index: int) -> int:
        return max(self.plan.rows[index].chunks, 1)

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
                if number % 2:
                    target = whole_map(0, shape)
                    begin = next_begin = target.bytes
                else:
                    size = whole_map(0, shape).bytes
                    target = whole_map(room - size, shape)
                    end = next_end = room - size
            else:
                target = whole_map(self.places[way.tensor].address, self._stored_shape(way.tensor))
            self._begin([stage, *way.operations])
            lower_layer(self.builder, self._task(operation, price, way, source, target, weight, (begin, end)))
            source, begin, end = target, next_begin, next_end

    def _input(
        self, operation: QConv, weight: np.ndarray[tuple[int, ...], np.dtype[np.int8]]
    ) -> tuple[WholeMap, np.ndarray[tuple[int, ...], np.dtype[np.int8]]]:
        """The input in DRAM; of a linear layer as rows, its weights in the order of the features' bytes."""
        if operation.geometry.ndim:
            return self._map(operation.input), weight
        shape = rows_shape(self.graph.tensors[operation.input].shape)
        place = self.places[operation.input]
        offsets = place.offsets.reshape(shape)
        order = offsets[0] - offsets[0].min()
        wanted = np.arange(shape[0])[:, None] * shape[1] + order
        if np.array_equal(wanted, offsets) and np.array_equal(np.sort(order), np.arange(shape[1])):
            permuted = np.empty_like(weight)
            permuted[:, order] = weight
            return whole_map(place.address, shape), permuted
        return self._map(operation.input, shape), weight

    def _task(
        self,
        operation: QConv,
        price: LayerPrice,
        way: _WayOut,
        source: WholeMap,
        target: WholeMap,
        weight: np.ndarray[tuple[int, ...], np.dtype[np.int8]],
        free: tuple[int, int],
    ) -> LayerTask:
        x = self.graph.tensors[operation.input]
        g = operation.geometry
        bias = None
        if price.layer.bias:
            sums = operation.weight.reshape(len(operation.weight), -1).sum(axis=1, dtype=np.int64)
            own = 0 if operation.bias is None else operation.bias.astype(np.int64)
            bias = (own - x.zero_point * sums).astype(np.int32)
        residual = None
        if way.residual is not None:
            residual = self._map(way.residual, self._stored_shape(way.residual))
        before = 3 - g.ndim
        return LayerTask(
            price=price,
            weight=weight,
            bias=bias,
            kernel=_three(g.kernel, before),
            dilations=_three(g.dilations, before),
            pad_value=x.zero_point,
            signed=x.signed,
            input=source,
            output=target,
            residual=residual,
            output_entry=self.builder.outputs.number(self._output(operation, way)),
            input_begin=free[0],
            input_end=free[1],
        )

    def _output(self, operation: QConv, way: _WayOut) -> Output:
        tensors = self.graph.tensors
        y = tensors[operation.output]
        total = -1
        if way.sum is not None and way.residual is not None:
            own_first = way.sum.a == way.own
            own, other = tensors[way.own], tensors[way.residual]
            ratios = (way.sum.a_ratio, way.sum.b_ratio) if own_first else (way.sum.b_ratio, way.sum.a_ratio)
            total = self.builder.sums.number(
                Sum(
                    *(float(np.float32(ratio)) for ratio in (*ratios, way.sum.offset)),
                    low=way.sum.low,
                    high=way.sum.high,
                    own_first=own_first,
                    own_signed=own.signed,
                    other_signed=other.signed,
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
            if all(tensor.name != name for tensor in self.builder.tensors):
                self._name_tensor(name, "internal")
        self.builder.call(HostCall(operation.name, self.reasons[index], inputs, outputs, model))


def _three(values: Sequence[int], before: int) -> tuple[int, int, int]:
    a, b, c = (*(1,) * before, *values)
    return a, b, c
