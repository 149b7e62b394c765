"""Strided transfers between maps in DRAM, pieces of them on chip, and tiles in the accumulator memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

from accel_sim.program.isa import Loops

Box = tuple[range, range, range]
"""Positions of a map by depth, height and width."""

MOST_LOOPS = 3


@dataclass(frozen=True)
class WholeMap:
    """A map in the layout of :mod:`accel_sim.program.isa` at ``address``, in DRAM or in the scratchpad."""

    address: int
    images: int
    channels: int
    size: tuple[int, int, int]

    @property
    def positions(self) -> int:
        return prod(self.size)

    @property
    def bytes(self) -> int:
        return self.images * self.channels * self.positions


@dataclass(frozen=True)
class StoredPiece:
    """A box of a map in the scratchpad: ``channels`` channels from ``first_channel`` on, both whole blocks."""

    address: int
    first_image: int
    first_channel: int
    channels: int
    box: Box

    @property
    def extent(self) -> tuple[int, int, int]:
        return len(self.box[0]), len(self.box[1]), len(self.box[2])


@dataclass(frozen=True)
class Transfer:
    """One strided load: addresses in bytes."""

    dram_address: int
    chip_address: int
    loops: Loops


def looped(run: int, count: int, dram_stride: int, chip_stride: int) -> Loops:
    """One loop over runs; the strides of one that does not loop are 0."""
    return Loops(run, (count, 1, 1), (dram_stride, 0, 0), (chip_stride, 0, 0)) if count > 1 else Loops(run)


def nested(dram_address: int, chip_address: int, dims: Sequence[tuple[int, int, int]], run: int) -> list[Transfer]:
    """Transfers of nested loops, ``dims`` being (count, DRAM stride, chip stride), outermost first, over runs.

    Loops that continue what lies inside them on both sides are merged; those beyond three are unrolled.
    """
    kept: list[tuple[int, int, int]] = []
    for count, dram, chip in reversed(dims):
        if count == 1:
            continue
        if not kept and dram == chip == run:
            run *= count
        elif kept and (dram, chip) == (kept[0][0] * kept[0][1], kept[0][0] * kept[0][2]):
            kept[0] = (count * kept[0][0], kept[0][1], kept[0][2])
        else:
            kept.insert(0, (count, dram, chip))
    outer, inner = kept[:-MOST_LOOPS], [(1, 0, 0)] * (MOST_LOOPS - len(kept)) + kept[-MOST_LOOPS:]
    counts, dram_strides, chip_strides = zip(*inner, strict=True)
    loops = Loops(run, counts, dram_strides, chip_strides)
    return [
        Transfer(
            dram_address + sum(i * dim[1] for i, dim in zip(at, outer, strict=True)),
            chip_address + sum(i * dim[2] for i, dim in zip(at, outer, strict=True)),
            loops,
        )
        for at in product(*(range(dim[0]) for dim in outer))
    ]


def load_piece(
    source: WholeMap, target: StoredPiece, images: range, channels: range, box: Box, columns: int
) -> list[Transfer]:
    """Loads ``channels`` (whole blocks) of ``box`` in ``images``, all within ``target``'s piece of ``source``."""
    if not channels or not all(box) or not images:
        return []
    sizes, extent = source.size, target.extent
    far, near = source.positions, prod(extent)
    dram = source.address + images.start * source.channels * far + channels.start * far
    chip = target.address + (images.start - target.first_image) * target.channels * near
    chip += (channels.start - target.first_channel) * near
    image = (len(images), source.channels * far, target.channels * near)
    if all(len(lines) == size for lines, size in zip(box, sizes, strict=True)):
        return nested(dram, chip, [image], len(channels) * far)
    full = len(channels) // columns
    found = []
    for first, blocks, width in ((0, full, columns), (full * columns, 1, len(channels) - full * columns)):
        if blocks and width:
            start = [lines.start for lines in box]
            local = [lines.start - stored.start for lines, stored in zip(box, target.box, strict=True)]
            dims = [
                image,
                (blocks, columns * far, columns * near),
                (len(box[0]), sizes[1] * sizes[2] * width, extent[1] * extent[2] * width),
                (len(box[1]), sizes[2] * width, extent[2] * width),
            ]
            found += nested(
                dram + first * far + flat(start, sizes) * width,
                chip + first * near + flat(local, extent) * width,
                dims,
                len(box[2]) * width,
            )
    return found


def flat(position: Sequence[int], size: Sequence[int]) -> int:
    """Number of a position in a map of ``size``."""
    return (position[0] * size[1] + position[1]) * size[2] + position[2]


@dataclass(frozen=True)
class TilePart:
    """Some of a tile's results on their way into a map: ``offset`` from its address on, in bytes, and ``tile_offset``
    from the tile's, in elements; ``channel`` is the map's channel of the first, ``lanes`` and ``block_channels`` are
    those of :class:`accel_sim.program.isa.Store`.
    """

    offset: int
    tile_offset: int
    loops: Loops
    channel: int
    lanes: int
    block_channels: int = 0


def tile_parts(
    target: WholeMap, images: range, box: Box, channels: range, columns: int, whole_blocks: bool
) -> list[TilePart]:
    """A tile - ``images`` x ``box`` x ``channels`` - in the order in which its parts move.

    ``box`` is contiguous in the map. ``whole_blocks``: the tile's blocks are blocks of the map; where they are not,
    each part is what a block of the one and a block of the other have in common, from the last on, so that no part
    continues another.
    """
    size, total = target.positions, target.channels
    run = prod(len(lines) for lines in box)
    start = flat([lines.start for lines in box], target.size)
    positions = len(images) * run
    parts = []
    if whole_blocks and len(channels) <= columns:
        width = len(channels)
        loops = looped(run * width, len(images), total * size, run * width)
        at = images.start * total * size + channels.start * size + start * width
        return [TilePart(at, 0, loops, channels.start, width)]
    if whole_blocks:
        full = len(channels) // columns
        for i, image in enumerate(images):
            at = image * total * size + channels.start * size
            loops = looped(run * columns, full, columns * size, positions * columns)
            step = columns if full > 1 else 0
            parts.append(TilePart(at + start * columns, i * run * columns, loops, channels.start, columns, step))
            if width := len(channels) - full * columns:
                first = full * columns
                parts.append(
                    TilePart(
                        at + first * size + start * width,
                        first * positions + i * run * width,
                        Loops(run * width),
                        channels.start + first,
                        width,
                    )
                )
        return parts
    common = _common_blocks(channels, columns)
    for i, image in enumerate(images):
        for channel, lanes in common if size == 1 else reversed(common):
            block = channel // columns * columns
            width = min(columns, total - block)
            tile_block = (channel - channels.start) // columns * columns
            tile_width = min(columns, len(channels) - tile_block)
            at = image * total * size + block * size + start * width + channel - block
            tile_at = tile_block * positions + i * run * tile_width + channel - channels.start - tile_block
            whole = lanes == width == tile_width
            loops = Loops(run * lanes) if whole else looped(lanes, run, width, tile_width)
            parts.append(TilePart(at, tile_at, loops, channel, lanes))
    return parts


def _common_blocks(channels: range, columns: int) -> list[tuple[int, int]]:
    """(first channel, number) of what blocks of a tile and blocks of the map have in common."""
    cuts = {at for at in channels if at % columns == 0 or (at - channels.start) % columns == 0}
    ordered = [*sorted(cuts | {channels.start}), channels.stop]
    return [(a, b - a) for a, b in pairwise(ordered)]
