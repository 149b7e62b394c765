"""Predicted times against a processor of which the truth is a closed formula."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.tune.device import Device
from codegen.tune.predictor import Predictor, prior_s
from passes.core.cost import StageWork
from passes.core.site import Geometry

DEVICE = Device({"kind": "llvm"}, "made up", 1, 512, 32)


def conv(ins: int, outs: int, size: int, kernel: int, groups: int = 1) -> StageWork:
    return StageWork(Geometry((kernel, kernel), pads=(kernel // 2,) * 4, groups=groups), ins, outs, (size, size))


def truth_s(work: StageWork) -> float:
    """100 GFLOP/s that a layer of few channels does not reach, and a call."""
    return 2 * work.macs / 100e9 * (1 + 8 / work.out_channels) + 1e-6


GRID = [conv(i, o, s, k) for i in range(4, 65, 4) for o in range(4, 65, 4) for s in (8, 16, 32) for k in (1, 3)]


def learned(count: int, noise: float = 0.0, seed: int = 0) -> Predictor:
    rng = np.random.default_rng(seed)
    some = [GRID[i] for i in rng.choice(len(GRID), count, replace=False)]
    times = [truth_s(w) * float(np.exp(noise * rng.standard_normal())) for w in some]
    return Predictor.of(DEVICE, some, times)


def test_a_formula_is_learned_from_a_few_of_its_values() -> None:
    error = np.abs(np.log(learned(120).predict(GRID)[0] / [truth_s(w) for w in GRID]))
    assert np.median(error) < 0.02 and np.quantile(error, 0.95) < 0.08


def test_more_measurements_give_less_error_and_less_uncertainty() -> None:
    wanted = np.log([truth_s(w) for w in GRID])
    errors, spreads = [], []
    for count in (10, 40, 160):
        times, spread = learned(count, noise=0.01).predict(GRID)
        errors.append(float(np.mean(np.abs(np.log(times) - wanted))))
        spreads.append(float(np.mean(spread)))
    assert errors == sorted(errors, reverse=True) and spreads == sorted(spreads, reverse=True)


def test_uncertainty_is_of_the_size_of_the_error() -> None:
    times, spread = learned(60, noise=0.02).predict(GRID)
    scaled = (np.log(times) - np.log([truth_s(w) for w in GRID])) / spread
    assert 0.2 < np.sqrt(np.mean(scaled**2)) < 2


def test_what_was_measured_is_predicted_as_it_was() -> None:
    some = GRID[::37]
    times, spread = Predictor.of(DEVICE, some, [truth_s(w) for w in some]).predict(some)
    assert np.abs(np.log(times / [truth_s(w) for w in some])).max() < 0.04
    assert spread.max() < 0.1


def test_without_measurements_it_is_the_prior_with_its_doubt() -> None:
    times, spread = Predictor.of(DEVICE, [], []).predict(GRID)
    np.testing.assert_array_equal(times, prior_s(GRID, DEVICE))
    assert (spread > 0.5).all()


def test_the_prior_never_falls_with_a_size() -> None:
    for kernel in (1, 3):
        for size in (8, 32):
            times = np.array([[prior_s([conv(i, o, size, kernel)], DEVICE)[0] for o in (4, 5, 64)] for i in (4, 5, 64)])
            assert (np.diff(times, axis=0) > 0).all() and (np.diff(times, axis=1) > 0).all()


@pytest.mark.parametrize("count", [40, 160])
def test_predictions_hardly_fall_with_rank(count: int) -> None:
    """The core convolutions of a layer at growing ranks: a plan must not gain by a larger one."""
    predictor = learned(count, noise=0.02)
    for size in (8, 16, 32):
        times, _ = predictor.predict([conv(rank, rank, size, 3) for rank in range(4, 65, 4)])
        assert (np.diff(times) > 0).all()


def test_a_level_that_is_off_is_found_from_three_kernels_of_another_kind() -> None:
    """A slow machine shows in any kernel: grouped ones are predicted by what dense ones took."""
    some = [conv(16, 16, 32, 3), conv(32, 32, 16, 3), conv(64, 64, 8, 3)]
    slow = Predictor.of(DEVICE, some, (10 * prior_s(some, DEVICE)).tolist())
    other = [conv(64, 64, 16, 3, groups=8)]
    times, _ = slow.predict(other)
    assert 4 < times[0] / prior_s(other, DEVICE)[0] < 12


def test_linear_layers_and_nothing_at_all() -> None:
    works = [StageWork(Geometry(), 64, 10), StageWork(Geometry(), 512, 512, batch=64)]
    times, spread = learned(20).predict(works)
    assert times.shape == spread.shape == (2,) and (times > 0).all()
    assert Predictor(DEVICE).predict([])[0].shape == (0,)
