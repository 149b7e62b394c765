"""Random layers, and what torch makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from passes.core.fit import FitProblem
from passes.core.site import Geometry, Stage

Array = NDArray[Any]


@st.composite
def layers(draw: st.DrawFn, linear: bool = True) -> tuple[Stage, Array]:
    """A float64 stage of 0 to 3 axes with everything a Geometry can say, and an input of two samples for it."""
    ndim = draw(st.integers(0 if linear else 1, 3))

    def axis(low: int, high: int, count: int = ndim) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    groups, transposed = draw(st.sampled_from([1, 1, 2, 3])), ndim > 0 and draw(st.booleans())
    kernel, strides, dilations = axis(1, 3), axis(1, 3), axis(1, 2)
    extra: tuple[int, ...] = ()
    if transposed:  # torch: output padding must be smaller than the stride or the dilation
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True))
    geometry = Geometry(kernel, strides, dilations, axis(0, 2, 2 * ndim), groups, transposed, extra)
    ins, outs = draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bias = rng.standard_normal(outs) if draw(st.booleans()) else None
    stage = Stage(rng.standard_normal((outs, ins, *kernel)), bias, geometry)
    # the widest kernel reaches over 5, so nothing comes out empty
    return stage, rng.standard_normal((2, stage.in_channels, *axis(5, 6)))


def torch_reference(stage: Stage, x: Array) -> Array:
    """The stage by torch's own operators, its own padding wherever it has one."""
    g, n = stage.geometry, stage.geometry.ndim
    weight = torch.from_numpy(np.array(stage.weight))
    bias = None if stage.bias is None else torch.from_numpy(np.array(stage.bias))
    value = torch.from_numpy(x)
    if n == 0:
        parts = zip(value.chunk(g.groups, 1), weight.chunk(g.groups, 0), strict=True)
        y = torch.cat([torch.nn.functional.linear(part, own) for part, own in parts], 1)
        return (y if bias is None else y + bias).numpy()
    begin, end = g.pads[:n], g.pads[n:]
    if not g.transposed:
        if begin != end:
            value = torch.nn.functional.pad(value, [p for a in reversed(range(n)) for p in (begin[a], end[a])])
        conv: Any = (torch.conv1d, torch.conv2d, torch.conv3d)[n - 1]
        y = conv(value, weight, bias, g.strides, begin if begin == end else 0, g.dilations, g.groups)
        return np.asarray(y)
    own = torch.cat([part.swapaxes(0, 1) for part in weight.chunk(g.groups, 0)], 0)  # torch: (I, O/groups, *kernel)
    deconv: Any = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[n - 1]
    if begin == end:
        return np.asarray(deconv(value, own, bias, g.strides, begin, g.output_padding, g.groups, g.dilations))
    y = deconv(value, own, bias, g.strides, 0, g.output_padding, g.groups, g.dilations)
    crop = tuple(slice(begin[a], y.shape[2 + a] - end[a]) for a in range(n))
    return np.asarray(y[(slice(None), slice(None), *crop)])


def covariance(groups: int, size: int, rng: np.random.Generator) -> Array:
    """A random covariance (g, size, size) whose eigenvalues span about two decades."""
    root = rng.standard_normal((groups, size, 2 * size)) * np.geomspace(1, 0.1, size)[:, None]
    return root @ root.swapaxes(1, 2) / size


def root_of(matrix: Array) -> Array:
    """The symmetric square root of a stack of positive definite matrices."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values)[:, None, :]) @ vectors.swapaxes(1, 2))


def problem_of(weight: Array, metric: str, seed: int = 0) -> FitProblem:
    """The problem of approximating ``weight`` (g, O, I, *kernel); ``metric`` names what is random: none, in, both."""
    rng = np.random.default_rng(seed)
    groups, out = weight.shape[:2]
    gram = covariance(groups, int(np.prod(weight.shape[2:])), rng) if metric in ("in", "both") else None
    root = root_of(covariance(groups, out, rng)) if metric == "both" else None
    return FitProblem(weight, gram, root)
