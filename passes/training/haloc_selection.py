"""Which candidate each site takes, as a distribution that is learned: logits, temperature, expected cost.

    p_i = softmax(prior_i + theta_i / T)        one categorical distribution per site i, T annealed

A step draws one candidate per site by the Gumbel maximum (Gumbel 1954; Jang et al. 2017), so the network that runs is
one that could be emitted. The gradient of the expected loss in theta is estimated to second order (ReinMax: Liu et al.
2023, NeurIPS, algorithm 2): it is exact in expectation where the loss is quadratic in one site's choice, while the
plain straight-through estimator is exact for a linear loss alone. On slices of one decomposition that difference
decides: a dropped direction is orthogonal to what is left of the error, so to first order a smaller rank looks free.

The expected cost of the network is linear in p and needs no draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from passes.core.site import Array
from passes.ranks.problem import RankProblem

Tensor = torch.Tensor

_FAR = -1e4
"""The logit of an option that is none: sites have different numbers of them."""

_REACH = 20.0
"""No candidate's prior is further down than this: what AdamW learns in some hundred steps can bring it back."""


class Selection:
    """The distributions of all sites of a problem; tables are (sites, options), padded.

    ``theta`` is what is learned. ``breadth`` is the effective number of candidates by site (the exponential of the
    mean entropy) that the prior leaves open; it prefers what is predicted to lose little, at costs that keep the
    budgets on average. ``price``: what the budgets are worth by that prediction, as a share of the expected error.
    """

    def __init__(self, problem: RankProblem, breadth: float, device: torch.device | None = None) -> None:
        self.problem = problem
        self.counts = [len(site.options) for site in problem.sites]
        self.metrics = tuple(problem.budgets)
        shape = (len(self.counts), max(self.counts, default=1))
        self._valid = np.zeros(shape, dtype=bool)
        errors = np.zeros(shape)
        # relative to the budget, so that 1 is where it ends
        shares = {m: np.zeros(shape) for m in self.metrics}
        for i, site in enumerate(problem.sites):
            count = self.counts[i]
            self._valid[i, :count] = True
            errors[i, :count] = [o.error for o in site.options]
            for m in self.metrics:
                shares[m][i, :count] = [o.costs[m] / _limit(problem, m) for o in site.options]
        self._fixed = {m: problem.fixed.get(m, 0.0) / _limit(problem, m) for m in self.metrics}
        prior, price = _prior(errors, shares, self._fixed, self._valid, breadth)
        self.price = price / max(float((_softmax(prior) * errors).sum()), 1e-30)
        self.prior = torch.tensor(prior, dtype=torch.float32, device=device)
        self.shares = {m: torch.tensor(s, dtype=torch.float32, device=device) for m, s in shares.items()}
        self.theta = torch.zeros(shape, device=device, requires_grad=True)

    def scores(self, temperature: float) -> Tensor:
        """The logits (sites, options) at a temperature."""
        return self.prior + self.theta / temperature

    def probabilities(self, temperature: float) -> Tensor:
        return self.scores(temperature).softmax(1)

    def excess(self, probabilities: Tensor) -> dict[str, Tensor]:
        """By metric: expected cost of the network over its budget; 1 where it is just kept."""
        return {m: (probabilities * self.shares[m]).sum() + self._fixed[m] for m in self.metrics}

    def draw(self, temperature: float, generator: torch.Generator) -> Tensor:
        """One option per site, as rows (sites, options) of a single 1."""
        with torch.no_grad():
            return self.draw_from(self.scores(temperature), generator)

    @staticmethod
    def draw_from(scores: Tensor, generator: torch.Generator) -> Tensor:
        """The same from logits."""
        uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        gumbel = -(-uniform.log()).log()
        picked = (scores.double() + gumbel.to(scores.device)).argmax(1)
        return torch.nn.functional.one_hot(picked, scores.shape[1]).to(scores.dtype)

    def preferences(self, temperature: float) -> list[Array]:
        """-log p of every option, an array per site."""
        with torch.no_grad():
            found = -self.scores(temperature).double().log_softmax(1).cpu().numpy()
        return [row[:count] for row, count in zip(found, self.counts, strict=True)]


