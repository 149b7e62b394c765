"""Energy from counts of events: what the price list counts times what the machine's table says an event costs."""

from __future__ import annotations

from typing import Any

from accel_sim.spec import MachineSpec


def layer_energy_pj(spec: MachineSpec, price: Any, macs: int) -> float:
    """Energy of a priced layer; ``price`` is one record of :data:`accel_sim.pricing.candidate.PRICE`.

    ``macs`` are the useful ones: elements that hold a zero weight or no input are taken as gated.
    """
    table = spec.energy
    moved = ("input_bytes", "weight_bytes", "residual_bytes", "output_bytes")
    dram_bytes = sum(int(price[name]) for name in moved)
    return (
        macs * table.mac_pj
        + int(price["scratchpad_read_bytes"]) * table.scratchpad_read_pj_per_byte
        + int(price["scratchpad_write_bytes"]) * table.scratchpad_write_pj_per_byte
        + int(price["accumulator_read_bytes"]) * table.accumulator_read_pj_per_byte
        + int(price["accumulator_write_bytes"]) * table.accumulator_write_pj_per_byte
        + dram_bytes * table.dram_pj_per_byte
        + int(price["cycles"]) * table.static_pj_per_cycle
    )


def vector_energy_pj(spec: MachineSpec, cycles: int, dram_bytes: int, operations: int) -> float:
    """Energy of an operation on the vector unit: every byte from or to DRAM passes a scratchpad once each way."""
    table = spec.energy
    per_byte = table.dram_pj_per_byte + table.scratchpad_read_pj_per_byte + table.scratchpad_write_pj_per_byte
    return operations * table.vector_operation_pj + dram_bytes * per_byte + cycles * table.static_pj_per_cycle
