from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.core.moments import Moments, Samples
from passes.core.workers import BLOCK, Workers

MOMENTS = ("mean_x", "mean_t", "gram", "cross")


def drawn(seed: int, groups: int = 2, count: int = 50, k: int = 5, o: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, count, k)) @ rng.standard_normal((groups, k, k)) + rng.standard_normal(k)
    t = x @ rng.standard_normal((groups, k, o)) + rng.standard_normal((groups, count, o)) + 1.5
    return x, t


def measured(x: np.ndarray, t: np.ndarray) -> Moments:
    return Moments.of(Samples(x.copy()), t)


@given(seed=st.integers(0, 2**32 - 1))
def test_moments_are_means_and_covariances(seed: int) -> None:
    x, t = drawn(seed)
    found = measured(x, t)
    for g in range(2):
        both = np.cov(np.hstack([x[g], t[g]]), rowvar=False, bias=True)
        scale = np.abs(both).max()
        np.testing.assert_allclose(found.gram[g], both[:5, :5], rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(found.cross[g], both[5:, :5], rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(found.mean_x[g], x[g].mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.mean_t[g], t[g].mean(axis=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_float32_samples_lose_nothing_to_their_mean(offset: float) -> None:
    x, t = (v.astype(np.float32) + np.float32(offset) for v in drawn(0, count=40_000))
    found = measured(x, t)
    assert all(v.dtype == np.float64 for v in (found.gram, found.cross, found.mean_x, found.mean_t))
    again = found.retarget(Samples(x.copy()), t)
    for g in range(2):
        wanted = np.cov(np.hstack([x[g], t[g]]).astype(np.float64), rowvar=False, bias=True)
        # float32 products of centred values: a few times 2**-24 of the largest variance, whatever the mean
        scale = 1e-6 * np.abs(wanted).max()
        np.testing.assert_allclose(found.gram[g], wanted[:5, :5], rtol=0, atol=scale)
        np.testing.assert_allclose(found.cross[g], wanted[5:, :5], rtol=0, atol=scale)
        np.testing.assert_allclose(again.cross[g], wanted[5:, :5], rtol=0, atol=scale)


def test_blocks_add_up() -> None:
    x, t = drawn(1)
    found, wanted = Moments.of(Samples(x.copy(), block=7), t), measured(x, t)
    for name in MOMENTS:
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=1e-12)


def test_threads_change_nothing() -> None:
    x, t = (v.astype(np.float32) for v in drawn(2, count=3 * BLOCK + 1))
    weight, bias = np.ones((2, 3, 5)), np.ones((2, 3))
    alone = Samples(x.copy())
    with Workers(3) as workers:
        shared = Samples(x.copy(), workers)
        one, other = (Moments.of(s, t).retarget(s, 2 * t) for s in (alone, shared))
        np.testing.assert_array_equal(shared.predicted(weight, bias), alone.predicted(weight, bias))
    for name in MOMENTS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_predictions_are_those_of_the_samples_as_they_were(offset: float) -> None:
    x, _ = (v.astype(np.float32) + np.float32(offset) for v in drawn(3))
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3))
    wanted = x.astype(np.float64) @ weight.swapaxes(1, 2) + bias[:, None]
    found = Samples(x.copy(), block=7).predicted(weight, bias)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 + 3e-7 * offset)


@given(seed=st.integers(0, 2**32 - 1))
def test_retargeting_is_measuring_again(seed: int) -> None:
    x, t = drawn(seed)
    other = np.tanh(t) * 3 + 1
    found, wanted = measured(x, t).retarget(Samples(x.copy()), other), measured(x, other)
    for name in MOMENTS:
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-11, atol=1e-11)


def test_the_ridge_raises_every_eigenvalue_by_a_part_of_their_mean() -> None:
    x, t = drawn(2, count=3)  # 3 samples of 5 values: singular
    found = measured(x, t)
    before = np.linalg.eigvalsh(found.gram)
    after = np.linalg.eigvalsh(found.ridge(0.25))
    np.testing.assert_allclose(after, before + 0.25 * before.mean(axis=1, keepdims=True), rtol=1e-10, atol=1e-10)
    assert (after > 0).all()


def test_the_ridge_of_nothing_is_invertible() -> None:
    dead = measured(np.zeros((1, 4, 3)), np.zeros((1, 4, 2)))
    np.testing.assert_array_equal(dead.ridge(1e-3), 1e-3 * np.eye(3)[None])
