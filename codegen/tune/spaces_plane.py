"""A workload as the templates see it: every convolution in two spatial axes, a 1-D one of height 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from codegen.tune.workload import Workload
from passes.core.cost import StageWork

Pair = tuple[int, int]


@dataclass(frozen=True)
class Plane:
    """A convolution's sizes. ``pads``: top, left, bottom, right. ``groups``: each has ``ic`` and ``oc`` channels.

    A transposed convolution of stride s is one of stride 1 with s x s times the channels, of which each computes the
    outputs of one phase: ``shuffle`` is s per axis then, and ``oc`` counts phase by phase in a group. The kernel is the
    window of inputs that any phase reads.
    """

    batch: int
    groups: int
    ic: int
    oc: int
    size: Pair
    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: tuple[int, int, int, int]
    shuffle: Pair = (1, 1)

    @classmethod
    def of(cls, workload: Workload) -> Plane | None:
        """None for what is no convolution of one or two axes, and for a transposed one with dilations."""
        work, g = workload.work, workload.work.geometry
        if g.ndim not in (1, 2):
            return None
        if g.transposed:
            return cls._transposed(work)
        n = g.ndim
        begin, end = _two(g.pads[:n], 0), _two(g.pads[n:], 0)
        return cls(
            work.batch,
            g.groups,
            work.in_channels // g.groups,
            work.out_channels // g.groups,
            _two(work.spatial, 1),
            _two(g.kernel, 1),
            _two(g.strides, 1),
            _two(g.dilations, 1),
            (*begin, *end),
        )

    @classmethod
    def _transposed(cls, work: StageWork) -> Plane | None:
        g, n = work.geometry, work.geometry.ndim
        kernel, strides, begin = _two(g.kernel, 1), _two(g.strides, 1), _two(g.pads[:n], 0)
        if any(d != 1 for d in g.dilations) or any(p >= k for p, k in zip(begin, kernel, strict=True)):
            return None
        size, final = _two(work.spatial, 1), _two(work.output_spatial, 1)
        windows = [phase_window(k, s, p) for k, s, p in zip(kernel, strides, begin, strict=True)]
        taps = windows[0][1] - windows[0][0] + 1, windows[1][1] - windows[1][0] + 1
        first = -windows[0][0], -windows[1][0]
        bottom, right = (-(-final[a] // strides[a]) - 1 + taps[a] - size[a] - first[a] for a in (0, 1))
        return cls(
            work.batch,
            g.groups,
            work.in_channels // g.groups,
            work.out_channels // g.groups * strides[0] * strides[1],
            size,
            taps,
            (1, 1),
            (1, 1),
            (*first, bottom, right),
            strides,
        )

    @cached_property
    def out(self) -> Pair:
        """Output height and width."""
        reach = self.reach
        high, wide = (self.size[a] + self.pads[a] + self.pads[a + 2] - reach[a] for a in (0, 1))
        return high // self.strides[0] + 1, wide // self.strides[1] + 1

    @cached_property
    def reach(self) -> Pair:
        """Input rows and columns that one output reads."""
        return (self.kernel[0] - 1) * self.dilations[0] + 1, (self.kernel[1] - 1) * self.dilations[1] + 1

    def needed(self, out: Pair) -> Pair:
        """Rows and columns of padded input that ``out`` output rows and columns read."""
        reach = self.reach
        return (out[0] - 1) * self.strides[0] + reach[0], (out[1] - 1) * self.strides[1] + reach[1]

    def flattened(self) -> Plane:
        """A pointwise convolution with all its positions in one row."""
        return replace(self, size=(1, self.size[0] * self.size[1]))

    @property
    def is_depthwise(self) -> bool:
        """Every output channel reads one input channel."""
        return self.groups > 1 and self.ic == 1

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.pads)

    @property
    def macs(self) -> int:
        """Multiply-adds that do not count as waste."""
        return (
            self.batch * self.groups * self.ic * self.oc * self.kernel[0] * self.kernel[1] * self.out[0] * self.out[1]
        )


def _two(values: tuple[int, ...], one: int) -> Pair:
    return (one, values[0]) if len(values) == 1 else (values[0], values[1])


def rounded(size: int, tile: int) -> int:
    """``size`` rounded up to a multiple of ``tile``."""
    return -(-size // tile) * tile


def phase_window(kernel: int, stride: int, pad: int) -> tuple[int, int]:
    """The first and the last input, relative to q, that outputs q * stride + r of a transposed convolution read.

    Output q * stride + r takes tap ``(r + pad) % stride + j * stride`` times input ``q + (r + pad) // stride - j``.
    """
    offsets = [(r + pad) // stride for r in range(stride)]
    taps = [-(-(kernel - (r + pad) % stride) // stride) for r in range(stride)]
    return min(o - t + 1 for o, t in zip(offsets, taps, strict=True) if t > 0), max(offsets)
