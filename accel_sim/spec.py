"""The machine as data: frozen dataclasses, one per section of a TOML file, units in the names of the keys.

A field's metadata holds its smallest and largest value; :mod:`accel_sim.spec_file` checks a file against them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DATAFLOWS = ("ws", "os", "is", "rs")
"""Weight-, output- and input-stationary, of a systolic array; row-stationary, an array of its own."""


class SpecError(ValueError):
    """A machine description that cannot be used; the message names the file (or override) and the key."""


def _limits(smallest: float, largest: float) -> dict[str, float]:
    return {"min": smallest, "max": largest}


@dataclass(frozen=True)
class ArraySpec:
    """An array of ``rows`` x ``columns`` processing elements, one MAC each per cycle.

    Systolic, or row-stationary: then ``dataflows`` names nothing else, and :class:`RowStationarySpec` says the rest.

    ``rows`` is the side along which partial sums travel (the K axis of a weight-stationary GEMM), ``columns`` the side
    the results leave on. ``weight_shadow``: a second register per element takes the next stationary tile while the
    present one computes. ``drain_overlap``: the same for output-stationary results on their way out.
    ``residual_on_drain``: a second map, as it lies in DRAM, can be added to the results before they leave.
    """

    rows: int = field(metadata=_limits(1, 4096))
    columns: int = field(metadata=_limits(1, 4096))
    dataflows: tuple[str, ...] = field(metadata={"choices": DATAFLOWS})
    weight_shadow: bool
    drain_overlap: bool
    residual_on_drain: bool


@dataclass(frozen=True)
class DatatypeSpec:
    """Widths: ``data_bits`` of inputs, weights and outputs, ``accumulator_bits`` of partial sums and biases."""

    data_bits: int = field(metadata={"choices": (8, 16, 32)})
    accumulator_bits: int = field(metadata={"choices": (16, 32, 48, 64)})

    @property
    def data_bytes(self) -> int:
        return self.data_bits // 8

    @property
    def accumulator_bytes(self) -> int:
        return self.accumulator_bits // 8


@dataclass(frozen=True)
class ScratchpadSpec:
    """On-chip memories. ``shared_input_weight``: inputs and weights share one pool of the two sizes' sum.

    ``double_buffered``: every tile has two buffers, so that one is filled or drained while the other computes.
    """

    input_kib: int = field(metadata=_limits(1, 1 << 20))
    weight_kib: int = field(metadata=_limits(1, 1 << 20))
    accumulator_kib: int = field(metadata=_limits(1, 1 << 20))
    shared_input_weight: bool
    double_buffered: bool


@dataclass(frozen=True)
class DramSpec:
    """The one channel that loads and stores share.

    A contiguous piece of a transfer moves in whole bursts. ``latency_cycles`` passes between a request and its first
    byte; ``pipelined_requests``: the next request's latency overlaps the present one's data.
    """

    bytes_per_cycle: float = field(metadata=_limits(1 / 64, 65536))
    latency_cycles: int = field(metadata=_limits(0, 100_000))
    burst_bytes: int = field(metadata=_limits(1, 65536))
    pipelined_requests: bool


@dataclass(frozen=True)
class VectorSpec:
    """The unit that runs what is no multiplication of matrices: ``lanes`` elementary operations a cycle."""

    lanes: int = field(metadata=_limits(1, 65536))


@dataclass(frozen=True)
class RowStationarySpec:
    """What a row-stationary array has instead of a systolic one's edges: three buses and memories per element.

    The psum bus counts once for each direction. ``*_spad_words``: words of one element's memories, for a piece of an
    input row, of kernel rows, and of partial sums; they bound how many channels and filters an element holds.
    ``pass_overhead_cycles`` passes between two passes of the array. ``scratchpads.input_kib`` and ``accumulator_kib``
    are one pool for the input map and partial sums, ``weight_kib`` is the buffer of the next pass's filters.
    """

    filter_bus_bits: int = field(metadata=_limits(1, 65536))
    psum_bus_bits: int = field(metadata=_limits(1, 65536))
    input_bus_bits: int = field(metadata=_limits(1, 65536))
    filter_spad_words: int = field(metadata=_limits(1, 1 << 20))
    input_spad_words: int = field(metadata=_limits(1, 1 << 20))
    psum_spad_words: int = field(metadata=_limits(1, 1 << 20))
    pass_overhead_cycles: int = field(metadata=_limits(0, 1_000_000))


@dataclass(frozen=True)
class HostSpec:
    """The processor beside the array, in cycles of the array's clock; only estimates are made from it."""

    call_cycles: int = field(metadata=_limits(0, 1_000_000_000))
    mac_cycles: float = field(metadata=_limits(0.0, 1e6))
    element_cycles: float = field(metadata=_limits(0.0, 1e6))


@dataclass(frozen=True)
class EnergySpec:
    """Energy per event in picojoules. ``source`` says where the figures come from."""

    source: str
    mac_pj: float = field(metadata=_limits(0.0, 1e6))
    scratchpad_read_pj_per_byte: float = field(metadata=_limits(0.0, 1e6))
    scratchpad_write_pj_per_byte: float = field(metadata=_limits(0.0, 1e6))
    accumulator_read_pj_per_byte: float = field(metadata=_limits(0.0, 1e6))
    accumulator_write_pj_per_byte: float = field(metadata=_limits(0.0, 1e6))
    dram_pj_per_byte: float = field(metadata=_limits(0.0, 1e6))
    vector_operation_pj: float = field(metadata=_limits(0.0, 1e6))
    static_pj_per_cycle: float = field(metadata=_limits(0.0, 1e9))


@dataclass(frozen=True)
class MachineSpec:
    """A whole machine: what ``accel_sim/targets/*.toml`` and a user's own file describe."""

    name: str
    clock_mhz: float = field(metadata=_limits(0.001, 100_000))
    array: ArraySpec
    datatypes: DatatypeSpec
    scratchpads: ScratchpadSpec
    dram: DramSpec
    vector: VectorSpec
    host: HostSpec
    energy: EnergySpec
    row_stationary: RowStationarySpec | None = None

    @property
    def peak_macs_per_cycle(self) -> int:
        return self.array.rows * self.array.columns
