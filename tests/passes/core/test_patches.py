from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.core.patches import outputs_at, patches, positions, sample_rows
from passes.core.reference import apply_chain, apply_stage, relative_l2
from passes.core.site import Chain, Geometry, Stage
from passes.core.workers import BLOCK, Workers
from tests.passes.core.layers import Array, layers, torch_reference


@given(layer=layers())
def test_the_reference_computes_what_torch_computes(layer: tuple[Stage, Array]) -> None:
    stage, x = layer
    wanted = torch_reference(stage, x)
    found = apply_stage(stage, x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-11)


@given(layer=layers())
def test_positions_are_the_shape_of_the_output(layer: tuple[Stage, Array]) -> None:
    stage, x = layer
    wanted = torch_reference(stage, x)
    assert positions(stage.geometry, x.shape) == (wanted.shape[0], *wanted.shape[2:])


@given(layer=layers(), seed=st.integers(0, 2**32 - 1))
def test_patches_at_any_rows_times_the_weight_are_the_outputs_there(layer: tuple[Stage, Array], seed: int) -> None:
    stage, x = layer
    y = torch_reference(Stage(stage.weight, None, stage.geometry), x)
    total = prod(positions(stage.geometry, x.shape))
    rows = np.random.default_rng(seed).integers(0, total, 7)  # in any order, some of them twice
    columns = patches(x, stage.geometry, rows)
    groups = stage.geometry.groups
    assert columns.shape == (groups, 7, stage.weight[0].size)
    weight = stage.weight.reshape(groups, stage.out_channels // groups, -1)
    found = columns @ weight.swapaxes(1, 2)
    np.testing.assert_allclose(found, outputs_at(y, groups, rows), rtol=1e-11, atol=1e-11)


@given(layer=layers(), seed=st.integers(0, 2**32 - 1))
def test_patches_behind_others_are_those_of_both_rows(layer: tuple[Stage, Array], seed: int) -> None:
    stage, x = layer
    total = prod(positions(stage.geometry, x.shape))
    rows = np.random.default_rng(seed).integers(0, total, 8)
    behind = patches(x, stage.geometry, rows[5:])
    found = patches(x, stage.geometry, rows[:5], behind=behind)
    np.testing.assert_array_equal(found, patches(x, stage.geometry, rows))
    assert found.flags.c_contiguous


def test_many_patches_behind_others_come_by_any_number_of_threads() -> None:
    x = np.random.default_rng(0).standard_normal((40, 2, 8, 8)).astype(np.float32)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 2)
    rows = np.random.default_rng(1).integers(0, 40 * 64, 5 * BLOCK)
    wanted = patches(x, geometry, rows)
    with Workers(3) as workers:
        found = patches(x, geometry, rows[:BLOCK], workers, wanted[:, BLOCK:])
    np.testing.assert_array_equal(found, wanted)


def test_outputs_at_flat_positions() -> None:
    y = np.arange(2 * 4 * 2 * 3).reshape(2, 4, 2, 3)
    # flat position 7 of a (2, 2, 3) grid is sample 1, row 0, column 1
    found = outputs_at(y, 2, np.array([7]))
    np.testing.assert_array_equal(found[:, 0].reshape(-1), y[1, :, 0, 1])


def test_a_chain_is_its_stages_one_after_another() -> None:
    rng = np.random.default_rng(0)
    first = Stage(rng.standard_normal((3, 2, 3, 1)), rng.standard_normal(3), Geometry((3, 1), pads=(1, 0, 1, 0)))
    second = Stage(rng.standard_normal((4, 3, 1, 3)), rng.standard_normal(4), Geometry((1, 3), (1, 2)))
    x = rng.standard_normal((2, 2, 5, 6))
    wanted = torch_reference(second, torch_reference(first, x))
    np.testing.assert_allclose(apply_chain(Chain((first, second)), x), wanted, rtol=1e-12, atol=1e-12)


def test_relative_l2() -> None:
    assert relative_l2(np.array([3.0, 4.0]), np.array([0.0, 0.0])) == 5.0
    assert relative_l2(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(1 / 5)


class TestSampleRows:
    shape = (3, 2, 8, 8)  # with a 3x3 kernel: 3 x 6 x 6 = 108 positions
    geometry = Geometry((3, 3))

    def test_all_rows_where_they_fit(self) -> None:
        rows = sample_rows(self.geometry, self.shape, 108, np.random.default_rng(0))
        np.testing.assert_array_equal(rows, np.arange(108))

    @pytest.mark.parametrize("limit", [5, 20, 107])  # 108 > 8 x 5, so one of them draws with replacement
    def test_at_most_the_limit_sorted_and_once_each(self, limit: int) -> None:
        rows = sample_rows(self.geometry, self.shape, limit, np.random.default_rng(0))
        assert 0 < len(rows) <= limit
        assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < 108
        if limit >= 20:
            assert len(rows) == limit

    def test_the_seed_decides(self) -> None:
        first, second, other = (
            sample_rows(self.geometry, self.shape, 20, np.random.default_rng(seed)) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)

    @pytest.mark.parametrize("limit", [6, 40])
    def test_every_row_is_as_likely_as_the_next(self, limit: int) -> None:
        rng = np.random.default_rng(3)
        counts = np.zeros(108)
        for _ in range(2000):
            counts[sample_rows(self.geometry, self.shape, limit, rng)] += 1
        # with replacement a row is missed with probability (1 - 1/108)^limit; six standard deviations of 108 rows
        p = limit / 108 if 8 * limit >= 108 else 1 - (1 - 1 / 108) ** limit
        assert np.abs(counts - 2000 * p).max() < 6 * np.sqrt(2000 * p * (1 - p))

    @pytest.mark.parametrize("limit", [6, 40, 1000])  # drawn, resampled, as many as there are
    def test_a_row_comes_as_often_as_its_position_weighs(self, limit: int) -> None:
        rng = np.random.default_rng(4)
        weights = rng.random((6, 6)) + 0.1
        weights /= weights.mean()
        drawn, counts = min(limit, 108), np.zeros(108)
        for _ in range(2000):
            rows = sample_rows(self.geometry, self.shape, limit, rng, weights)
            assert len(rows) == drawn and (np.diff(rows) >= 0).all()
            np.add.at(counts, rows, 1)
        share = np.tile(weights.reshape(-1), 3) * drawn / 108
        # a binomial count at most: six standard deviations
        assert (np.abs(counts - 2000 * share) < 6 * np.sqrt(2000 * share)).all()

    def test_weights_of_another_grid_are_left_out(self) -> None:
        rows = sample_rows(self.geometry, self.shape, 108, np.random.default_rng(0), np.ones((3, 3)))
        np.testing.assert_array_equal(rows, np.arange(108))

    def test_rows_of_a_linear_layer_are_its_samples(self) -> None:
        np.testing.assert_array_equal(sample_rows(Geometry(), (4, 7), 10, np.random.default_rng(0)), np.arange(4))
