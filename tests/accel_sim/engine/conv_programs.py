"""Programs of one tiled convolution, written straight from the tiling: every tile loads all that it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.isa import (
    Dataflow,
    Halt,
    Instruction,
    Load,
    Loops,
    Marker,
    Matmul,
    Output,
    Preload,
    Program,
    Space,
    Store,
    Sum,
    Sync,
    Tensor,
    Token,
    Window,
)
from accel_sim.spec import MachineSpec

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Conv:
    """A convolution of three axes, its tiling, and how its result becomes bytes.

    ``pads``: at the begin and at the end of each axis. ``rows``: output rows per tile, 0: ``images`` whole images.
    ``scale``/``zero``: of the output; the input's zero point is ``pad_value``.
    """

    channels: int
    filters: int
    size: Triple
    kernel: Triple
    strides: Triple = (1, 1, 1)
    dilations: Triple = (1, 1, 1)
    pads: tuple[Triple, Triple] = ((0, 0, 0), (0, 0, 0))
    batch: int = 1
    images: int = 1
    rows: int = 0
    tile_filters: int = 16
    tile_channels: int = 16
    filters_first: bool = False
    dataflow: Dataflow = Dataflow.WEIGHT_STATIONARY
    bias: bool = True
    residual: bool = False
    signed: bool = True
    pad_value: int = 0
    scale: float = 2.0**-9
    zero: int = 3

    @property
    def out(self) -> Triple:
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        depth, height, width = (
            (size + self.pads[0][a] + self.pads[1][a] - reach[a]) // self.strides[a] + 1
            for a, size in enumerate(self.size)
        )
        return depth, height, width


SUM = Sum(0.75, 1.25, 2.5, -128, 127, True, True, True, True)
"""How a residual is added."""


class _Writer:
    def __init__(self, conv: Conv, spec: MachineSpec, weight: NDArray[np.int8], bias: NDArray[np.int32]) -> None:
        self.conv = conv
        self.columns = spec.array.columns
        self.code: list[Instruction] = [Sync(0)]
        self.windows: list[Window] = []
        self.constants = bytearray()
        self.weight, self.bias = weight, bias
        self.steps: list[tuple[int, int, int, int]] = []  # image, first row, first filter, first channel

    def blocks(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Runs of equal blocks: (first channel, width, number of blocks)."""
        whole, rest = divmod(count, self.columns)
        found = [(first, self.columns, whole)] if whole else []
        return [*found, (first + whole * self.columns, rest, 1)] if rest else found


