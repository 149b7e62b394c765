"""The pipeline of ``rankc simulate``: read, then per machine compile, check, run; then the sweep; then values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from accel_sim.engine import DeadlockError, run
from accel_sim.program.check import check_program
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Program
from accel_sim.program.machine_hash import spec_hash
from codegen.asic_compile.compile import compile_graph
from codegen.asic_latency import AsicLatency
from codegen.events import Events, RecordingEvents
from codegen.simulate.config import SimulateConfig
from codegen.simulate.machine import Machine, fitting_presets
from codegen.simulate.network import Network, read_network
from codegen.simulate.simulation import Simulation, from_engine, from_prices
from codegen.simulate.sweep import points
from codegen.simulate.values import Outputs, Samples, read_samples, run_samples
from passes.errors import InputError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Point:
    """One machine of a sweep; ``simulation`` is None where ``error`` says why it cannot run the network."""

    changes: Mapping[str, str]
    simulation: Simulation | None
    error: str = ""


@dataclass(frozen=True, eq=False)
class Outcome:
    """All that a run found: a simulation per machine, the sweep's points, outputs where inputs were given."""

    config: SimulateConfig
    network: Network
    simulations: tuple[Simulation, ...]
    points: tuple[Point, ...]
    outputs: Outputs | None
    timings: Mapping[str, float]
    warnings: tuple[str, ...]


def simulate(config: SimulateConfig, events: Events) -> Outcome:
    """Carries out what ``config`` asks for. Raises RankcError where that cannot be done."""
    watched = RecordingEvents(events)
    grid = [(changes, config.machines[0].changed(changes)) for changes in points(config.axes)] if config.axes else []
    network = read_network(config, watched)
    samples: Samples | None = None
    if config.inputs is not None:
        samples = read_samples(config.inputs, network, config.samples)
        if network.random_ranges:
            watched.warning("ranges come from random inputs, so the outputs mean nothing; give --calib data")
    simulations = []
    for machine in config.machines:
        with watched.stage(f"simulate {machine.name}"):
            simulations.append(simulate_on(network, machine, config))
    outputs = None
    if samples is not None:
        with watched.stage("run with values", len(samples)):
            outputs = run_samples(simulations[0], samples)
    found = []
    if grid:
        with watched.stage("sweep", len(grid)) as progress:
            for changes, machine in grid:
                found.append(_point(network, changes, machine, config))
                progress.advance(note=machine.name)
        if all(point.simulation is None for point in found):
            raise UnsupportedError(f"--sweep: no machine of it can run the network: {found[0].error}")
        for point in found:
            if point.simulation is None:
                watched.note(f"{_written(point.changes)}: {point.error}")
    return Outcome(
        config,
        network,
        tuple(simulations),
        tuple(found),
        outputs,
        dict(watched.timings),
        tuple(watched.warnings),
    )


def simulate_on(network: Network, machine: Machine, config: SimulateConfig) -> Simulation:
    """One machine: by the engine where the network has a program on it, else by the price list, which says why."""
    spec = machine.spec
    if network.program is not None:
        _check(network.program, machine, config)
        return from_engine(machine, run(network.program, spec, {}, values=False), network.images)
    prices = AsicLatency(spec, maps_on_chip=not config.layer_by_layer)
    reason = "asked for" if config.price_list else network.refused or f"{spec.name} has no programs"
    if network.graph is not None and not config.price_list:
        try:
            compiled = compile_graph(network.graph, spec, prices)
        except UnsupportedError as error:
            reason = str(error)
        else:
            check_program(compiled.program, spec)
            result = run(compiled.program, spec, {}, values=False)
            return from_engine(machine, result, network.images, compiled, prices, network.works)
    try:
        return from_prices(machine, prices, network.works, network.on_host, network.images, reason)
    except UnsupportedError as error:
        raise UnsupportedError(f"{machine.name}: no program ({reason}) and no price: {error}") from error


def _check(program: Program, machine: Machine, config: SimulateConfig) -> None:
    """Raises InputError for a program of another machine, or one that cannot run."""
    if program.spec_hash != spec_hash(machine.spec):
        fitting = fitting_presets(program.spec_hash)
        known = f"it fits {' and '.join(fitting)}" if fitting else "it fits no preset: give the machine's own --target"
        raise InputError(
            f"{config.model} is for another machine than {machine.name} (its array, widths or memories differ: "
            f"{program.spec_hash.hex()[:12]} and {spec_hash(machine.spec).hex()[:12]}); {known}"
        )
    try:
        check_program(program, machine.spec)
    except (ProgramError, DeadlockError) as error:
        raise InputError(f"{config.model} cannot run: {error}") from error


def _point(network: Network, changes: Mapping[str, str], machine: Machine, config: SimulateConfig) -> Point:
    try:
        return Point(changes, simulate_on(network, machine, config))
    except InputError as error:
        return Point(changes, None, str(error))


def _written(changes: Mapping[str, str]) -> str:
    parts: Iterable[str] = (f"{key}={value}" for key, value in changes.items())
    return ",".join(parts)
