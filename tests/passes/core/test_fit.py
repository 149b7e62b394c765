"""Closed-form fits against plain linear algebra: dense square roots, singular value decompositions, least squares."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.core.fit import FitProblem, Regression, low_rank_factors, refit_last, refit_last_two, solve_spd
from passes.core.formats import FORMATS
from passes.core.moments import Moments, Samples
from passes.core.site import Array, Geometry, Stage, compose
from tests.passes.core.layers import covariance, problem_of, root_of

METRICS = ["none", "in", "both"]
SIZES = [(4, 9), (9, 4), (5, 5), (1, 6), (6, 1)]


def whitened(problem: FitProblem) -> Array:
    """H^(1/2) B G^(1/2), in which the problem is plain."""
    matrix = problem.matrix
    matrix = matrix if problem.gram is None else matrix @ root_of(problem.gram)
    return matrix if problem.root is None else problem.root @ matrix


def matrices(out: int, k: int, metric: str, seed: int, groups: int = 2) -> FitProblem:
    return problem_of(np.random.default_rng(seed).standard_normal((groups, out, k)), metric, seed)


@given(seed=st.integers(0, 2**32 - 1), metric=st.sampled_from(METRICS), size=st.sampled_from(SIZES))
def test_the_error_is_the_trace_that_it_is_said_to_be(seed: int, metric: str, size: tuple[int, int]) -> None:
    problem = matrices(*size, metric, seed)
    weight = np.random.default_rng(seed + 1).standard_normal(problem.target.shape)
    wanted = 0.0
    for g in range(2):
        delta = weight[g] - problem.target[g]
        gram = np.eye(size[1]) if problem.gram is None else problem.gram[g]
        metric_out = np.eye(size[0]) if problem.root is None else problem.root[g] @ problem.root[g]
        wanted += np.trace(metric_out @ delta @ gram @ delta.T)
    assert problem.error(weight) == pytest.approx(wanted, rel=1e-10)
    assert problem.error(problem.target) == 0.0
    assert problem.energy() == pytest.approx(np.sum(whitened(problem) ** 2), rel=1e-10)


@given(seed=st.integers(0, 2**32 - 1), metric=st.sampled_from(METRICS), size=st.sampled_from(SIZES))
def test_low_rank_factors_are_the_best_of_every_rank(seed: int, metric: str, size: tuple[int, int]) -> None:
    problem = matrices(*size, metric, seed)
    left, right, spectrum = low_rank_factors(problem, problem.matrix, problem.gram)
    full = min(size)
    assert left.shape == (2, size[0], full) and right.shape == (2, full, size[1])
    squares = np.linalg.svd(whitened(problem), compute_uv=False) ** 2
    scale = squares.max()
    np.testing.assert_allclose(spectrum, squares, rtol=0, atol=1e-9 * scale)
    assert all(a >= b for row in spectrum for a, b in pairwise(row))
    for rank in range(1, full + 1):
        found = problem.error((left[..., :rank] @ right[:, :rank]).reshape(problem.target.shape))
        assert found == pytest.approx(squares[:, rank:].sum(), rel=1e-7, abs=1e-9 * scale)


@given(seed=st.integers(0, 2**32 - 1), metric=st.sampled_from(METRICS), size=st.sampled_from(SIZES))
def test_all_factors_together_are_the_matrix(seed: int, metric: str, size: tuple[int, int]) -> None:
    problem = matrices(*size, metric, seed)
    left, right, _ = low_rank_factors(problem, problem.matrix, problem.gram)
    np.testing.assert_allclose(left @ right, problem.matrix, rtol=0, atol=1e-8 * np.abs(problem.matrix).max())


def test_factors_of_a_metric_that_is_not_finite_are_refused() -> None:
    tall = FitProblem(np.ones((1, 8, 6)), np.full((1, 6, 6), np.nan))
    with pytest.raises(FloatingPointError, match="not finite"):
        low_rank_factors(tall, tall.matrix, tall.gram)


def test_factors_survive_a_metric_that_rounding_made_indefinite() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    gram = (basis * np.array([1.0, 0.5, 0.2, 0.1, 0.05, -1e-9])) @ basis.T
    tall = FitProblem(rng.standard_normal((1, 8, 6)), gram[None])
    left, right, _ = low_rank_factors(tall, tall.matrix, tall.gram)
    squares = np.linalg.svd(tall.matrix[0] @ (basis * np.sqrt([1.0, 0.5, 0.2, 0.1, 0.05, 0.0])), compute_uv=False) ** 2
    assert tall.error(left[..., :3] @ right[:, :3]) == pytest.approx(squares[3:].sum(), rel=1e-4)
    np.testing.assert_allclose(left @ right, tall.matrix, rtol=0, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
def test_regression_solves_the_stacked_least_squares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, start = rng.standard_normal((2, 12, 5)) + 1.0, rng.standard_normal((2, 3, 5))
    t = x @ rng.standard_normal((2, 5, 3)) + 0.3 * rng.standard_normal((2, 12, 3)) - 2.0
    samples = Samples(x.copy())
    moments = Moments.of(samples, t)
    regression = Regression(start, moments, 0.1)
    np.testing.assert_array_equal(regression.gram, moments.ridge(0.1))
    for targets in (t, np.maximum(t, 0)):  # one factorization, any number of targets
        found = regression.fit(moments.retarget(samples, targets))
        for g in range(2):
            centred, wanted = x[g] - x[g].mean(axis=0), targets[g] - targets[g].mean(axis=0)
            level = 0.1 * np.linalg.eigvalsh(centred.T @ centred / 12).mean()
            # |t - W x|^2 / n + level |W - W0|^2 as one tall system
            rows = np.vstack([centred / np.sqrt(12), np.sqrt(level) * np.eye(5)])
            right = np.vstack([wanted / np.sqrt(12), np.sqrt(level) * start[g].T])
            np.testing.assert_allclose(found[g], np.linalg.lstsq(rows, right, rcond=None)[0].T, rtol=1e-8, atol=1e-8)


def test_without_data_the_regression_stays_where_it_was() -> None:
    start = np.random.default_rng(0).standard_normal((1, 3, 5))
    dead = Moments.of(Samples(np.zeros((1, 4, 5))), np.ones((1, 4, 3)))
    np.testing.assert_array_equal(Regression(start, dead, 1e-3).fit(dead), start)


class TestSolveSpd:
    def test_the_solution(self) -> None:
        rng = np.random.default_rng(0)
        matrix, right = covariance(3, 6, rng), rng.standard_normal((3, 2, 6))
        np.testing.assert_allclose(solve_spd(matrix, right) @ matrix, right, rtol=1e-9, atol=1e-9)

    def test_an_indefinite_matrix_gets_a_ridge(self) -> None:
        basis = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
        matrix = (basis * np.array([2.0, 1.0, 1.0, -1e-7])) @ basis.T
        right = (basis * np.array([1.0, 1.0, 1.0, 0.0])) @ basis.T  # nothing along the broken direction
        found = solve_spd(matrix[None], right[None])[0]
        wanted = (basis * np.array([0.5, 1.0, 1.0, 0.0])) @ basis.T
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # the ridge is 1e-6 of a mean eigenvalue of 1

    def test_a_zero_matrix_is_solved(self) -> None:
        assert np.isfinite(solve_spd(np.zeros((1, 3, 3)), np.zeros((1, 2, 3)))).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_matrix_that_is_not_finite_is_refused(self, value: float) -> None:
        matrix = np.eye(3)[None].copy()
        matrix[0, 1, 2] = value
        with pytest.raises(FloatingPointError, match="not finite"):
            solve_spd(matrix, np.ones((1, 2, 3)))


def start_stages(name: str, rank: tuple[int, ...], shape: tuple[int, ...], seed: int) -> tuple[Stage, ...]:
    """A chain of the format with random weights: groups, O, I, *kernel in ``shape``."""
    groups, out, channels, *kernel = shape
    geometry = Geometry(tuple(kernel), groups=groups)
    rng = np.random.default_rng(seed)
    widths = (channels, *FORMATS[name].widths(rank), out)
    return tuple(
        Stage(rng.standard_normal((groups * o, i, *g.kernel)), None, g)
        for g, i, o in zip(FORMATS[name].geometries(geometry), widths, widths[1:], strict=False)
    )


def features_of(stages: tuple[Stage, ...]) -> Array:
    """What the next stage reads, as a map of the patch, where that stage is pointwise: (g, r, K)."""
    weight = compose(stages)
    return weight.reshape(*weight.shape[:2], -1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("name", "rank"), [("channel_svd_in", (2,)), ("spatial_svd_vh", (3,)), ("tucker2", (2, 3))])
@pytest.mark.parametrize("seed", range(3))
def test_no_small_change_of_the_last_stage_improves_its_refit(
    name: str, rank: tuple[int, ...], metric: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    problem = problem_of(rng.standard_normal((2, 4, 3, 3, 3)), metric, seed)
    found = refit_last(start_stages(name, rank, problem.target.shape, seed), problem)
    least = problem.error(compose(found))
    # the error is a parabola in the weights of one stage: least if it rises equally in both directions
    for _ in range(10):
        change = rng.standard_normal(found[-1].weight.shape)
        for sign in (1, -1):
            moved = Stage(found[-1].weight + 1e-2 * sign * change, None, found[-1].geometry)
            assert problem.error(compose((*found[:-1], moved))) > least
        up, down = (
            problem.error(compose((*found[:-1], Stage(found[-1].weight + s * change, None, found[-1].geometry))))
            for s in (1.0, -1.0)
        )
        assert up - least == pytest.approx(down - least, rel=1e-4)


def best_behind(problem: FitProblem, features: Array, rank: int) -> float:
    """The least error of W = A C F with the features F fixed, A C of the rank: projection, then a truncated SVD."""
    total = 0.0
    for g, target in enumerate(whitened(problem)):
        seen = features[g] if problem.gram is None else features[g] @ root_of(problem.gram)[g]
        vectors, values, _ = np.linalg.svd(seen.T, full_matrices=False)
        basis = vectors[:, values > 1e-9 * values[0]]
        inside = target @ basis
        total += np.sum(target**2) - np.sum(inside**2)
        total += np.sum(np.linalg.svd(inside, compute_uv=False)[rank:] ** 2)
    return total


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_the_last_two_stages_of_tucker2_are_the_reduced_rank_regression(metric: str, seed: int) -> None:
    problem = problem_of(np.random.default_rng(seed).standard_normal((2, 5, 4, 3, 3)), metric, seed)
    start = start_stages("tucker2", (2, 3), problem.target.shape, seed)
    # what the core reads: every tap of the two channels that the first stage leaves
    taps = np.zeros((2, 18, 4, 9))
    first = start[0].grouped_weight().reshape(2, 2, 4)
    for tap in range(9):
        taps[:, tap::9, :, tap] = first
    wanted = best_behind(problem, taps.reshape(2, 18, 36), 3)
    found = refit_last_two(start, problem)
    assert found[0] is start[0]
    assert problem.error(compose(found)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_a_chain_of_two_becomes_the_best_there_is(metric: str, seed: int) -> None:
    problem = problem_of(np.random.default_rng(seed).standard_normal((2, 6, 3, 3, 1)), metric, seed)
    found = refit_last_two(start_stages("channel_svd_out", (3,), problem.target.shape, seed), problem)
    squares = np.linalg.svd(whitened(problem), compute_uv=False) ** 2
    assert problem.error(compose(found)) == pytest.approx(squares[:, 3:].sum(), rel=1e-8)


def test_a_last_stage_with_taps_is_refitted_alone() -> None:
    problem = problem_of(np.random.default_rng(0).standard_normal((1, 4, 3, 3, 3)), "in")
    start = start_stages("spatial_svd_vh", (2,), problem.target.shape, 0)
    found, wanted = refit_last_two(start, problem), refit_last(start, problem)
    assert found[0] is start[0]
    np.testing.assert_array_equal(found[1].weight, wanted[1].weight)


def test_a_rank_that_the_first_stage_cannot_fill_is_refitted_alone() -> None:
    # one channel in times two taps carries no more than two: rank 3 in the middle has no closed form
    problem = problem_of(np.random.default_rng(0).standard_normal((1, 4, 3, 2, 1)), "in")
    start = start_stages("tucker2", (1, 3), problem.target.shape, 0)
    found = refit_last_two(start, problem)
    assert all(a is b for a, b in zip(found[:2], start[:2], strict=True))
    assert problem.error(compose(found)) <= problem.error(compose(start))
    assert problem.error(compose(found)) == pytest.approx(best_behind(problem, features_of(start[:2]), 3), rel=1e-5)
