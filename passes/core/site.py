"""The vocabulary of the compiler: geometry, stage, chain, site.

A linear layer is a convolution with no spatial axes, so one set of types serves every frontend and every format:
``Geometry()`` is a linear layer, ``Geometry.pointwise(2)`` a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; n spatial axes, n = ``len(kernel)``, n = 0 for a linear layer.

    ``pads`` are ONNX's: all begins, then all ends. ``output_padding`` belongs to transposed convolutions only.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.kernel)
        defaults = {"strides": (1,) * n, "dilations": (1,) * n, "pads": (0,) * (2 * n), "output_padding": (0,) * n}
        for name, default in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, default)
            if len(getattr(self, name)) != len(default):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, a {n}-D kernel needs {len(default)}")
        if self.groups < 1:
            raise ValueError(f"groups is {self.groups}, must be at least 1")

    @classmethod
    def pointwise(cls, ndim: int, groups: int = 1) -> Geometry:
        """A 1x1 convolution with ``ndim`` spatial axes; a linear layer for ``ndim`` 0."""
        return cls(kernel=(1,) * ndim, groups=groups)

    @property
    def ndim(self) -> int:
        return len(self.kernel)

    @property
    def is_pointwise(self) -> bool:
        """True if each output position depends on the input at the same position alone."""
        plain = all(k == 1 for k in self.kernel) and all(s == 1 for s in self.strides)
        return plain and not any(self.pads) and not any(self.output_padding)

    def output_spatial(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size, both of length n."""
        n = self.ndim
        out = []
        for axis, size in enumerate(spatial):
            reach = self.dilations[axis] * (self.kernel[axis] - 1) + 1
            pad = self.pads[axis] + self.pads[axis + n]
            if self.transposed:
                out.append((size - 1) * self.strides[axis] + reach - pad + self.output_padding[axis])
            else:
                out.append((size + pad - reach) // self.strides[axis] + 1)
        return tuple(out)


@dataclass(frozen=True, eq=False)
class Stage:
    """One convolution or linear layer as arrays.

    ``weight``: (O, I/groups, *kernel), output channels first even for a transposed convolution (ONNX stores those
    input-first; frontends convert). ``bias``: (O,) or None. Both float32 or float64.
    """

    weight: Array
    bias: Array | None
    geometry: Geometry = field(default_factory=Geometry)

    def __post_init__(self) -> None:
        g = self.geometry
        if self.weight.ndim != 2 + g.ndim or self.weight.shape[2:] != g.kernel:
            raise ValueError(f"weight of shape {self.weight.shape} does not fit a kernel of {g.kernel}")
        if self.weight.shape[0] % g.groups:
            raise ValueError(f"{self.weight.shape[0]} output channels do not divide into {g.groups} groups")
        if self.bias is not None and self.bias.shape != (self.weight.shape[0],):
            raise ValueError(f"bias of shape {self.bias.shape}, expected ({self.weight.shape[0]},)")

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.geometry.groups

    @property
    def params(self) -> int:
        """Number of weights and biases."""
        return int(self.weight.size) + (0 if self.bias is None else int(self.bias.size))

    def macs(self, positions: int) -> int:
        """Multiply-adds for ``positions`` = batch x spatial positions.

        They are output positions, except for a transposed convolution, where each *input* position meets every tap.
        """
        return positions * int(self.weight.size)

    def grouped_weight(self) -> Array:
        """The weight as (groups, O/groups, I/groups, *kernel); a view."""
        g = self.geometry.groups
        return self.weight.reshape(g, self.out_channels // g, *self.weight.shape[1:])

    def affine(self, scale: Array, shift: Array) -> Stage:
        """The stage followed by ``y * scale + shift`` per output channel, both of shape (O,)."""
        wide = scale.reshape(-1, *(1,) * (self.weight.ndim - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        return replace(self, weight=(self.weight * wide).astype(self.weight.dtype), bias=bias.astype(self.weight.dtype))


@dataclass(frozen=True, eq=False)
class Chain:
    """Stages applied one after another, with nothing in between: what replaces a site.

    ``format`` and ``rank`` say where it came from; a dense layer is the chain of its one stage.
    """

    stages: tuple[Stage, ...]
    format: str = "dense"
    rank: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a chain has at least one stage")
        for first, second in zip(self.stages, self.stages[1:], strict=False):
            if first.out_channels != second.in_channels:
                raise ValueError(f"stage gives {first.out_channels} channels, the next takes {second.in_channels}")

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def params(self) -> int:
        return sum(stage.params for stage in self.stages)

    def shapes(self, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Spatial sizes before the first stage and after each one: ``len(self) + 1`` tuples."""
        steps = [spatial]
        for stage in self.stages:
            steps.append(stage.geometry.output_spatial(steps[-1]) if stage.geometry.ndim else steps[-1])
        return tuple(steps)


@dataclass(frozen=True, eq=False)
class Site:
    """A conv or linear node of the user's network that may be replaced by a chain.

    ``name`` is unique in the graph and is what ``--include`` matches; ``op`` is the frontend's operator.
    ``input`` and ``output`` name the tensors. ``input_shape`` is concrete (symbolic dimensions bound), with channels
    on ``channel_axis``: 1 for convolutions, -1 for ``x @ W``, -2 for ``W @ x``. ``in_body`` marks sites inside a
    control-flow body: those cannot be stepped through, so they get no calibration statistics.
    ``weight_key`` is equal for sites that read one and the same weight tensor.
    """

    name: str
    op: str
    stage: Stage
    input: str
    output: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channel_axis: int
    in_body: bool = False
    weight_key: str = ""

    @property
    def spatial(self) -> tuple[int, ...]:
        """Spatial input size; () for a linear layer."""
        return self.input_shape[2:] if self.stage.geometry.ndim else ()

    @property
    def batch(self) -> int:
        """How many independent samples one inference holds: rows of a linear layer, images of a convolution."""
        if self.stage.geometry.ndim:
            return self.input_shape[0]
        return prod(self.input_shape) // self.input_shape[self.channel_axis]


def compose(stages: tuple[Stage, ...]) -> Array:
    """The weight (groups, O/groups, I/groups, *kernel) of one convolution that equals ``stages`` in sequence.

    The kernels' extents add up per axis: K = 1 + sum(k - 1). Holds for chains whose inner padding adds nothing,
    that is, where no bias stands before a padded stage; every format of rankc is built so. Tap order of transposed
    stages follows the same rule, so a chain of one transposed stage and pointwise ones composes as well.
    """
    if len({stage.geometry.groups for stage in stages}) != 1:
        raise ValueError("stages of one chain share one number of groups")

    def then(first: Array, second: Array) -> Array:
        kernel = tuple(a + b - 1 for a, b in zip(first.shape[3:], second.shape[3:], strict=True))
        out = np.zeros((*second.shape[:2], first.shape[2], *kernel), np.result_type(first, second))
        for tap in np.ndindex(*second.shape[3:]):
            part = np.matmul(second[(..., *tap)], first.reshape(*first.shape[:2], -1))
            part = part.reshape(*second.shape[:2], *first.shape[2:])
            window = tuple(slice(t, t + k) for t, k in zip(tap, first.shape[3:], strict=True))
            out[(slice(None), slice(None), slice(None), *window)] += part
        return out

    return reduce(then, (stage.grouped_weight() for stage in stages))
