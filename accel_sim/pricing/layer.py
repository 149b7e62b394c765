"""Layers as rows of a table: convolutions of up to three axes and GEMMs in one form, shapes and no values.

A GEMM of M rows is a batch of M images of one pixel. A group's convolution is the GEMM M x K x N with
M = batch x output positions, K = channels of the group x taps, N = filters of the group (im2col, packed: the K axis
of the array is filled across taps and channels alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYER = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("batch", "groups", "channels", "filters", "taps", "bias"),
            *("out_d", "out_h", "out_w", "in_d", "in_h", "in_w"),
            *("stride_d", "stride_h", "stride_w", "reach_d", "reach_h", "reach_w", "pad_d", "pad_h", "pad_w"),
            *("macs", "input_on_chip", "output_on_chip", "reserved_bytes", "residual"),
        )
    ]
)
"""One layer: ``channels`` and ``filters`` per group; ``reach`` = dilated extent of the kernel, ``pad`` = at the begin.

``input_on_chip``/``output_on_chip``: the map is in the scratchpad before / stays there after, and ``reserved_bytes``
of the scratchpad are taken by such maps. ``residual``: a second map of the output's shape is added to it.
"""


@dataclass(frozen=True)
class Layer:
    """One convolution or GEMM. ``out``, ``size`` (input), ``stride``, ``reach`` and ``pad`` are (depth, height, width).

    ``channels`` and ``filters`` count per group. ``macs`` are the useful multiply-adds, zero weights that the mapping
    adds left out. ``input_elements``/``output_elements`` are the sizes of the whole maps. ``residual``: a map of the
    output's shape is loaded from DRAM into the accumulators, tile by tile, and so added to the output.
    """

    batch: int
    groups: int
    channels: int
    filters: int
    taps: int
    bias: bool
    out: tuple[int, int, int]
    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    reach: tuple[int, int, int]
    pad: tuple[int, int, int]
    macs: int
    output_elements: int
    residual: bool = False

    @property
    def input_elements(self) -> int:
        return self.batch * self.groups * self.channels * prod(self.size)

    def row(
        self, input_on_chip: bool = False, output_on_chip: bool = False, reserved_bytes: int = 0
    ) -> tuple[int, ...]:
        """The layer as one row of :data:`LAYER`. A sum with a residual goes to DRAM: ValueError if it should stay."""
        if self.residual and output_on_chip:
            raise ValueError("a result that a residual is added to cannot stay on chip")
        return (
            *(self.batch, self.groups, self.channels, self.filters, self.taps, int(self.bias)),
            *(*self.out, *self.size, *self.stride, *self.reach, *self.pad),
            *(self.macs, int(input_on_chip), int(output_on_chip), reserved_bytes, int(self.residual)),
        )


def layer_table(rows: Sequence[tuple[int, ...]]) -> NDArray[Any]:
    """Rows of :meth:`Layer.row` as an array of :data:`LAYER`, shape (len(rows),)."""
    return np.array(rows, dtype=LAYER)


def gemm_layer(m: int, k: int, n: int, bias: bool = False) -> Layer:
    """M x K times K x N."""
    one = (1, 1, 1)
    return Layer(m, 1, k, n, 1, bias, one, one, one, one, (0, 0, 0), m * k * n, m * n)


def conv_layer(
    in_channels: int,
    out_channels: int,
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    groups: int = 1,
    batch: int = 1,
    bias: bool = True,
) -> Layer:
    """A convolution with ``len(kernel)`` spatial axes, 0 to 3; ``pads`` are all begins, then all ends (ONNX)."""
    n = len(kernel)
    if n > 3 or len(spatial) != n:
        raise ValueError(f"a kernel of {n} axes on {len(spatial)} axes: both must have the same number, at most 3")
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"{in_channels} -> {out_channels} channels do not divide into {groups} groups")
    strides, dilations, pads = strides or (1,) * n, dilations or (1,) * n, pads or (0,) * 2 * n
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
    out = tuple((s + pads[a] + pads[a + n] - reach[a]) // strides[a] + 1 for a, s in enumerate(spatial))
    if min((*out, *spatial, batch), default=1) < 1:
        raise ValueError(f"a kernel of {tuple(kernel)} on {tuple(spatial)} with pads {tuple(pads)} has no output")
    positions = batch * prod(out)
    taps = prod(kernel)
    return Layer(
        *(batch, groups, in_channels // groups, out_channels // groups, taps, bias),
        *(_three(out), _three(spatial), _three(strides), _three(reach), _three(pads[:n], 0)),
        macs=positions * out_channels * (in_channels // groups) * taps,
        output_elements=positions * out_channels,
    )


def transposed_conv_layer(
    in_channels: int,
    out_channels: int,
    spatial: Sequence[int],
    output_spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    groups: int = 1,
    batch: int = 1,
    bias: bool = True,
) -> Layer:
    """A transposed convolution as one sub-pixel convolution: each phase of the stride has its own filters.

    Output o = stride * q + phase meets tap t at input q + (phase + pad - dilation * t) / stride, where that is whole.
    So the layer is a stride-1 convolution of the input with prod(strides) x filters, whose K axis holds as many taps
    as the fullest phase has; phases with fewer are filled up with zero weights (their cycles and bytes count, their
    MACs do not). The store puts the phases in their places.
    """
    taps, phases, reaches, begins, coarse = 1, 1, [], [], []
    for k, s, d, begin, o in zip(kernel, strides, dilations, pads, output_spatial, strict=False):
        steps = [[(p + begin - d * t) // s for t in range(k) if (p + begin - d * t) % s == 0] for p in range(s)]
        taps *= max(map(len, steps))
        phases *= s
        offsets = [step for phase in steps for step in phase]
        reaches.append(max(offsets) - min(offsets) + 1)
        begins.append(-min(offsets))
        coarse.append(-(-o // s))
    weights = out_channels * (in_channels // groups) * prod(kernel)
    plain = conv_layer(in_channels, out_channels * phases, spatial, (1,) * len(kernel), groups=groups, batch=batch)
    return replace(
        plain,
        taps=taps,
        bias=bias,
        out=_three(coarse),
        reach=_three(reaches),
        pad=_three(begins, 0),
        macs=batch * prod(spatial) * weights,
        output_elements=batch * out_channels * prod(output_spatial),
    )


def _three(values: Sequence[int], fill: int = 1) -> tuple[int, int, int]:
    """Axes as (depth, height, width); a kernel of fewer axes fills the last ones."""
    padded = (*(fill,) * (3 - len(values)), *values)
    return padded[0], padded[1], padded[2]
