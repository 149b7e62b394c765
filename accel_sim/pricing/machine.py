"""The machine as the kernels read it: one record of integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.spec import MachineSpec

RATE = 256
"""Bandwidth is kept in 1/256 bytes per cycle, so that all arithmetic stays in integers."""

MACHINE = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("rows", "columns", "ws", "os", "is_", "weight_shadow", "drain_overlap"),
            *("data_bytes", "accumulator_bytes", "input_bytes", "weight_bytes", "shared", "accumulator_capacity"),
            *("buffers", "rate", "latency", "burst", "pipelined", "lanes"),
            *("rs", "filter_bus_bits", "psum_bus_bits", "input_bus_bits"),
            *("filter_spad_words", "input_spad_words", "psum_spad_words", "pass_overhead"),
        )
    ]
)


def machine_record(spec: MachineSpec) -> NDArray[Any]:
    """``spec`` as an array of one :data:`MACHINE`."""
    pads, dram = spec.scratchpads, spec.dram
    rows = spec.row_stationary
    buses = (0, 0, 0) if rows is None else (rows.filter_bus_bits, rows.psum_bus_bits, rows.input_bus_bits)
    spads = (0, 0, 0) if rows is None else (rows.filter_spad_words, rows.input_spad_words, rows.psum_spad_words)
    row = (
        *(spec.array.rows, spec.array.columns),
        *(int(flow in spec.array.dataflows) for flow in ("ws", "os", "is")),
        *(int(spec.array.weight_shadow), int(spec.array.drain_overlap)),
        *(spec.datatypes.data_bytes, spec.datatypes.accumulator_bytes),
        *(pads.input_kib * 1024, pads.weight_kib * 1024, int(pads.shared_input_weight), pads.accumulator_kib * 1024),
        2 if pads.double_buffered else 1,
        *(max(round(dram.bytes_per_cycle * RATE), 1), dram.latency_cycles, dram.burst_bytes),
        *(int(dram.pipelined_requests), spec.vector.lanes),
        *(int(rows is not None), *buses, *spads, 0 if rows is None else rows.pass_overhead_cycles),
    )
    return np.array([row], dtype=MACHINE)
