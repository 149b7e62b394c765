"""Where this package's machine differs from SCALE-Sim's, computed from SCALE-Sim's own reports."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accel_sim.pricing.array import INPUT_STATIONARY, OUTPUT_STATIONARY, WEIGHT_STATIONARY, gemm_cycles_batch
from accel_sim.pricing.machine import machine_record
from accel_sim.spec_file import load_spec

_NUMBERS = {"ws": WEIGHT_STATIONARY, "os": OUTPUT_STATIONARY, "is": INPUT_STATIONARY}


@dataclass(frozen=True)
class ReportRow:
    """One layer of one run. ``m``, ``k``, ``n``: the GEMM that SCALE-Sim makes of it. DRAM columns count words.

    ``dram_words_per_cycle``: the average bandwidths that it reports for its three channels, added. ``beyond_edge``:
    its rounded-up output reads lines beyond the end of the input map.
    """

    config: str
    network: str
    layer: str
    rows: int
    columns: int
    dataflow: str
    mode: str
    m: int
    k: int
    n: int
    input_words: int
    cycles: int
    stall_cycles: int
    input_dram_reads: int
    filter_dram_reads: int
    output_dram_writes: int
    dram_words_per_cycle: float
    beyond_edge: bool

    @property
    def compute_cycles(self) -> int:
        return self.cycles - self.stall_cycles


@dataclass(frozen=True)
class Overlap:
    """Cycles of one layer: SCALE-Sim's, those of our array without overlap, and with it."""

    row: ReportRow
    serial_cycles: int
    overlapped_cycles: int

    @property
    def excess(self) -> float:
        """How much SCALE-Sim's are over the overlapped ones, as a share of these."""
        return self.row.compute_cycles / self.overlapped_cycles - 1


@dataclass(frozen=True)
class Traffic:
    """One run's DRAM words over those that there are: each map and each filter once."""

    config: str
    network: str
    layers: int
    input_reads: float
    filter_reads: float
    output_writes: float
    words_per_cycle: tuple[float, float]
    stall_share: float
    layers_beyond_edge: int


def read_reports(path: Path) -> list[ReportRow]:
    """The rows of a table with SCALE-Sim's report columns, such as the reference runs have. OSError, KeyError."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(row) for row in csv.DictReader(file)]


def overlap(rows: Sequence[ReportRow]) -> list[Overlap]:
    """Each layer on our array of the same size and data flow, without and with overlap of fill or drain."""
    found = []
    for row in rows:
        cycles = []
        for overlapped in ("false", "true"):
            changes = {"rows": str(row.rows), "columns": str(row.columns), "dataflows": row.dataflow}
            spec = load_spec("edge_16x16", {**changes, "weight_shadow": overlapped, "drain_overlap": overlapped})
            gemm = np.array([[row.m, row.k, row.n]])
            cycles.append(int(gemm_cycles_batch(machine_record(spec), _NUMBERS[row.dataflow], gemm)[0]))
        found.append(Overlap(row, *cycles))
    return found


def total_excess(overlaps: Sequence[Overlap]) -> float:
    theirs = sum(entry.row.compute_cycles for entry in overlaps)
    return theirs / sum(entry.overlapped_cycles for entry in overlaps) - 1


def traffic(rows: Sequence[ReportRow]) -> Traffic:
    """The rows of one run together."""
    first = rows[0]
    rates = [row.dram_words_per_cycle for row in rows]
    return Traffic(
        config=first.config,
        network=first.network,
        layers=len(rows),
        input_reads=sum(row.input_dram_reads for row in rows) / sum(row.input_words for row in rows),
        filter_reads=sum(row.filter_dram_reads for row in rows) / sum(row.k * row.n for row in rows),
        output_writes=sum(row.output_dram_writes for row in rows) / sum(row.m * row.n for row in rows),
        words_per_cycle=(min(rates), max(rates)),
        stall_share=sum(row.stall_cycles for row in rows) / sum(row.cycles for row in rows),
        layers_beyond_edge=sum(row.beyond_edge for row in rows),
    )


def runs(rows: Sequence[ReportRow]) -> dict[tuple[str, str], list[ReportRow]]:
    """The rows by (config, network), in their order."""
    found: dict[tuple[str, str], list[ReportRow]] = {}
    for row in rows:
        found.setdefault((row.config, row.network), []).append(row)
    return found


def _row(row: dict[str, str]) -> ReportRow:
    def number(key: str) -> int:
        return round(float(row[key]))

    height, width, r, s = (number(key) for key in ("H", "W", "R", "S"))
    out_h, out_w, stride = (number(key) for key in ("ofmap_h", "ofmap_w", "stride"))
    rates = (float(row[key]) for key in ("ifmap_dram_bw", "filter_dram_bw", "ofmap_dram_bw"))
    return ReportRow(
        config=row["config"],
        network=row["network"],
        layer=row["layer"],
        rows=number("array_h"),
        columns=number("array_w"),
        dataflow=row["dataflow"],
        mode=row["mode"],
        m=out_h * out_w,
        k=r * s * number("C"),
        n=number("K"),
        input_words=height * width * number("C"),
        cycles=number("total_cycles"),
        stall_cycles=number("stall_cycles"),
        input_dram_reads=number("ifd_reads"),
        filter_dram_reads=number("fd_reads"),
        output_dram_writes=number("od_writes"),
        dram_words_per_cycle=sum(rates),
        beyond_edge=(out_h - 1) * stride + r > height or (out_w - 1) * stride + s > width,
    )
