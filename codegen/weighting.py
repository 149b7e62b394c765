"""Weights of the sites' errors, learned from the plans that were carried out.

The solver minimises a sum of weighted errors, and what comes of it is measured. With the logarithms of the weights
Gaussian around what the sensitivities say, and a plan's log-loss linear in them (its gradient is each site's share of
the sum), the measured losses give a Gaussian posterior in closed form. A draw from it is a weighting that explains
what was seen and is open where nothing was (Thompson sampling: Thompson 1933, Biometrika 25; a draw is conditioned by
Matheron's rule: Wilson et al., ICML 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.core.site import Array

SPREAD = 0.5
"""Standard deviation of a site's log-weight around its sensitivity."""

MISFIT = 0.1
"""Standard deviation of a plan's log-loss around what the best weights can say of it."""

POWER = 0.75
"""Of the sensitivities, at the middle of the prior: they are measured one site at a time and exaggerate."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """Log-weights (n,) after ``errors`` (m, n) of m plans, unweighted, by site, and their ``losses`` (m,), above 0.

    ``middle`` (n,) are the log-weights at the middle of the prior. The scale of the losses is free.
    """

    middle: Array
    errors: Array
    losses: Array

    def mean(self) -> Array:
        _, gain, residual = self._conditioned()
        return np.asarray(self.middle + gain @ residual)

    def draw(self, rng: np.random.Generator) -> Array:
        shares, gain, residual = self._conditioned()
        away = SPREAD * rng.standard_normal(len(self.middle))
        seen = shares @ away + MISFIT * rng.standard_normal(len(residual))
        return np.asarray(self.middle + away + gain @ (residual - seen))

    def _conditioned(self) -> tuple[Array, Array, Array]:
        """Each plan's shares (m, n), the gain (n, m), and the log-losses beyond the prior's (m,)."""
        weighted = self.errors * np.exp(self.middle)
        sums = np.maximum(weighted.sum(axis=1), 1e-30)
        shares = weighted / sums[:, None]
        residual = np.log(np.maximum(self.losses, 1e-30)) - np.log(sums)
        residual = residual - residual.mean()
        centred = shares - shares.mean(axis=0)
        covariance = SPREAD**2 * centred @ centred.T + MISFIT**2 * np.eye(len(residual))
        gain = SPREAD**2 * np.linalg.solve(covariance, centred).T
        return centred, gain, residual
