"""The time of a kernel that nobody measured, learned from those that were: a Gaussian process over a simple prior.

The prior is a sum: multiply-adds at the processor's rate, bytes at its bandwidth, and the call. What is learned is the
logarithm of measured over prior, as a level of the device, a level of the kind of layer, and a smooth function of the
logarithms of its sizes (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapters 2 and 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky

from codegen.tune.device import Device
from codegen.tune.similarity import family
from codegen.tune.workload import Workload
from passes.core.cost import StageWork

Array = NDArray[Any]

_FLOPS_PER_LANE = 6e9
"""Of a core: a vector multiply-add a cycle at 3 GHz."""

_BYTES_PER_S = 100e9
_CALL_S = 3e-7
_DEVICE_SD = 1.0
"""How far the prior's level may be off, as a standard deviation of the logarithm: it knows no clock."""

_FAMILY_SD = 0.4
_SHAPE_SDS = 0.1, 0.25, 0.6
_OCTAVES = 1.5, 3.0, 6.0
"""Lengths over which sizes look alike, in doublings; the likeliest of these and of the other two lists are taken."""

_NOISE_SDS = 0.02, 0.05, 0.1, 0.2
_MOST = 1500
"""Measured kernels that are learned from: the algebra grows with the third power."""

_FOR_CHOICE = 300


_Setting = tuple[float, float, float]
"""Standard deviation over shapes, its length in octaves, standard deviation of the noise."""


@dataclass(frozen=True, eq=False)
class _Learned:
    """Features and families of what was measured, the solution of the normal equations, and their factor."""

    known: Array
    kinds: Array
    weights: Array
    lower: Array
    setting: _Setting


@dataclass(frozen=True, eq=False)
class Predictor:
    """Seconds of kernels on ``device``: by the prior alone, unless it comes from :meth:`of`."""

    device: Device
    _learned: _Learned | None = None

    @classmethod
    def of(cls, device: Device, works: Sequence[StageWork], seconds: Sequence[float]) -> Self:
        """Learned from what was measured; the prior alone where nothing was."""
        if not works:
            return cls(device)
        if len(works) > _MOST:
            some = np.linspace(0, len(works) - 1, _MOST).astype(int)
            works, seconds = [works[i] for i in some], [seconds[i] for i in some]
        known, kinds = features(works, device), _families(works)
        residual = np.log(np.asarray(seconds, float) / prior_s(works, device))
        few = np.linspace(0, len(works) - 1, min(len(works), _FOR_CHOICE)).astype(int)
        setting = _likeliest(known[few], kinds[few], residual[few])
        lower = cholesky(_with_noise(_covariance(known, kinds, known, kinds, setting), setting), lower=True)
        return cls(device, _Learned(known, kinds, cho_solve((lower, True), residual), lower, setting))

    def predict(self, works: Sequence[StageWork]) -> tuple[Array, Array]:
        """Seconds of each kernel, and the standard deviation of their logarithm; (n,) both."""
        if not works:
            return np.zeros(0), np.zeros(0)
        expected, learned = prior_s(works, self.device), self._learned
        if learned is None:
            return expected, np.full(len(works), np.hypot(_DEVICE_SD, _FAMILY_SD))
        shape_sd, _, noise_sd = learned.setting
        variance = _DEVICE_SD**2 + _FAMILY_SD**2 + shape_sd**2 + noise_sd**2
        kinds = _families(works)
        across = _covariance(features(works, self.device), kinds, learned.known, learned.kinds, learned.setting)
        explained = np.sum(across.T * cho_solve((learned.lower, True), across.T), axis=0)
        return expected * np.exp(across @ learned.weights), np.sqrt(np.maximum(variance - explained, noise_sd**2))


def prior_s(works: Sequence[StageWork], device: Device) -> Array:
    """Seconds by work and bytes alone, (n,): right to a factor of two or so, and never falling with a size."""
    table = np.array(
        [
            (
                w.macs,
                w.batch * (w.in_channels * prod(w.spatial) + w.out_channels * prod(w.output_spatial)) + w.weights,
            )
            for w in works
        ],
        float,
    )
    return (
        2 * table[:, 0] / (_FLOPS_PER_LANE * device.lanes * device.threads) + 4 * table[:, 1] / _BYTES_PER_S + _CALL_S
    )


def features(works: Sequence[StageWork], device: Device) -> Array:
    """Logarithms to base 2 of what shapes the loops, (n, 9); the last two say how badly vectors are filled."""
    rows = []
    for w in works:
        groups = w.geometry.groups
        out, out_spatial = w.out_channels // groups, w.output_spatial
        width = max(out_spatial[-1] if out_spatial else w.batch, 1)
        rows.append(
            (
                w.in_channels // groups,
                out,
                groups,
                w.batch * max(prod(out_spatial), 1),
                width,
                prod(w.geometry.kernel),
                prod(w.geometry.strides),
                -(-out // device.lanes) * device.lanes / out,
                -(-width // device.lanes) * device.lanes / width,
            )
        )
    logarithms: Array = np.log2(np.array(rows, float))
    return logarithms


def _families(works: Sequence[StageWork]) -> Array:
    return np.array([family(Workload(w)) for w in works])


def _covariance(a: Array, kind_a: Array, b: Array, kind_b: Array, setting: _Setting) -> Array:
    shape_sd, octaves, _ = setting
    same = kind_a[:, None] == kind_b[None, :]
    square = np.sum(a**2, 1)[:, None] + np.sum(b**2, 1)[None, :] - 2 * a @ b.T
    near: Array = np.exp(-0.5 * np.maximum(square, 0) / octaves**2)
    return np.asarray(_DEVICE_SD**2 + same * (_FAMILY_SD**2 + shape_sd**2 * near))


def _with_noise(covariance: Array, setting: _Setting) -> Array:
    return np.asarray(covariance + setting[2] ** 2 * np.eye(len(covariance)))


def _likeliest(known: Array, kinds: Array, residual: Array) -> _Setting:
    """The setting under which what was measured has the greatest density; of equals the first."""

    def cost(setting: _Setting) -> float:
        lower = cholesky(_with_noise(_covariance(known, kinds, known, kinds, setting), setting), lower=True)
        return float(residual @ cho_solve((lower, True), residual) + 2 * np.log(np.diag(lower)).sum())

    return min(product(_SHAPE_SDS, _OCTAVES, _NOISE_SDS), key=cost)
