"""The kernel that is tuned: one conv or linear layer with its bias and clamp, as shapes and no values.

Every weight of the same shapes is the same workload, in any network, whatever stands around it: what is added or
clamped behind it is computed in the same loops. So a trial serves every network that has such a layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

from passes.core.cost import StageWork
from passes.core.site import Geometry

_OPTION = re.compile(r", ([a-z_]+) ([0-9x]+(?:,[0-9]+)*)")
_KEY = re.compile(r"(conv|conv_transpose|linear) ([0-9x]+) -> (\d+)((?:, [a-z_]+ [0-9x]+(?:,[0-9]+)*)*), ([a-z0-9]+)")


@dataclass(frozen=True)
class Workload:
    """``work`` always with its bias; ``dtype`` as NumPy names it."""

    work: StageWork
    dtype: str = "float32"

    @classmethod
    def of(cls, work: StageWork, dtype: str = "float32") -> Self:
        """The workload of a stage, with or without a bias of its own."""
        return cls(replace(work, bias=True), dtype)

    @property
    def key(self) -> str:
        """A line of text that names the workload, the same in every process and version: :meth:`parse` reads it.

        ``conv 1x16x32x32 -> 16, kernel 3x3, pads 1,1,1,1, float32``
        """
        work, geometry = self.work, self.work.geometry
        op = ("conv_transpose" if geometry.transposed else "conv") if geometry.ndim else "linear"
        parts = [f"{op} {_cross((work.batch, work.in_channels, *work.spatial))} -> {work.out_channels}"]
        plain = Geometry(geometry.kernel)
        if geometry.ndim:
            parts.append(f"kernel {_cross(geometry.kernel)}")
        parts += [
            f"{name} {','.join(map(str, getattr(geometry, name)))}"
            for name in ("strides", "dilations", "pads", "output_padding")
            if getattr(geometry, name) != getattr(plain, name)
        ]
        if geometry.groups != 1:
            parts.append(f"groups {geometry.groups}")
        return ", ".join((*parts, self.dtype))

    @classmethod
    def parse(cls, key: str) -> Self:
        """The workload of a :attr:`key`. Raises ValueError for a text that is none."""
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{key!r} names no workload")
        op, shape, out, rest, dtype = found.groups()
        batch, channels, *spatial = (int(v) for v in shape.split("x"))
        options = dict(_OPTION.findall(rest))
        kernel = tuple(int(v) for v in options.pop("kernel", "").split("x") if v)
        groups = int(options.pop("groups", "1"))
        lists = {name: tuple(int(v) for v in values.split(",")) for name, values in options.items()}
        unknown = set(lists) - {"strides", "dilations", "pads", "output_padding"}
        if unknown or len(kernel) != len(spatial):
            raise ValueError(f"{key!r} names no workload")
        geometry = Geometry(kernel, groups=groups, transposed=op == "conv_transpose", **lists)
        return cls(StageWork(geometry, channels, int(out), tuple(spatial), batch), dtype)


def _cross(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