def write(conv: Conv, spec: MachineSpec, weight: NDArray[np.int8], bias: NDArray[np.int32]) -> Program:
    """``weight`` is (filters, channels, *kernel), ``bias`` (filters,). Tensors: x, y, and r if there is a residual."""
    writer = _Writer(conv, spec, weight, bias)
    buffers = 2 if spec.scratchpads.double_buffered else 1
    depth, height, width = conv.size
    out = conv.out
    columns = writer.columns
    per_image = prod(conv.size)
    rows = conv.rows or out[1]
    images = 1 if conv.rows else conv.images
    assert not conv.rows or out[0] == depth == 1
    positions = [(i, r) for i in range(0, conv.batch, images) for r in range(0, out[1], rows)]
    filters = range(0, conv.filters, conv.tile_filters)
    tiles = [(p, f) for p in positions for f in filters]
    if conv.filters_first:
        tiles = [(p, f) for f in filters for p in positions]
    channels = range(0, conv.channels, conv.tile_channels)
    steps = [(tile, c) for tile in range(len(tiles)) for c in channels]

    x_bytes, y_bytes = conv.batch * conv.channels * per_image, conv.batch * conv.filters * prod(out)
    y_at, r_at = x_bytes, x_bytes + y_bytes
    constants_at = r_at + (y_bytes if conv.residual else 0)
    input_room = images * per_image * conv.tile_channels
    weight_room = prod(conv.kernel) * conv.tile_channels * conv.tile_filters + 4 * conv.tile_filters
    weights_from = buffers * input_room
    tile_room = images * rows * out[0] * out[2] * conv.tile_filters
    residuals_from = buffers * tile_room * 4
    assert weights_from + buffers * weight_room <= 1024 * (spec.scratchpads.input_kib + spec.scratchpads.weight_kib)
    assert residuals_from + buffers * tile_room <= 1024 * spec.scratchpads.accumulator_kib
    pieces: dict[tuple[int, int], tuple[int, int]] = {}

    for step, (tile, c) in enumerate(steps):
        (image, row), f = tiles[tile]
        slot, own = step % buffers, tile % buffers
        count = min(images, conv.batch - image)
        n, k = min(conv.tile_filters, conv.filters - f), min(conv.tile_channels, conv.channels - c)
        some = min(rows, out[1] - row)
        begin = max(row * conv.strides[1] - conv.pads[0][1], 0) if conv.rows else 0
        end = height
        if conv.rows:
            reach = conv.dilations[1] * (conv.kernel[1] - 1) + 1
            end = min((row + some - 1) * conv.strides[1] - conv.pads[0][1] + reach, height)
        begin = min(begin, end)
        extent = (depth, end - begin, width)
        loads: list[Load] = []
        for i in range(count):
            chip = slot * input_room + i * k * prod(extent)
            for first, lanes, number in writer.blocks(c, k):
                loads.append(
                    Load(
                        (image + i) * conv.channels * per_image + first * per_image + begin * width * lanes,
                        chip + (first - c) * prod(extent),
                        Loops(
                            prod(extent) * lanes,
                            (1, 1, number),
                            (0, 0, per_image * lanes),
                            (0, 0, prod(extent) * lanes),
                        ),
                    )
                )
        if (f, c) not in pieces:
            at = len(writer.constants)
            part = weight[f : f + n, c : c + k].transpose(2, 3, 4, 1, 0)
            writer.constants += np.ascontiguousarray(part).tobytes()
            if c == 0 and conv.bias:
                writer.constants += bias[f : f + n].astype("<i4").tobytes()
            pieces[f, c] = at, len(writer.constants) - at
        at, size = pieces[f, c]
        weights = weights_from + slot * weight_room
        loads.append(Load(constants_at + at, weights, Loops(size)))
        area, pixels = prod(out), some * out[0] * out[2]
        residual_at = residuals_from + own * tile_room
        if conv.residual and c == 0:
            for i in range(count):
                for first, lanes, number in writer.blocks(f, n):
                    loads.append(
                        Load(
                            r_at + (image + i) * conv.filters * area + first * area + row * out[2] * lanes,
                            residual_at + (first - f) * pixels * count + i * pixels * lanes,
                            Loops(
                                pixels * lanes,
                                (1, 1, number),
                                (0, 0, area * lanes),
                                (0, 0, pixels * count * lanes),
                            ),
                            Space.ACCUMULATOR,
                        )
                    )
        wait = Token.FREED if step >= buffers else Token.NONE
        for place, load in enumerate(loads):
            writer.code.append(
                replace(
                    load,
                    chained=place > 0,
                    wait=Token.NONE if place else wait,
                    post=Token.LOADED if place == len(loads) - 1 else Token.NONE,
                )
            )
        window = Window(
            *(count, k, extent, (out[0], some, out[2]), conv.kernel, conv.strides, conv.dilations),
            (-conv.pads[0][0], row * conv.strides[1] - conv.pads[0][1] - begin, -conv.pads[0][2]),
            *(conv.pad_value, conv.signed),
        )
        if window not in writer.windows:
            writer.windows.append(window)
        wait = Token.LOADED
        if c == 0 and tile >= buffers:
            wait |= Token.STORED
        if conv.dataflow != Dataflow.OUTPUT_STATIONARY:
            writer.code.append(Preload(wait=wait))
            wait = Token.NONE
        last = c + conv.tile_channels >= conv.channels
        post = Token.FREED if step + buffers < len(steps) else Token.NONE
        if last:
            post |= Token.COMPUTED
        writer.code.append(
            Matmul(
                *(writer.windows.index(window), slot * input_room, weights, own * tile_room * 4, k, n),
                bias_address=weights + prod(conv.kernel) * k * n if c == 0 and conv.bias else -1,
                accumulate=c > 0,
                dataflow=conv.dataflow,
                wait=wait,
                post=post,
            )
        )
        if not last:
            continue
        stores: list[Store] = []
        for i in range(count):
            for first, lanes, number in writer.blocks(f, n):
                offset = (first - f) * pixels * count + i * pixels * lanes
                stores.append(
                    Store(
                        y_at + (image + i) * conv.filters * area + first * area + row * out[2] * lanes,
                        own * tile_room * 4 + offset * 4,
                        Loops(
                            pixels * lanes,
                            (number, 1, 1),
                            (area * lanes, 0, 0),
                            (pixels * count * lanes, 0, 0),
                        ),
                        lanes,
                        output=0,
                        first_channel=first,
                        block_channels=lanes,
                        residual_address=residual_at + offset if conv.residual else -1,
                    )
                )
        post = Token.STORED if tile + buffers < len(tiles) else Token.NONE
        for place, store in enumerate(stores):
            writer.code.append(
                replace(
                    store,
                    chained=place > 0,
                    wait=Token.NONE if place else Token.COMPUTED,
                    post=post if place == len(stores) - 1 else Token.NONE,
                )
            )
    writer.code.append(Halt())
    assert columns == writer.columns
    x = Tensor("x", (conv.batch, conv.channels, *conv.size), 0, 0.5, conv.pad_value, conv.signed, "input")
    y = Tensor("y", (conv.batch, conv.filters, *out), y_at, 0.25, conv.zero, True, "output")
    r = Tensor("r", (conv.batch, conv.filters, *out), r_at, 0.25, 0, True, "input")
    macs = conv.batch * prod(out) * conv.filters * conv.channels * prod(conv.kernel)
    return Program(
        spec_hash=b"",
        columns=columns,
        code=tuple(writer.code),
        windows=tuple(writer.windows),
        outputs=(Output(0, True, conv.zero, -128, 127, True, sum=0 if conv.residual else -1),),
        sums=(SUM,) if conv.residual else (),
        vectors=(),
        scales=tuple(float(np.float32(conv.scale * (1 + 0.01 * f))) for f in range(conv.filters)),
        tables=(),
        tensors=(x, y, r) if conv.residual else (x, y),
        markers=(Marker("conv", "Conv", macs=macs),),
        calls=(),
        constants=bytes(writer.constants),
        constants_address=constants_at,
        dram_bytes=constants_at + len(writer.constants),
    )
