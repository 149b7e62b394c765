"""What every format must do: passes.core.factor.FactorFormat, for each registered one."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from passes.core.factor import Rank, chain_of
from passes.core.fit import FitProblem
from passes.core.reference import apply_chain, apply_stage, relative_l2
from passes.core.site import Geometry, Stage, compose
from passes.registry import FORMATS

# A format refuses many of the stages; each test still sees its full number of those that it takes.
picky = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    """Convolutions of 1 to 3 axes and linear layers with everything that a Geometry can say."""
    ndim = draw(st.integers(0, 3))

    def axis(low: int, high: int, count: int = ndim) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    groups, transposed = draw(st.sampled_from([1, 1, 2, 3])), ndim > 0 and draw(st.booleans())
    kernel = axis(1, 3)
    geometry = Geometry(kernel, axis(1, 2), axis(1, 2), axis(0, 1, 2 * ndim), groups, transposed)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    outs, ins = groups * draw(st.integers(1, 4)), draw(st.integers(1, 4))
    bias = rng.standard_normal(outs) if draw(st.booleans()) else None
    return Stage(rng.standard_normal((outs, ins, *kernel)), bias, geometry)


def problem_of(stage: Stage, metric: bool) -> FitProblem:
    """The plain problem, or one with a random covariance of the patches."""
    weight = stage.grouped_weight().astype(np.float64)
    if not metric:
        return FitProblem(weight)
    size = prod(weight.shape[2:])
    root = np.random.default_rng(size).standard_normal((weight.shape[0], size, 2 * size))
    return FitProblem(weight, root @ root.swapaxes(1, 2) / size)


def data(stage: Stage, spatial: int = 6) -> np.ndarray:
    shape = (2, stage.in_channels, *(spatial,) * stage.geometry.ndim)
    return np.random.default_rng(3).standard_normal(shape)


@pytest.mark.parametrize("metric", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize("name", FORMATS.builtin)
@picky
@given(stage=stages())
def test_full_rank_is_exact(name: str, metric: bool, stage: Stage) -> None:
    format = FORMATS.load(name)
    full = format.full_rank(stage)
    assume(full is not None)
    decomposition = format.decompose(stage.geometry, problem_of(stage, metric))
    assert decomposition.full_rank == full
    chain = chain_of(name, full, decomposition.stages(full), stage.bias)
    x = data(stage)
    # factors are computed in float64 and stored as float32: a few times 2**-24 per stage
    assert relative_l2(apply_chain(chain, x), apply_stage(stage, x)) < 1e-5


@pytest.mark.parametrize("name", FORMATS.builtin)
@picky
@given(stage=stages(), draw=st.data())
def test_a_chain_has_the_geometries_and_widths_that_it_was_priced_by(
    name: str, stage: Stage, draw: st.DataObject
) -> None:
    format = FORMATS.load(name)
    full = format.full_rank(stage)
    assume(full is not None)
    rank: Rank = tuple(draw.draw(st.integers(1, r)) for r in full)
    found = format.decompose(stage.geometry, problem_of(stage, False)).stages(rank)
    assert tuple(s.geometry for s in found) == format.geometries(stage.geometry)
    groups = stage.geometry.groups
    assert tuple(s.out_channels for s in found[:-1]) == tuple(groups * width for width in format.widths(rank))
    assert (found[0].in_channels, found[-1].out_channels) == (stage.in_channels, stage.out_channels)
    assert all(s.bias is None and s.weight.dtype == np.float64 for s in found)
    size = (9,) * stage.geometry.ndim
    assert chain_of(name, rank, found, None).shapes(size)[-1] == stage.geometry.output_spatial(size)


@pytest.mark.parametrize("metric", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize("name", FORMATS.builtin)
def test_the_error_never_rises_with_the_rank(name: str, metric: bool) -> None:
    format = FORMATS.load(name)
    rng = np.random.default_rng(11)
    for kernel in ((3, 3), (1, 1)):
        stage = Stage(rng.standard_normal((6, 5, *kernel)), None, Geometry(kernel))
        full = format.full_rank(stage)
        if full is None:
            continue
        problem = problem_of(stage, metric)
        decomposition = format.decompose(stage.geometry, problem)
        for axis, size in enumerate(full):
            ranks = [tuple(r if a == axis else f for a, f in enumerate(full)) for r in range(1, size + 1)]
            losses = [decomposition.loss(rank) for rank in ranks]
            assert all(a >= b for a, b in pairwise(losses))
            if not metric:  # without a metric the slices themselves are nested projections
                errors = [problem.error(compose(decomposition.stages(rank))) for rank in ranks]
                assert all(a >= b - 1e-9 for a, b in pairwise(errors))
                assert errors[-1] < 1e-18 * problem.energy() + 1e-18


@pytest.mark.parametrize("name", FORMATS.builtin)
def test_ranks_out_of_range_are_refused(name: str) -> None:
    format = FORMATS.load(name)
    for kernel in ((3, 3), (1, 1)):
        stage = Stage(np.ones((4, 4, *kernel)) + np.eye(4).reshape(4, 4, 1, 1), None, Geometry(kernel))
        full = format.full_rank(stage)
        if full is None:
            continue
        decomposition = format.decompose(stage.geometry, problem_of(stage, False))
        for rank in (tuple(r + 1 for r in full), tuple(0 for _ in full), (*full, 1)):
            with pytest.raises(ValueError, match="rank"):
                decomposition.stages(rank)


def test_every_layer_has_a_format() -> None:
    linear, pointwise = Stage(np.ones((4, 4)), None), Stage(np.ones((4, 4, 1, 1)), None, Geometry((1, 1)))
    spatial = Stage(np.ones((4, 4, 3, 3)), None, Geometry((3, 3)))
    for stage in (linear, pointwise, spatial):
        assert any(FORMATS.load(name).full_rank(stage) for name in FORMATS.builtin)