def second_order(scores: Tensor, drawn: Tensor) -> Tensor:
    """``drawn`` (sites, options), with the gradient in ``scores`` that the module's docstring tells of.

    The value is that of ``drawn``; the gradient is 2 J((D + p) / 2) - J(p) / 2 applied to the loss's own, with
    J(q) = diag(q) - q q' the derivative of a softmax at q.
    """
    with torch.no_grad():
        p = scores.softmax(1)
        middle = (drawn + p) / 2

    def moved(q: Tensor) -> Tensor:  # the derivative is J(q), the value is taken off below
        return q * (scores - (q * scores).sum(1, keepdim=True))

    path = 2 * moved(middle) - moved(p) / 2
    return drawn + (path - path.detach())


def penalised(loss: Tensor, excess: Sequence[Tensor], power: float) -> Tensor:
    """The loss, times (cost / budget)^power for each budget that is exceeded."""
    for ratio in excess:
        loss = loss * ratio.clamp_min(1.0) ** power
    return loss


class Multipliers:
    """One multiplier per budget, raised while the expected cost is over it and lowered while it is under.

    The augmented Lagrangian of inequalities (Hestenes 1969; Rockafellar 1973): the slope at a relative excess e is
    max(0, multiplier + damping x scale x e), and each step adds rate x scale x e to the multiplier. It starts at
    ``scale``, which should be about what the budget is worth.
    """

    def __init__(self, metrics: Sequence[str], scale: float, damping: float, rate: float) -> None:
        self.values = dict.fromkeys(metrics, scale)
        self.damping, self.rate = damping * scale, rate * scale

    def penalty(self, excess: dict[str, Tensor], unit: float) -> Tensor:
        """What is added to the loss, where losses are about ``unit`` in size."""
        parts = []
        for metric, ratio in excess.items():
            multiplier = self.values[metric]
            inner = (multiplier + self.damping * (ratio - 1)).clamp_min(0)
            parts.append(unit * (inner**2 - multiplier**2) / (2 * self.damping))
        return torch.stack(parts).sum()

    def step(self, excess: dict[str, Tensor]) -> None:
        for metric, ratio in excess.items():
            self.values[metric] = max(0.0, self.values[metric] + self.rate * (float(ratio.detach()) - 1))


def _limit(problem: RankProblem, metric: str) -> float:
    return max(problem.budgets[metric], 1e-30)


def _softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _prior(
    errors: Array, shares: dict[str, Array], fixed: dict[str, float], valid: Array, breadth: float
) -> tuple[Array, float]:
    """Logits -(error + price x summed shares) / width, compressed into the reach of what is learned; and the price.

    The price is the least at which every expected cost keeps its budget, the width that at which ``breadth``
    candidates are open in the mean; both by bisection. Where no price is enough, the largest. The price that is
    returned is that of the relaxed problem itself, at no width.
    """
    open_sites = valid.sum(1) > 1
    cost = sum(shares.values(), np.zeros_like(errors))
    unit = float(errors.max() - errors.min()) or 1.0

    def logits(width: float, price: float) -> Array:
        raw = np.where(valid, -(errors + price * cost) / width, -np.inf)
        raw = raw - raw.max(axis=1, keepdims=True)
        return np.where(valid, _REACH * np.expm1(raw / _REACH), _FAR)

    def kept(p: Array) -> bool:
        return all(float((p * s).sum()) + fixed[m] <= 1 for m, s in shares.items())

    def priced(width: float) -> tuple[Array, float]:
        low, high = 1e-6 * unit, 1e9 * unit
        if kept(_softmax(logits(width, 0.0))):
            return logits(width, 0.0), 0.0
        for _ in range(24):  # to a millionth
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if kept(_softmax(logits(width, middle))) else (middle, high)
        return logits(width, high), high

    def openness(p: Array) -> float:
        if not open_sites.any():
            return 1.0
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
        return float(np.exp(entropy[open_sites].mean()))

    low, high = 1e-9 * unit, 1e3 * unit
    for _ in range(16):  # to a thousandth
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if openness(_softmax(priced(middle)[0])) > breadth else (middle, high)
    return priced(low)[0], priced(1e-6 * unit)[1]
