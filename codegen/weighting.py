"""Weights of the sites' errors: a guess from what was measured of each site, then learned from whole plans.

The solver minimises a sum of weighted errors, and what comes of it is measured. A site's sensitivity is measured
alone, on the original network; what it misses is that the layers behind a site are fitted on its errors and make up
for a part of them. So an error weighs the more the later it is made: the tilt.

With log-weights Gaussian around that guess, and a plan's log-loss linear in them (its gradient is each site's share
of the sum), the measured losses give a Gaussian posterior in closed form. A draw from it is a weighting that explains
what was seen and is open where nothing was (Thompson sampling: Thompson 1933, Biometrika 25; a draw is conditioned by
Matheron's rule: Wilson et al., ICML 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.core.site import Array

POWER, POWER_SPREAD = 0.75, 0.25
"""Of the sensitivities, at the middle of the prior, and its standard deviation."""

TILT, TILT_SPREAD = 0.5, 0.3
"""Log-weight from the middle of the network to its last site, at the middle of the prior, and its deviation."""

SPREAD = 0.3
"""Standard deviation of each log-weight on its own."""

MISFIT = 0.1
"""Standard deviation of a plan's log-loss around what the best weights can say of it."""


def guess(sensitivities: Array, power: float, tilt: float) -> Array:
    """Log-weights (n,) of sites in the order of the network: ``sensitivities``^``power``, tilted."""
    return np.asarray(power * np.log(sensitivities) + tilt * _depth(len(sensitivities)))


def _depth(count: int) -> Array:
    """-1 at the first site, 1 at the last."""
    return np.linspace(-1, 1, count) if count > 1 else np.zeros(count)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Log-weights (n,) after ``errors`` (m, n) of m plans, unweighted, by site, and their ``losses`` (m,), above 0.

    ``sensitivities``: (n,). The scale of the losses is free.
    """

    sensitivities: Array
    errors: Array
    losses: Array

    @property
    def middle(self) -> Array:
        """The prior's mean (n,)."""
        return guess(self.sensitivities, POWER, TILT)

    @property
    def factor(self) -> Array:
        """The prior's deviations: log-weights are ``middle + factor @ z`` for z of unit variance, (n, n + 2)."""
        count = len(self.sensitivities)
        common = [POWER_SPREAD * np.log(self.sensitivities), TILT_SPREAD * _depth(count)]
        return np.column_stack([SPREAD * np.eye(count), *common])

    def mean(self) -> Array:
        _, gain, residual = self._conditioned()
        return np.asarray(self.middle + self.factor @ gain @ residual)

    def draw(self, rng: np.random.Generator) -> Array:
        slopes, gain, residual = self._conditioned()
        away = rng.standard_normal(slopes.shape[1])
        seen = slopes @ away + MISFIT * rng.standard_normal(len(residual))
        return np.asarray(self.middle + self.factor @ (away + gain @ (residual - seen)))

    def _conditioned(self) -> tuple[Array, Array, Array]:
        """Slopes of the log-losses in z (m, n + 2), the gain (n + 2, m), and the log-losses beyond the prior's (m,)."""
        weighted = self.errors * np.exp(self.middle)
        sums = np.maximum(weighted.sum(axis=1), 1e-30)
        shares = weighted / sums[:, None]
        residual = np.log(np.maximum(self.losses, 1e-30)) - np.log(sums)
        slopes = (shares - shares.mean(axis=0)) @ self.factor  # the common part of all plans is their scale
        covariance = slopes @ slopes.T + MISFIT**2 * np.eye(len(residual))
        return slopes, np.linalg.solve(covariance, slopes).T, residual - residual.mean()
