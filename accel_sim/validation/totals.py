"""Totals that makers of other accelerators have published, beside ours for a machine of the same size."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from accel_sim.pricing.price_list import PriceList
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from accel_sim.validation.resnet import resnet_layers


@dataclass(frozen=True)
class PublishedTotal:
    """One network on one machine: ``cycles`` as published; ``preset`` and ``overrides`` name ours of its size."""

    name: str
    source: str
    network: int
    batch: int
    ends: bool
    cycles: int
    preset: str
    overrides: Mapping[str, str]

    @property
    def spec(self) -> MachineSpec:
        return load_spec(self.preset, self.overrides)


@dataclass(frozen=True)
class TotalComparison:
    """``floor_cycles``: all multiply-adds at one per element and cycle, or all DRAM traffic, whichever takes longer."""

    published: PublishedTotal
    macs: int
    cycles: int
    floor_cycles: int

    @property
    def factor(self) -> float:
        """The published cycles over ours."""
        return self.published.cycles / self.cycles


def published_totals() -> list[PublishedTotal]:
    text = (resources.files("accel_sim") / "validation" / "totals.toml").read_text(encoding="utf-8")
    return [PublishedTotal(**{"overrides": {}, **row}) for row in tomllib.loads(text)["totals"]]


def compare_total(published: PublishedTotal) -> TotalComparison:
    """The network's multiply-add layers one after another on our machine, each with its best tiling."""
    spec = published.spec
    layers = resnet_layers(published.network, published.batch, published.ends)
    prices = PriceList(spec).layers(layers)
    macs = sum(layer.macs for layer in layers)
    traffic = sum(price.dram_bytes for price in prices) / spec.dram.bytes_per_cycle
    floor = max(macs / spec.peak_macs_per_cycle, traffic)
    return TotalComparison(published, macs, sum(price.cycles for price in prices), round(floor))
