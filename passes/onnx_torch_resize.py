"""Resize and Upsample in torch: along each axis a matrix, so that gradients flow whatever the mode.

Coordinates are computed in float32, in the order of onnxruntime: on a tie, nearest depends on the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from passes.onnx_attributes import Attributes

Tensor = torch.Tensor
Floats = NDArray[np.floating[Any]]


def resize(attributes: Attributes, inputs: Sequence[Tensor | None], opset: int) -> list[Tensor] | None:
    """None for what depends on a region or filters beforehand, and for rules of older opsets that were not written."""
    x, *rest = [*inputs, None, None, None][:4]
    assert x is not None
    mode = attributes.get("mode", "nearest")
    if opset < 11:  # Upsample, and the first Resize: scales alone, measured from the corner
        scales, sizes, rule, nearest = rest[0], None, "asymmetric", "floor"
        listed = attributes.get("scales", None) if scales is None else scales.tolist()
        if listed is None or (mode == "nearest" and any(s < 1 for s in listed)):
            return None
    else:
        scales, sizes = rest[1:3]
        rule = attributes.get("coordinate_transformation_mode", "half_pixel")
        nearest = attributes.get("nearest_mode", "round_prefer_floor")
        listed = None if scales is None or not scales.numel() else scales.tolist()
    stretched = attributes.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if x.dtype != torch.float32 or rule not in _COORDINATES or attributes.get("antialias", 0) or not stretched:
        return None
    axes = [a % x.ndim for a in attributes.get("axes", range(x.ndim))]
    if listed is not None:
        ratios = [np.float32(s) for s in listed]
        outs = [int(np.floor(np.float32(x.shape[a]) * s)) for a, s in zip(axes, ratios, strict=True)]
    else:
        outs = [x.shape[a] for a in axes] if sizes is None else sizes.tolist()
        ratios = [np.float32(out) / np.float32(x.shape[a]) for a, out in zip(axes, outs, strict=True)]
    if outs == [x.shape[a] for a in axes]:  # then onnxruntime copies, whatever the scales are
        return [x]
    for axis, scale, out in zip(axes, ratios, outs, strict=True):
        size = x.shape[axis]
        if scale == 1:
            continue
        at = _COORDINATES[rule](np.arange(out, dtype=np.float32), scale, size, out)
        if mode == "nearest":
            exact = _COORDINATES[rule](np.arange(out, dtype=np.float64), np.float64(scale), size, out)
            from_tie = np.abs(exact - (0.5 if nearest.startswith("round") else 0) - np.round(exact))
            ties = np.minimum(from_tie, np.abs(1 - from_tie)) < 1e-4
            if np.any(ties & (at != exact)):  # the last bit decides, and formulas differ in it
                return None
            x = x.index_select(axis, _on(x, np.clip(_ROUND[nearest](at), 0, size - 1).astype(np.int64)))
            continue
        if mode == "cubic":
            outside = bool(attributes.get("exclude_outside", 0))
            matrix = _cubic(at, size, attributes.get("cubic_coeff_a", -0.75), outside)
        else:
            matrix = _linear(at, size)
        x = torch.matmul(x.movedim(axis, -1), _on(x, matrix.T.copy())).movedim(-1, axis)
    return [x]


def _on(x: Tensor, array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(x.device)


def _half_pixel(at: Floats, scale: Any, size: int, out: int) -> Floats:
    return np.asarray((at + np.float32(0.5)) / scale - np.float32(0.5))


def _symmetric(at: Floats, scale: Any, size: int, out: int) -> Floats:
    adjustment = np.float32(out) / (scale * np.float32(size))
    offset = np.float32(size) / np.float32(2) * (np.float32(1) - adjustment)
    return np.asarray(offset + (at + np.float32(0.5)) / scale - np.float32(0.5))


def _aligned(at: Floats, scale: Any, size: int, out: int) -> Floats:
    return np.asarray(at * np.float32(size - 1) / np.float32(out - 1)) if out > 1 else np.zeros_like(at)


_COORDINATES: dict[str, Callable[[Floats, Any, int, int], Floats]] = {
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _symmetric,
    "pytorch_half_pixel": lambda at, scale, size, out: _half_pixel(at, scale, size, out) if out > 1 else 0 * at,
    "align_corners": _aligned,
    "asymmetric": lambda at, scale, size, out: at / scale,
}
_ROUND: dict[str, Callable[[Floats], Floats]] = {
    "round_prefer_floor": lambda at: np.ceil(at - np.float32(0.5)),
    "round_prefer_ceil": lambda at: np.floor(at + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _linear(at: Floats, size: int) -> Floats:
    """(out, size): two neighbours of each coordinate, which is kept inside."""
    at = np.clip(at, 0, size - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((len(at), size), np.float32)
    rows = np.arange(len(at))
    np.add.at(matrix, (rows, low), 1 - (at - low))
    np.add.at(matrix, (rows, high), at - low)
    return matrix


def _cubic(at: Floats, size: int, a: float, exclude_outside: bool) -> Floats:
    """(out, size): Keys' kernel over four neighbours; those outside are the border's, or count nothing."""
    base = np.floor(at).astype(int)
    part = at - base
    taps = np.arange(-1, 3)
    distance = np.abs(part[:, None] - taps)
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    places = base[:, None] + taps
    if exclude_outside:
        weights = np.where((places < 0) | (places >= size), 0, weights)
        weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((len(at), size), np.float32)
    np.add.at(matrix, (np.arange(len(at))[:, None], np.clip(places, 0, size - 1)), weights)
    return matrix
