"""The tiles of a priced layer, in the order of the price list's steps: what each loads, computes and stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from accel_sim.pricing.layer import Layer
from accel_sim.pricing.tiling import IMAGES
from codegen.asic_compile.transfers import Box

FILTERS_FIRST = 1


@dataclass(frozen=True)
class Tiling:
    """One :data:`accel_sim.pricing.candidate.PRICE` as plain integers, with what follows from it.

    ``channels``, ``filters`` and ``groups`` count packs of groups.
    """

    dataflow: int
    filters_first: bool
    level: int
    size: int
    tile_filters: int
    tile_channels: int
    pack: int
    hold_input: bool
    hold_weights: bool
    channels: int
    filters: int
    groups: int

    @classmethod
    def of(cls, layer: Layer, record: Any) -> Tiling:
        pack = int(record["pack"])
        return cls(
            int(record["dataflow"]),
            int(record["order"]) == FILTERS_FIRST,
            int(record["level"]),
            int(record["tile_size"]),
            int(record["tile_filters"]),
            int(record["tile_channels"]),
            pack,
            bool(record["hold_input"]),
            bool(record["hold_weights"]),
            layer.channels * pack,
            layer.filters * pack,
            layer.groups // pack,
        )

    @property
    def filter_tiles(self) -> int:
        return -(-self.filters // self.tile_filters)

    @property
    def channel_tiles(self) -> int:
        return -(-self.channels // self.tile_channels)

    def filter_range(self, f: int) -> range:
        """Filters of tile ``f`` within its pack."""
        return range(f * self.tile_filters, min((f + 1) * self.tile_filters, self.filters))

    def channel_range(self, c: int) -> range:
        return range(c * self.tile_channels, min((c + 1) * self.tile_channels, self.channels))


@dataclass(frozen=True)
class PositionTile:
    """``images`` x ``out``: output positions. ``read``: input lines loaded for them; ``fresh``: those of them that no
    tile before has loaded.
    """

    images: range
    out: Box
    read: Box
    fresh: Box


@dataclass(frozen=True)
class Step:
    """One step: tile numbers, and what it loads. ``output`` counts output tiles over the whole layer."""

    number: int
    group: int
    position: int
    filter: int
    channel: int
    output: int
    loads_input: bool
    loads_weights: bool


def position_tiles(layer: Layer, tiling: Tiling) -> list[PositionTile]:
    """All position tiles of the layer, image after image."""
    sizes = (layer.batch, *layer.out)
    cut = [1 if axis < tiling.level else sizes[axis] for axis in range(4)]
    cut[tiling.level] = tiling.size
    ways = [
        [range(begin, min(begin + step, size)) for begin in range(0, size, step)]
        for size, step in zip(sizes, cut, strict=True)
    ]
    return [
        PositionTile(
            images,
            (d, h, w),
            tuple(_lines(layer, tiling, axis, run, False) for axis, run in enumerate((d, h, w))),  # type: ignore[arg-type]
            tuple(_lines(layer, tiling, axis, run, True) for axis, run in enumerate((d, h, w))),  # type: ignore[arg-type]
        )
        for images, d, h, w in product(*ways)
    ]


def _lines(layer: Layer, tiling: Tiling, axis: int, outputs: range, fresh: bool) -> range:
    """Input lines of ``outputs`` along an axis; the whole axis inside the one that is cut."""
    size, stride, reach, pad = layer.size[axis], layer.stride[axis], layer.reach[axis], layer.pad[axis]
    if axis + 1 > tiling.level or tiling.level == IMAGES:
        return range(size)
    begin = outputs.start * stride - pad
    if fresh and outputs.start:
        begin = max(begin, (outputs.start - 1) * stride - pad + reach)
    begin, end = max(begin, 0), min((outputs.stop - 1) * stride - pad + reach, size)
    return range(begin, max(begin, end))


def steps(tiling: Tiling, positions: int) -> Iterator[Step]:
    """The steps in order; ``positions`` is the number of position tiles."""
    inner, outer = range(tiling.filter_tiles), range(positions)
    number = output = 0
    for group in range(tiling.groups):
        pairs = product(inner, outer) if tiling.filters_first else product(outer, inner)
        for pair in pairs:
            f, p = pair if tiling.filters_first else pair[::-1]
            loads_input, loads_weights = f == 0 or not tiling.hold_input, p == 0 or not tiling.hold_weights
            for c in range(tiling.channel_tiles):
                yield Step(number, group, p, f, c, output, loads_input, loads_weights)
                number += 1
            output += 1
