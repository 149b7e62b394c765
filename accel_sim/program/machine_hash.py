"""Which machine a program is for, as a hash."""

from __future__ import annotations

import hashlib

from accel_sim.spec import MachineSpec


def machine_text(spec: MachineSpec) -> str:
    """What decides whether a program is valid on a machine and what values it computes, one ``key=value`` per line.

    That is the array's size, its data flows and whether it adds residuals on the way out, the widths, and the sizes of
    the memories. What only decides how long a program takes or what it costs is left out: clock, DRAM, vector lanes,
    shadow registers, overlapped drains, host, energy. So one program can be timed on machines that differ in those; the
    cycles that its markers predict are those of the machine that it was compiled for. ``double_buffered`` is left out
    as well: it is a rule for who compiles, and shows in the addresses.
    """
    array, widths, pads = spec.array, spec.datatypes, spec.scratchpads
    entries = {
        "array.rows": array.rows,
        "array.columns": array.columns,
        "array.dataflows": "+".join(sorted(array.dataflows)),
        "array.residual_on_drain": int(array.residual_on_drain),
        "datatypes.data_bits": widths.data_bits,
        "datatypes.accumulator_bits": widths.accumulator_bits,
        "scratchpads.input_kib": pads.input_kib,
        "scratchpads.weight_kib": pads.weight_kib,
        "scratchpads.accumulator_kib": pads.accumulator_kib,
        "scratchpads.shared_input_weight": int(pads.shared_input_weight),
    }
    return "".join(f"{key}={value}\n" for key, value in entries.items())


def spec_hash(spec: MachineSpec) -> bytes:
    """SHA-256 of :func:`machine_text`: 32 bytes, the ``spec_hash`` of the programs for ``spec``."""
    return hashlib.sha256(machine_text(spec).encode("ascii")).digest()
