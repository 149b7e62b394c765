"""Float64 reference of stages and chains: slow, plain, and the judge of everything else."""

from __future__ import annotations

import numpy as np

from passes.core.patches import patches, positions
from passes.core.site import Array, Chain, Stage


def apply_stage(stage: Stage, x: Array) -> Array:
    """The stage on ``x``: (N, C, *spatial) -> (N, O, *output spatial); (N, C) -> (N, O) when linear. float64."""
    geometry = stage.geometry
    x = np.asarray(x, np.float64)
    grid = positions(geometry, x.shape) if geometry.ndim else (x.shape[0],)
    columns = patches(x, geometry, np.arange(int(np.prod(grid))))
    weight = stage.grouped_weight().astype(np.float64)
    weight = weight.reshape(*weight.shape[:2], -1)
    y = np.einsum("gnk,gok->ngo", columns, weight).reshape(*grid, stage.out_channels)
    if stage.bias is not None:
        y = y + stage.bias
    return np.moveaxis(y, -1, 1)


def apply_chain(chain: Chain, x: Array) -> Array:
    """The chain's stages one after another, in float64."""
    for stage in chain.stages:
        x = apply_stage(stage, x)
    return x


def relative_l2(value: Array, reference: Array) -> float:
    """|value - reference| / |reference| in float64; the plain norm of ``value`` where the reference is zero."""
    reference = np.asarray(reference, np.float64)
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(np.asarray(value, np.float64) - reference)) / (norm if norm > 0 else 1.0)
