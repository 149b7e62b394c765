"""What one machine does with a network: totals and layers, from the engine's run of a program or from prices alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel_sim.engine import Result
from accel_sim.engine.counts import LayerRun
from accel_sim.program.isa import Program
from accel_sim.spec import MachineSpec
from codegen.asic_compile.compile import Compiled
from codegen.asic_latency import AsicLatency, LayerRow
from codegen.report.build import Quantity
from codegen.simulate.machine import Machine
from codegen.simulate.roofline import Roofline, roofline
from passes.core.cost import Kind, OpWork

ENGINE, PRICES = "engine", "price list"


@dataclass(frozen=True)
class Layer:
    """One layer. ``unit``: array, vector, layout (bytes change places), host.

    ``predicted_cycles``: the price list's, None where it says nothing. ``dram_read_bytes``/``dram_write_bytes``: None
    from prices alone. ``stalls``: cycles by queue and reason, each queue's summing to ``cycles``; empty from prices
    alone. ``host_cycles``: an estimate, no part of ``cycles``. ``on_chip``: which of its maps never leave the chip.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    unit: str
    cycles: int
    predicted_cycles: int | None
    macs: int
    utilization: float
    dram_bytes: int
    dram_read_bytes: int | None
    dram_write_bytes: int | None
    energy_pj: float
    host_cycles: float
    roofline: Roofline
    on_chip: str = ""
    stalls: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class HostPart:
    """What the machine cannot run. ``cycles`` are an estimate in the machine's clock, and no part of its own."""

    name: str
    op: str
    reason: str
    cycles: float


@dataclass(frozen=True)
class LayoutChange:
    """A tensor that is copied into another order of bytes."""

    tensor: str
    cycles: int
    dram_bytes: int


@dataclass(frozen=True)
class Totals:
    """Sums over the layers. ``latency``: machine and host together; ``cycles``: the machine alone."""

    latency: Quantity
    time: Quantity
    time_per_image: Quantity
    images_per_second: Quantity
    cycles: Quantity
    host_cycles: Quantity
    predicted_cycles: Quantity | None
    energy: Quantity
    dram_bytes: Quantity
    macs: Quantity
    utilization: Quantity
    roofline: Roofline
    saved_dram_bytes: Quantity | None = None
    instructions: int | None = None


@dataclass(frozen=True, eq=False)
class Simulation:
    """``source``: ENGINE or PRICES, the latter with the ``reason``; ``program`` and ``run`` are the engine's."""

    machine: Machine
    source: str
    reason: str
    totals: Totals
    layers: tuple[Layer, ...]
    host: tuple[HostPart, ...]
    layout_changes: tuple[LayoutChange, ...]
    notes: tuple[str, ...] = ()
    program: Program | None = None
    run: Result | None = None

    @property
    def spec(self) -> MachineSpec:
        return self.machine.spec

    @property
    def stalls(self) -> dict[str, dict[str, int]]:
        """Cycles by queue and reason over all layers."""
        total: dict[str, dict[str, int]] = {}
        for layer in self.layers:
            for queue, reasons in layer.stalls.items():
                into = total.setdefault(queue, {})
                for reason, cycles in reasons.items():
                    into[reason] = into.get(reason, 0) + cycles
        return total


def from_engine(
    machine: Machine,
    result: Result,
    images: int,
    compiled: Compiled | None = None,
    prices: AsicLatency | None = None,
    works: Sequence[OpWork] = (),
) -> Simulation:
    """Of a run without values. ``compiled``, ``prices`` and ``works`` where the program was made from a network."""
    spec, program = machine.spec, result.program
    kept = {} if compiled is None else {row.marker: row.price.on_chip for row in compiled.rows if row.price.on_chip}
    layers = tuple(
        _layer(spec, layer, kept.get(layer.marker, "")) for layer in result.layers if layer.cycles or layer.host_calls
    )
    host = [
        HostPart(
            program.calls[call].name, layer.op, program.calls[call].reason, layer.host_cycles / len(layer.host_calls)
        )
        for layer in result.layers
        for call in layer.host_calls
    ]
    if compiled is not None and compiled.tail and prices is not None:
        host += _tail(compiled, prices, works)
    changes = tuple(
        LayoutChange(layer.name.removeprefix("layout of "), layer.cycles, layer.counts.dram_bytes)
        for layer in result.layers
        if layer.op == "layout"
    )
    predicted = [layer.predicted_cycles for layer in layers if layer.predicted_cycles is not None]
    totals = _totals(
        spec,
        layers,
        result.cycles,
        host,
        images,
        Quantity(sum(predicted), "cycles", Kind.SIMULATED),
        None if compiled is None else Quantity(compiled.saved_bytes, "B", Kind.SIMULATED),
        len(program.code),
    )
    tail = () if compiled is None else compiled.tail
    notes = (f"behind the program, on the host: {', '.join(op.name for op in tail)}",) if tail else ()
    return Simulation(machine, ENGINE, "", totals, layers, tuple(host), changes, notes, program, result)


