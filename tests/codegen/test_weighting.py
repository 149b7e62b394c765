from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.weighting import MISFIT, POWER_SPREAD, SPREAD, TILT_SPREAD, Posterior, guess

Array = NDArray[Any]


def posterior(plans: int, sites: int = 5, seed: int = 0) -> Posterior:
    rng = np.random.default_rng(seed)
    errors = rng.uniform(0, 0.3, (plans, sites))
    return Posterior(rng.lognormal(size=sites), errors, rng.uniform(0.05, 0.2, plans))


def by_precision(p: Posterior) -> tuple[Array, Array]:
    """Mean and covariance from the normal equations of the penalised least squares, the scale an unknown of its own."""
    weighted = p.errors * np.exp(p.middle)
    shares = weighted / weighted.sum(axis=1, keepdims=True)
    design = np.hstack([shares, np.ones((len(shares), 1))])
    residual = np.log(p.losses) - np.log(weighted.sum(axis=1))
    sites = len(p.middle)
    level, depth = np.log(p.sensitivities), np.linspace(-1, 1, sites)
    spread = SPREAD**2 * np.eye(sites)
    spread += POWER_SPREAD**2 * np.outer(level, level) + TILT_SPREAD**2 * np.outer(depth, depth)
    precision = design.T @ design / MISFIT**2
    precision[:-1, :-1] += np.linalg.inv(spread)
    covariance = np.linalg.inv(precision)
    mean = covariance @ design.T @ residual / MISFIT**2
    return p.middle + mean[:-1], covariance[:-1, :-1]


def test_the_mean_solves_the_penalised_least_squares() -> None:
    for plans in (1, 2, 7):
        p = posterior(plans)
        np.testing.assert_allclose(p.mean(), by_precision(p)[0], rtol=1e-9, atol=1e-12)


def test_draws_have_the_mean_and_the_covariance_of_the_posterior() -> None:
    p = posterior(4)
    mean, covariance = by_precision(p)
    rng = np.random.default_rng(1)
    draws = np.array([p.draw(rng) for _ in range(20_000)])
    # standard errors: sqrt(var / n) of a mean, at most sqrt(2 / n) of a covariance in units of the variances
    assert np.all(np.abs(draws.mean(axis=0) - mean) < 5 * np.sqrt(np.diag(covariance) / len(draws)))
    level = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.all(np.abs(np.cov(draws.T) - covariance) < 5 * np.sqrt(2 / len(draws)) * level)


def test_one_plan_says_nothing_of_the_weights() -> None:
    p = posterior(1)
    np.testing.assert_allclose(p.mean(), p.middle, rtol=1e-12)


def test_the_scale_of_the_losses_does_not_matter() -> None:
    p = posterior(6)
    scaled = Posterior(p.sensitivities, p.errors, 37.0 * p.losses)
    np.testing.assert_allclose(scaled.mean(), p.mean(), rtol=1e-9)


def test_losses_of_true_weights_draw_the_estimate_towards_them() -> None:
    rng = np.random.default_rng(2)
    errors = rng.uniform(0, 0.3, (60, 6))
    start = Posterior(np.ones(6), errors, np.ones(60)).middle
    true = start + SPREAD * rng.standard_normal(6)

    def away(weights: Array) -> float:
        return float(np.linalg.norm(weights - weights.mean() - (true - true.mean())))

    assert away(Posterior(np.ones(6), errors, errors @ np.exp(true)).mean()) < 0.5 * away(start)


def test_a_guess_is_a_power_of_the_sensitivities_and_heavier_towards_the_end() -> None:
    np.testing.assert_allclose(np.exp(guess(np.array([4.0, 9.0, 16.0]), 0.5, 0.0)), [2, 3, 4])
    np.testing.assert_allclose(guess(np.ones(3), 0.5, 0.7), [-0.7, 0, 0.7])
    np.testing.assert_allclose(guess(np.ones(1), 0.5, 0.7), [0])
