"""Where a layer stands under the machine's roofline (Williams et al., CACM 2009), in multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass

from accel_sim.spec import MachineSpec


@dataclass(frozen=True)
class Roofline:
    """``intensity``: MACs per DRAM byte; ``attainable`` and ``reached``: MACs per cycle.

    ``side``: "memory" left of the ridge, "compute" right of it, an empty string for what multiplies nothing, whose
    figures are None. The intensity is None where nothing comes from DRAM.
    """

    intensity_macs_per_byte: float | None
    attainable_macs_per_cycle: float | None
    reached_macs_per_cycle: float | None
    side: str


def ridge(spec: MachineSpec) -> float:
    """The intensity, in MACs per DRAM byte, from which on the array and not the channel is the limit."""
    return spec.peak_macs_per_cycle / spec.dram.bytes_per_cycle


def roofline(spec: MachineSpec, macs: int, cycles: int, dram_bytes: int) -> Roofline:
    """The position of ``macs`` in ``cycles`` with ``dram_bytes`` moved."""
    if not macs or not cycles:
        return Roofline(None, None, None, "")
    peak, reached = float(spec.peak_macs_per_cycle), macs / cycles
    if not dram_bytes:
        return Roofline(None, peak, reached, "compute")
    intensity = macs / dram_bytes
    attainable = min(peak, intensity * spec.dram.bytes_per_cycle)
    return Roofline(intensity, attainable, reached, "compute" if intensity >= ridge(spec) else "memory")
