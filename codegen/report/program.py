"""What a report says of the accelerator's program: figures of the engine beside those of the price list."""

from __future__ import annotations

from dataclasses import dataclass, field

from codegen.report.build import Quantity


@dataclass(frozen=True)
class HostCallRow:
    """What the machine cannot run. ``cycles`` are an estimate, and no part of the program's."""

    name: str
    op: str
    reason: str
    cycles: float


@dataclass(frozen=True)
class Agreement:
    """Output bytes on the engine against those of onnxruntime's integer kernels, over ``samples`` runs.

    ``same_top1``: runs with the same class, None where the output is no row of classes.
    """

    samples: int
    compared: int
    different: int
    largest: int
    same_top1: int | None


@dataclass(frozen=True)
class ProgramLayer:
    """One layer of the program on the engine; ``predicted_cycles`` by the price list, None where it says nothing.

    ``waits``: cycles by queue and reason, each queue's summing to ``cycles``.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    cycles: int
    predicted_cycles: int | None
    utilization: float
    dram_bytes: int
    energy_pj: float
    waits: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramReport:
    """The int8 program of the rewritten network, run on the engine.

    ``baseline_latency``: the same for the network as it came, None where it has no program. ``predicted_latency``: the
    price list's for this very plan. ``saved_dram_bytes``: what maps that stay on chip do not move. ``calibrated``:
    ranges are those of real data. ``accuracy``: of the quantized network in onnxruntime.
    """

    latency: Quantity
    time_s: float
    energy: Quantity
    dram_bytes: int
    predicted_latency: Quantity
    baseline_latency: Quantity | None
    instructions: int
    saved_dram_bytes: int
    utilization: float
    calibrated: bool
    agreement: Agreement | None
    accuracy: Quantity | None
    host: tuple[HostCallRow, ...]
    layout_changes: tuple[str, ...]
    layers: tuple[ProgramLayer, ...]
