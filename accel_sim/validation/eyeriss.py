"""Eyeriss v1: the chip's published figures per layer beside those of our row-stationary model under given mappings."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from accel_sim.energy import layer_energy_pj
from accel_sim.pricing.layer import Layer, conv_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.row_stationary.passes import MAPPING
from accel_sim.row_stationary.search import price_mappings
from accel_sim.spec import MachineSpec

NETWORKS = ("alexnet", "vgg16")
_BUFFER_MB = 1 << 20


@dataclass(frozen=True)
class ChipRow:
    """One layer as published. ``total_ms`` includes waiting for DRAM, ``processing_ms`` does not.

    ``dram_mb`` counts 10^6 bytes, or the abstract's accesses per MAC would not follow; ``global_buffer_mb`` counts
    2^20, or VGG-16's partial sums would exceed it.

    ``mapping``: the letters of :data:`accel_sim.row_stationary.passes.MAPPING`; ``mapping_source`` "published" or
    "inferred". ``channels_per_pass``: what the inference started from, None where nothing was inferred.
    """

    network: str
    name: str
    layer: Layer
    total_ms: float
    processing_ms: float
    power_mw: float
    active_elements: int
    global_buffer_mb: float
    dram_mb: float
    mapping: tuple[int, ...]
    mapping_source: str
    channels_per_pass: int | None


@dataclass(frozen=True)
class Comparison:
    """Our figures for a :class:`ChipRow`.

    ``processing_ms``: the passes, no waiting for DRAM. Megabytes as in :class:`ChipRow`; ``psum_mb`` is the part of
    ``global_buffer_mb`` that partial sums are. ``power_mw``: energy on the chip, DRAM left out, over ``processing_ms``.
    """

    chip: ChipRow
    processing_ms: float
    active_elements: int
    global_buffer_mb: float
    psum_mb: float
    dram_mb: float
    power_mw: float

    @property
    def deviation(self) -> float:
        """Of the processing time from the chip's, as a share of it."""
        return self.processing_ms / self.chip.processing_ms - 1


def chip_rows(network: str) -> list[ChipRow]:
    """The published layers of one of :data:`NETWORKS`; KeyError for another."""
    table = _tables()[network]
    rows = []
    for row in table["rows"]:
        batch, channels, filters, size, kernel, stride, pad, groups = row["layer"]
        layer = conv_layer(
            *(channels, filters, (size, size), (kernel, kernel), (stride, stride)),
            pads=(pad,) * 4,
            groups=groups,
            batch=batch,
            bias=False,
        )
        total, processing, power, active, buffer, dram = row["chip"]
        rows.append(
            ChipRow(
                *(network, row["name"], layer, total, processing, power, int(active), buffer, dram),
                *(tuple(row["mapping"]), table["mapping_source"], row.get("channels_per_pass")),
            )
        )
    return rows


def printed_totals_ms(network: str) -> tuple[float, float]:
    """The table's last line: total and processing time of the network."""
    total, processing = _tables()[network]["totals_ms"]
    return total, processing


def compare(rows: Sequence[ChipRow], spec: MachineSpec) -> list[Comparison]:
    """Our figures for ``rows`` on ``spec``, a row-stationary machine. ValueError for a mapping that it cannot run."""
    machine = machine_record(spec)
    table = layer_table([row.layer.row() for row in rows])
    prices = price_mappings(table, machine, np.array([row.mapping for row in rows], MAPPING))
    found = []
    for row, price in zip(rows, prices, strict=True):
        _, e, _, _, r, t, _ = row.mapping
        psums = int(price["accumulator_read_bytes"]) + int(price["accumulator_write_bytes"])
        buffer = psums + int(price["scratchpad_read_bytes"]) + int(price["scratchpad_write_bytes"])
        dram = int(price["input_bytes"]) + int(price["weight_bytes"]) + int(price["output_bytes"])
        seconds = int(price["array_cycles"]) / (spec.clock_mhz * 1e6)
        # What counts by the cycle counts for the passes alone: the chip's power is not that of its waiting.
        waiting = int(price["cycles"]) - int(price["array_cycles"])
        energy_pj = layer_energy_pj(spec, price, row.layer.macs) - waiting * spec.energy.static_pj_per_cycle
        on_chip_pj = energy_pj - dram * spec.energy.dram_pj_per_byte
        found.append(
            Comparison(
                row,
                processing_ms=seconds * 1e3,
                active_elements=row.layer.reach[1] * e * r * t,
                global_buffer_mb=buffer / _BUFFER_MB,
                psum_mb=psums / _BUFFER_MB,
                dram_mb=dram / 1e6,
                power_mw=on_chip_pj * 1e-9 / seconds,
            )
        )
    return found


def mean_absolute_deviation(comparisons: Sequence[Comparison]) -> float:
    return sum(abs(row.deviation) for row in comparisons) / len(comparisons)


def _tables() -> dict[str, Any]:
    return tomllib.loads((resources.files("accel_sim") / "validation" / "eyeriss.toml").read_text(encoding="utf-8"))
