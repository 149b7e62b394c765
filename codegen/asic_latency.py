"""The accelerator's price list as the solver and the driver ask for it.

Prices are for the machine's own data width (int8 for the presets), whatever type the ONNX file computes in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.energy import vector_energy_pj
from accel_sim.pricing.layer import Layer, conv_layer, transposed_conv_layer
from accel_sim.pricing.price_list import ChainPrice, LayerPrice, NoTilingError, PriceList, join
from accel_sim.spec import DATAFLOWS, MachineSpec
from codegen.asic_network import Role, schedule
from codegen.asic_ops import elements, host_macs, vector_operations
from passes.core.cost import Cost, Kind, OpWork, StageWork, least_cost
from passes.errors import UnsupportedError

_ORDERS = ("positions first", "filters first")
_LEVELS = ("images", "planes", "rows", "columns")
_ROUNDING = 1e-12
"""Sums of energies differ by less, relatively, with the order in which they are made."""
_BUSY = 0.8
"""A unit that is busy for this share of the time is called the bound."""


@dataclass(frozen=True)
class LayerRow:
    """One operator of a network on the machine.

    ``unit``: array, vector, host, "on the way out" (applied while a result leaves the array) or free. ``bound`` says
    what the time of an operator on the array or the vector unit goes to: "compute", "dram", or "fill" where neither
    is busy for 80 % of the time. ``on_chip``: its input, output, or both never leave the chip. ``residual``: the
    addition that it carries out, or an empty string. ``chunks``: into how many pieces the vector unit's work is cut.
    """

    name: str
    op: str
    unit: str
    cost: Cost
    cycles: int = 0
    utilisation: float = 0.0
    dataflow: str = ""
    tiling: str = ""
    bound: str = ""
    on_chip: str = ""
    residual: str = ""
    chunks: int = 0

    @property
    def dram_bytes(self) -> int:
        return self.cost.dram_bytes


@dataclass(frozen=True, eq=False)
class NetworkPlan:
    """How a network runs, decided by its prices: what the report shows and what the compiler carries out.

    All by the operators' places. ``roles``: see :class:`Role`; an addition that the vector unit makes after all is
    VECTOR. ``chains``: stages that follow each other directly. ``stages``: the price of each stage, with its tiling and
    the maps that stay on chip. ``sums``: by stage, the addition that it carries out on the way out. ``rows``: one per
    operator.
    """

    roles: tuple[Role, ...]
    chains: tuple[tuple[int, ...], ...]
    stages: dict[int, LayerPrice]
    sums: dict[int, int]
    rows: tuple[LayerRow, ...]
    chain_prices: tuple[ChainPrice, ...]


class AsicLatency:
    """:class:`passes.core.cost.LatencyModel` of a machine described by ``spec``; latency in cycles of its clock.

    ``weight_file_bytes`` is what one weight takes in the ONNX file; chains, unlike nodes, do not carry it.
    ``maps_on_chip`` False keeps no map between two stages on chip.
    """

    unit = "cycles"
    margin = 0.0
    granularity = 1

    def __init__(self, spec: MachineSpec, weight_file_bytes: int = 4, maps_on_chip: bool = True) -> None:
        self.spec = spec
        self._weight_file_bytes = weight_file_bytes
        self._prices = PriceList(spec, maps_on_chip)
        self._layers: dict[StageWork, Layer] = {}
        self._costs: dict[tuple[StageWork, ...], Cost] = {}

    def chains(self, works: Sequence[tuple[StageWork, ...]]) -> list[Cost]:
        """Cost of each chain, with the maps between its stages kept on chip where that fits and pays.

        Raises UnsupportedError for a stage that no tiling brings into the machine's memories.
        """
        new = [work for work in dict.fromkeys(works) if work not in self._costs]
        for work, price in zip(new, self.chain_prices(new), strict=True):
            params = sum(stage.weights + (stage.out_channels if stage.bias else 0) for stage in work)
            cost = sum((self._array_cost(p) for p in price.stages), Cost(kind=Kind.SIMULATED))
            self._costs[work] = cost.with_weights(params, params * self._weight_file_bytes)
        return [self._costs[work] for work in works]

    def chain_prices(self, works: Sequence[tuple[StageWork, ...]], residuals: Sequence[bool] = ()) -> list[ChainPrice]:
        """The prices behind :meth:`chains`: tilings per stage, what stays on chip, the cost layer by layer.

        ``residuals``: whether the last stage of each work adds a map from DRAM to its result; by default none does.
        """
        flags = residuals or [False] * len(works)
        try:
            return self._prices.chains([self._chain(work, flag) for work, flag in zip(works, flags, strict=True)])
        except NoTilingError as error:
            raise UnsupportedError(str(error)) from error

    def network(self, ops: Sequence[OpWork]) -> Cost:
        """Cost of a whole network: the sum of its :meth:`layers`. Estimated as soon as the host runs any part of it."""
        return sum((row.cost for row in self.layers(ops)), Cost(kind=Kind.SIMULATED))

    def host_ops(self, ops: Sequence[OpWork]) -> tuple[str, ...]:
        """Names of the operators that the machine cannot run."""
        return tuple(row.name for row in self.layers(ops) if row.unit == "host")

    def layers(self, ops: Sequence[OpWork]) -> list[LayerRow]:
        """One row per operator, in the order of ``ops``."""
        return list(self.plan(ops).rows)

    def plan(self, ops: Sequence[OpWork], on_host: Collection[int] = (), vector_epilogues: bool = True) -> NetworkPlan:
        """The best way to run ``ops``; ``on_host`` and ``vector_epilogues`` as in :func:`schedule`."""
        plan = schedule(ops, self.spec.array.residual_on_drain, on_host, vector_epilogues)
        works = [tuple(stage for i in chain if (stage := ops[i].stage) is not None) for chain in plan.chains]
        adds = [plan.sums.get(chain[-1]) for chain in plan.chains]
        apart: dict[int, LayerRow] = {}
        on_array: dict[int, LayerPrice] = {}
        found = self._with_sums(works, [None if i is None else ops[i] for i in adds])
        for chain, add, (price, row) in zip(plan.chains, adds, found, strict=True):
            on_array |= dict(zip(chain, price.stages, strict=True))
            if add is not None and row is not None:
                apart[add] = row
        rows, roles, sums = [], list(plan.roles), {}
        for i, (op, role) in enumerate(zip(ops, plan.roles, strict=True)):
            if i in on_array:
                if on_array[i].layer.residual:
                    sums[i] = plan.sums[i]
                residual = ops[sums[i]].name if i in sums else ""
                row = replace(self._array_row(op, on_array[i]), residual=residual)
            elif i in apart:
                row = apart[i]
                roles[i] = Role.VECTOR
            else:
                row = self._other_row(op, role)
            rows.append(row)
        prices = tuple(price for price, _ in found)
        return NetworkPlan(tuple(roles), plan.chains, on_array, sums, tuple(rows), prices)

    def floor(self, ops: Sequence[OpWork], options: Mapping[str, Sequence[tuple[StageWork, ...]]]) -> Cost:
        """What no plan gets below, in latency, energy and DRAM bytes, each alone.

        Neighbours may be fused, so sites that follow each other directly are bounded together: a shortest path over
        the maps between them, each site at its least for either state of its maps. The latency is that of the fastest
        plan, for a network's latency is the least over the same choices. So are energy and bytes where no two sites
        are neighbours; elsewhere they are below, since a network takes what is fastest. Raises ValueError for options
        of what is no stage on the array, or that do not have the op's input and output maps.
        """
        plan = schedule(ops, self.spec.array.residual_on_drain)
        elsewhere = {i for chain in plan.chains for i in chain} | set(plan.sums.values())
        total = Cost(kind=Kind.SIMULATED)
        for i, (op, role) in enumerate(zip(ops, plan.roles, strict=True)):
            if i not in elsewhere:
                if op.name in options:
                    raise ValueError(f"{op.name} has options, but is no stage on the array")
                total += least_cost([self._other_row(op, role).cost])
        for chain in plan.chains:
            places = [_options(ops[i], options) for i in chain]
            add = ops[plan.sums[chain[-1]]] if chain[-1] in plan.sums else None
            if len(places) > 1:
                total += self._joined_floor(places, add)
                continue
            found = self._with_sums(places[0], [add] * len(places[0]))
            total += least_cost([self._sum_cost(price, row) for price, row in found])
        return replace(total, energy_pj=total.energy_pj * (1 - _ROUNDING))

    def _joined_floor(self, places: Sequence[Sequence[tuple[StageWork, ...]]], add: OpWork | None) -> Cost:
        """The floor of sites that follow each other directly, with the addition that the last one meets."""
        ends = len(places) - 1

        def table(at: int, residual: bool) -> NDArray[np.float64]:
            chains = [self._chain(work, residual) for work in places[at]]
            least: NDArray[np.float64] = np.min(self._prices.least(chains, at > 0, at < ends), axis=0)
            return least

        before = reduce(join, [table(at, False) for at in range(ends)])
        least = join(before, table(ends, False))[0, 0]
        if add is not None:
            cost = self._vector_row(add).cost
            apart = least + np.array([cost.latency, cost.energy_pj, cost.dram_bytes])
            least = np.minimum(join(before, table(ends, True))[0, 0], apart)
        if not np.isfinite(least).all():
            raise UnsupportedError(f"no tiling of {places[0][0][0]} and what follows fits the memories")
        cycles, energy_pj, dram_bytes = least.tolist()
        return Cost(latency=cycles, energy_pj=energy_pj, dram_bytes=round(dram_bytes), kind=Kind.SIMULATED)

    def _with_sums(
        self, works: Sequence[tuple[StageWork, ...]], adds: Sequence[OpWork | None]
    ) -> list[tuple[ChainPrice, LayerRow | None]]:
        """Each chain's price, with the addition that its last stage meets; a row where the vector unit adds instead."""
        taking = [i for i, add in enumerate(adds) if add is not None]
        taken = dict(zip(taking, self.chain_prices([works[i] for i in taking], [True] * len(taking)), strict=True))
        found: list[tuple[ChainPrice, LayerRow | None]] = []
        for i, (price, add) in enumerate(zip(self.chain_prices(works), adds, strict=True)):
            if add is None:
                found.append((price, None))
                continue
            row = self._vector_row(add)
            # With bursts cut into small pieces, a pass of its own is cheaper.
            found.append((price, row) if price.cycles + row.cycles < taken[i].cycles else (taken[i], None))
        return found

    def _sum_cost(self, price: ChainPrice, row: LayerRow | None) -> Cost:
        stages = sum((self._array_cost(stage) for stage in price.stages), Cost(kind=Kind.SIMULATED))
        return stages if row is None else stages + row.cost

    def _chain(self, work: tuple[StageWork, ...], residual: bool) -> tuple[Layer, ...]:
        layers = tuple(self._layer(stage) for stage in work)
        return (*layers[:-1], replace(layers[-1], residual=True)) if residual else layers

    def _other_row(self, op: OpWork, role: Role) -> LayerRow:
        """The row of an operator that is no stage of a chain."""
        if role is Role.MATMUL:
            return self._matmul_row(op)
        if role is Role.VECTOR:
            return self._vector_row(op)
        if role is Role.HOST:
            return self._host_row(op)
        return LayerRow(op.name, op.op, role.value, _cost_of(op, Cost(kind=Kind.SIMULATED)))

    def _layer(self, work: StageWork) -> Layer:
        """The layer of a stage. It always has a bias: that is where an int8 input's zero point goes."""
        if work not in self._layers:
            g = work.geometry
            channels = work.in_channels, work.out_channels
            walk: Any = (g.kernel, g.strides, g.dilations, g.pads, g.groups, work.batch, True)
            try:
                if g.transposed:
                    layer = transposed_conv_layer(*channels, work.spatial, work.output_spatial, *walk)
                else:
                    layer = conv_layer(*channels, work.spatial, *walk)
            except ValueError as error:
                raise UnsupportedError(f"{self.spec.name} cannot run {work}: {error}") from error
            self._layers[work] = layer
        return self._layers[work]

    def _array_cost(self, price: LayerPrice) -> Cost:
        return Cost(
            latency=float(price.cycles),
            energy_pj=price.energy_pj,
            dram_bytes=price.dram_bytes,
            macs=price.layer.macs,
            kind=Kind.SIMULATED,
        )

    def _array_row(self, op: OpWork, price: LayerPrice) -> LayerRow:
        record = price.record
        size, level = int(record["tile_size"]), _LEVELS[int(record["level"])]
        tiling = f"{size} {level} x {record['tile_filters']} filters x {record['tile_channels']} channels"
        if record["pack"] > 1:
            tiling += f", {record['pack']} groups at once"
        stays = [name for name, kept in (("input", price.input_on_chip), ("output", price.output_on_chip)) if kept]
        busy = int(record["array_cycles"]), int(record["channel_cycles"])
        return LayerRow(
            *(op.name, op.op, "array", _cost_of(op, self._array_cost(price)), price.cycles),
            utilisation=price.layer.macs / (price.cycles * self.spec.peak_macs_per_cycle),
            dataflow=DATAFLOWS[int(record["dataflow"])],
            tiling=f"{tiling}, {_ORDERS[int(record['order'])]}",
            bound=_bound(price.cycles, *busy),
            on_chip=" and ".join(stays),
        )

    def _matmul_row(self, op: OpWork) -> LayerRow:
        """A product of two activations: heads are groups, rows are positions, the second operand stands for weights."""
        (*heads, m, n), k = op.output_shapes[0], op.input_shapes[0][-1]
        count = prod(heads)
        layer = conv_layer(count * k, count * n, (m,), (1,), groups=count, bias=False)
        try:
            return self._array_row(op, self._prices.layers([layer])[0])
        except NoTilingError as error:
            raise UnsupportedError(f"{op.name}: {error}") from error

    def _vector_row(self, op: OpWork) -> LayerRow:
        operations = vector_operations(op)
        assert operations is not None, op.op
        width = self.spec.datatypes.data_bytes
        read = op.input_shapes
        # Two operands that are streamed side by side; all others lie, or are taken as lying, in one piece.
        second = elements(read[1:]) if len(read) == 2 and read[0] == read[1] else 0
        first = elements(read) - second + op.weight_params
        work = first * width, second * width, elements(op.output_shapes) * width, operations
        try:
            price = self._prices.vectors([work])[0]
        except NoTilingError as error:
            raise UnsupportedError(f"{op.name}: {error}") from error
        cost = Cost(
            latency=float(price.cycles),
            energy_pj=vector_energy_pj(self.spec, price.cycles, price.dram_bytes, operations),
            dram_bytes=price.dram_bytes,
            kind=Kind.SIMULATED,
        )
        compute = operations // self.spec.vector.lanes
        transfers = int(price.dram_bytes / self.spec.dram.bytes_per_cycle)
        return LayerRow(
            *(op.name, op.op, "vector", _cost_of(op, cost), price.cycles),
            utilisation=compute / max(price.cycles, 1),
            tiling=f"{price.chunks} chunks",
            bound=_bound(price.cycles, compute, transfers),
            chunks=price.chunks,
        )

    def _host_row(self, op: OpWork) -> LayerRow:
        host = self.spec.host
        touched = elements(op.input_shapes) + elements(op.output_shapes)
        macs = host_macs(op)
        cycles = host.call_cycles + round(macs * host.mac_cycles + touched * host.element_cycles)
        moved = (touched + op.weight_params) * self.spec.datatypes.data_bytes
        cost = Cost(latency=float(cycles), dram_bytes=moved, macs=macs, kind=Kind.ESTIMATED)
        return LayerRow(op.name, op.op, "host", _cost_of(op, cost), cycles)