def from_prices(
    machine: Machine,
    prices: AsicLatency,
    works: Sequence[OpWork],
    on_host: Mapping[int, str],
    images: int,
    reason: str,
) -> Simulation:
    """By the price list alone; ``reason`` says why. Raises UnsupportedError where it has no price either."""
    plan = prices.plan(works, on_host.keys())
    layers, host = [], []
    for i, row in enumerate(plan.rows):
        if row.unit == "host":
            why = on_host.get(i, "no unit of the machine runs it")
            host.append(HostPart(row.name, row.op, why, float(row.cycles)))
        elif row.cycles:
            layers.append(_priced(machine.spec, row))
    cycles = sum(layer.cycles for layer in layers)
    saved = sum(price.layerwise_dram_bytes - price.dram_bytes for price in plan.chain_prices if price.fused)
    totals = _totals(machine.spec, layers, cycles, host, images, None, Quantity(saved, "B", Kind.SIMULATED), None)
    return Simulation(machine, PRICES, reason, totals, tuple(layers), tuple(host), ())


def _layer(spec: MachineSpec, layer: LayerRun, on_chip: str) -> Layer:
    unit = "move"
    if layer.op == "layout":
        unit = "layout"
    elif layer.host_calls:
        unit = "host"
    elif layer.counts.array_macs:
        unit = "array"
    elif layer.counts.vector_operations:
        unit = "vector"
    macs = layer.macs if unit == "array" else 0
    return Layer(
        name=layer.name or f"layer {layer.marker}",
        op=layer.op,
        nodes=layer.nodes,
        unit=unit,
        cycles=layer.cycles,
        predicted_cycles=layer.predicted_cycles if layer.predicted_cycles >= 0 else None,
        macs=macs,
        utilization=layer.utilization,
        dram_bytes=layer.counts.dram_bytes,
        dram_read_bytes=layer.counts.dram_read_bytes,
        dram_write_bytes=layer.counts.dram_write_bytes,
        energy_pj=layer.energy_pj,
        host_cycles=layer.host_cycles,
        roofline=roofline(spec, macs, layer.cycles, layer.counts.dram_bytes),
        on_chip=on_chip,
        stalls=layer.activities,
    )


def _priced(spec: MachineSpec, row: LayerRow) -> Layer:
    macs = row.cost.macs
    return Layer(
        name=row.name,
        op=row.op,
        nodes=(row.name,),
        unit=row.unit,
        cycles=row.cycles,
        predicted_cycles=row.cycles,
        macs=macs,
        utilization=macs / (row.cycles * spec.peak_macs_per_cycle),
        dram_bytes=row.dram_bytes,
        dram_read_bytes=None,
        dram_write_bytes=None,
        energy_pj=row.cost.energy_pj,
        host_cycles=0.0,
        roofline=roofline(spec, macs, row.cycles, row.dram_bytes),
        on_chip=row.on_chip,
    )


def _tail(compiled: Compiled, prices: AsicLatency, works: Sequence[OpWork]) -> list[HostPart]:
    """The host's parts behind the program, by the price list's estimate."""
    places = {op.name: i for i, op in enumerate(compiled.graph.operations)}
    found = []
    for op in compiled.tail:
        (row,) = prices.plan([works[places[op.name]]], [0]).rows
        found.append(HostPart(op.name, op.op, op.reason, float(row.cycles)))
    return found


def _totals(
    spec: MachineSpec,
    layers: Sequence[Layer],
    cycles: int,
    host: Sequence[HostPart],
    images: int,
    predicted: Quantity | None,
    saved: Quantity | None,
    instructions: int | None,
) -> Totals:
    on_host = sum(part.cycles for part in host)
    kind = Kind.ESTIMATED if host else Kind.SIMULATED
    time_s = (cycles + on_host) / (spec.clock_mhz * 1e6)
    macs = sum(layer.macs for layer in layers)
    dram_bytes = sum(layer.dram_bytes for layer in layers)
    simulated: Any = Kind.SIMULATED
    return Totals(
        latency=Quantity(cycles + on_host, "cycles", kind),
        time=Quantity(time_s, "s", kind),
        time_per_image=Quantity(time_s / images, "s", kind),
        images_per_second=Quantity(images / time_s if time_s else 0.0, "1/s", kind),
        cycles=Quantity(cycles, "cycles", simulated),
        host_cycles=Quantity(on_host, "cycles", Kind.ESTIMATED),
        predicted_cycles=predicted,
        energy=Quantity(sum(layer.energy_pj for layer in layers), "pJ", simulated),
        dram_bytes=Quantity(dram_bytes, "B", simulated),
        macs=Quantity(macs, "MACs", simulated),
        utilization=Quantity(macs / max(cycles * spec.peak_macs_per_cycle, 1), "", simulated),
        roofline=roofline(spec, macs, cycles, dram_bytes),
        saved_dram_bytes=saved,
        instructions=instructions,
    )
