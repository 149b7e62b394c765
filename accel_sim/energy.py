"""Energy from counts of events: what the price list counts times what the machine's table says an event costs."""

from __future__ import annotations

from typing import Any

from accel_sim.spec import MachineSpec


def dram_bytes(prices: Any) -> Any:
    """Bytes that priced layers move to and from DRAM; ``prices`` as in :func:`layer_energies_pj`."""
    return prices["input_bytes"] + prices["weight_bytes"] + prices["residual_bytes"] + prices["output_bytes"]


def layer_energies_pj(spec: MachineSpec, prices: Any, macs: Any) -> Any:
    """Energy of priced layers; ``prices``: records of :data:`accel_sim.pricing.candidate.PRICE`, an array or one of it.

    ``macs``, of the same shape, are the useful ones: elements that hold a zero weight or no input are taken as gated.
    """
    table = spec.energy
    return (
        macs * table.mac_pj
        + prices["scratchpad_read_bytes"] * table.scratchpad_read_pj_per_byte
        + prices["scratchpad_write_bytes"] * table.scratchpad_write_pj_per_byte
        + prices["accumulator_read_bytes"] * table.accumulator_read_pj_per_byte
        + prices["accumulator_write_bytes"] * table.accumulator_write_pj_per_byte
        + dram_bytes(prices) * table.dram_pj_per_byte
        + prices["cycles"] * table.static_pj_per_cycle
    )


def layer_energy_pj(spec: MachineSpec, price: Any, macs: int) -> float:
    """:func:`layer_energies_pj` of one record."""
    return float(layer_energies_pj(spec, price, macs))


def vector_energy_pj(spec: MachineSpec, cycles: int, dram_bytes: int, operations: int) -> float:
    """Energy of an operation on the vector unit: every byte from or to DRAM passes a scratchpad once each way."""
    table = spec.energy
    per_byte = table.dram_pj_per_byte + table.scratchpad_read_pj_per_byte + table.scratchpad_write_pj_per_byte
    return operations * table.vector_operation_pj + dram_bytes * per_byte + cycles * table.static_pj_per_cycle