def _cost_of(op: OpWork, cost: Cost) -> Cost:
    return cost.with_weights(op.weight_params, op.weight_bytes)


def _options(op: OpWork, options: Mapping[str, Sequence[tuple[StageWork, ...]]]) -> Sequence[tuple[StageWork, ...]]:
    """What may stand in the place of a stage."""
    stage = op.stage
    assert stage is not None
    works = options.get(op.name, [(stage,)])
    if not works:
        raise ValueError(f"{op.name} has no option")
    for work in works:
        if _ends(work) != _ends((stage,)):
            raise ValueError(f"{op.name}: {work} does not have the input and output maps of {stage}")
    return works


def _ends(work: tuple[StageWork, ...]) -> tuple[object, ...]:
    """The maps before and after a chain, and whether they have axes: all that its neighbours see of it."""
    first, last = work[0], work[-1]
    before = (first.batch, first.in_channels, first.spatial, first.geometry.ndim > 0)
    after = (last.batch, last.out_channels, last.geometry.ndim > 0)
    return (*before, *after, last.output_spatial if last.geometry.ndim else ())


def _bound(cycles: int, compute_cycles: int, channel_cycles: int) -> str:
    busiest = max(compute_cycles, channel_cycles)
    if busiest < _BUSY * cycles:
        return "fill"
    return "compute" if compute_cycles >= channel_cycles else "dram"
