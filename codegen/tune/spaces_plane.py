"""A workload as the templates see it: every convolution in two spatial axes, a 1-D one of height 1."""

from __future__ import annotations

from dataclasses import dataclass, replace

from codegen.tune.workload import Workload

Pair = tuple[int, int]


@dataclass(frozen=True)
class Plane:
    """A convolution's sizes. ``pads``: top, left, bottom, right. ``groups``: each has ``ic`` and ``oc`` channels."""

    batch: int
    groups: int
    ic: int
    oc: int
    size: Pair
    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: tuple[int, int, int, int]

    @classmethod
    def of(cls, workload: Workload) -> Plane | None:
        """None for what is no plain convolution of one or two axes."""
        work, g = workload.work, workload.work.geometry
        if g.ndim not in (1, 2) or g.transposed:
            return None
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

    @property
    def out(self) -> Pair:
        """Output height and width."""
        reach = self.reach
        high, wide = (self.size[a] + self.pads[a] + self.pads[a + 2] - reach[a] for a in (0, 1))
        return high // self.strides[0] + 1, wide // self.strides[1] + 1

    @property
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
