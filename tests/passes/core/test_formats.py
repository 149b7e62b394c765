"""What the contract suite leaves open: where each format applies, what its loss says, what data is worth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from passes.core.factor import Rank, chain_of, fitted
from passes.core.fit import FitProblem
from passes.core.formats import FORMATS
from passes.core.reference import apply_chain, relative_l2
from passes.core.site import Array, Geometry, Stage, compose
from tests.passes.core.layers import covariance, layers, problem_of, torch_reference

picky = settings(max_examples=50, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])

LINEAR, POINT = Geometry(), Geometry((1, 1), (2, 2))
SQUARE, ROW, CUBE, LINE = Geometry((3, 3)), Geometry((1, 3)), Geometry((3, 1, 2)), Geometry((5,))
FLAT = Geometry((1, 3, 3))


@pytest.mark.parametrize(
    ("geometry", "outs", "ins", "applies"),
    [
        (LINEAR, 6, 4, {"svd": (4,)}),
        (LINEAR, 3, 4, {"svd": (3,)}),
        (Geometry((1,)), 6, 4, {"svd": (4,)}),
        (POINT, 6, 4, {"svd": (4,)}),
        (Geometry((1, 1), groups=2), 6, 4, {"svd": (3,)}),
        (LINE, 6, 4, {"channel_svd_out": (6,), "channel_svd_in": (4,), "tucker2": (4, 6)}),
        # one column of taps: nothing to split along the other axis
        (ROW, 6, 4, {"channel_svd_out": (6,), "channel_svd_in": (4,), "tucker2": (4, 6)}),
        (
            SQUARE,
            40,
            4,  # 4 x 9 values cannot carry 40 channels; 4 x 3 is less than 40 x 3
            {
                "channel_svd_out": (36,),
                "channel_svd_in": (4,),
                "spatial_svd_vh": (12,),
                "spatial_svd_hv": (12,),
                "tucker2": (4, 36),
            },
        ),
        (
            Geometry((3, 3), groups=8),  # depthwise
            8,
            1,
            {
                "channel_svd_out": (1,),
                "channel_svd_in": (1,),
                "spatial_svd_vh": (3,),
                "spatial_svd_hv": (3,),
                "tucker2": (1, 1),
            },
        ),
        (
            CUBE,
            6,
            4,  # 3 taps of the first axis, 1 x 2 of the others
            {
                "channel_svd_out": (6,),
                "channel_svd_in": (4,),
                "spatial_svd_vh": (12,),
                "spatial_svd_hv": (8,),
                "tucker2": (4, 6),
            },
        ),
        (FLAT, 6, 4, {"channel_svd_out": (6,), "channel_svd_in": (4,), "tucker2": (4, 6)}),
        (
            Geometry((2, 2), (2, 2), transposed=True),
            6,
            4,
            {
                "channel_svd_out": (6,),
                "channel_svd_in": (4,),
                "spatial_svd_vh": (8,),
                "spatial_svd_hv": (8,),
                "tucker2": (4, 6),
            },
        ),
    ],
)
def test_which_formats_apply_and_up_to_which_rank(
    geometry: Geometry, outs: int, ins: int, applies: dict[str, Rank]
) -> None:
    stage = Stage(np.ones((outs, ins, *geometry.kernel)), None, geometry)
    assert {n: f.full_rank(stage) for n, f in FORMATS.items() if f.full_rank(stage) is not None} == applies


@pytest.mark.parametrize("metric", ["none", "in", "both"])
@pytest.mark.parametrize("name", FORMATS)
@picky
@given(layer=layers())
def test_full_rank_does_what_torch_does_with_the_layer(name: str, metric: str, layer: tuple[Stage, Array]) -> None:
    stage, x = layer
    full = FORMATS[name].full_rank(stage)
    assume(full is not None)
    problem = problem_of(stage.grouped_weight(), metric)
    decomposition = FORMATS[name].decompose(stage.geometry, problem)
    wanted = torch_reference(stage, x)
    for stages in (decomposition.stages(full), fitted(decomposition, full, problem, rounds=2)):
        # stored as float32, which is 2**-24 of a weight; the output metric spans two decades
        assert relative_l2(apply_chain(chain_of(name, full, stages, stage.bias), x), wanted) < 1e-4


def ranks(full: Rank) -> list[Rank]:
    return list(product(*(range(1, f + 1) for f in full)))


@pytest.mark.parametrize("metric", ["none", "in", "both"])
@pytest.mark.parametrize("name", ["svd", "channel_svd_out"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_loss_is_the_error_where_one_factor_sees_the_whole_patch(name: str, groups: int, metric: str) -> None:
    kernel = (1, 1) if name == "svd" else (3, 2)
    for shape in ((groups, 6, 4, *kernel), (groups, 4, 6, *kernel)):
        problem = problem_of(np.random.default_rng(1).standard_normal(shape), metric, 1)
        found = FORMATS[name].decompose(Geometry(kernel, groups=groups), problem)
        for rank in ranks(found.full_rank):
            error = problem.error(compose(found.stages(rank)))
            assert found.loss(rank) == pytest.approx(error, rel=1e-7, abs=1e-9 * problem.energy())


@pytest.mark.parametrize("name", ["channel_svd_in", "spatial_svd_vh", "spatial_svd_hv"])
def test_the_loss_is_the_error_of_a_slice_without_a_metric(name: str) -> None:
    problem = problem_of(np.random.default_rng(2).standard_normal((2, 4, 3, 3, 2)), "none")
    found = FORMATS[name].decompose(Geometry((3, 2), groups=2), problem)
    for rank in ranks(found.full_rank):
        error = problem.error(compose(found.stages(rank)))
        assert found.loss(rank) == pytest.approx(error, rel=1e-8, abs=1e-10 * problem.energy())


@pytest.mark.parametrize("rooted", [False, True])
def test_the_loss_of_channel_svd_in_is_the_error_where_the_metric_separates(rooted: bool) -> None:
    rng = np.random.default_rng(3)
    channels = covariance(1, 4, rng)[0]
    gram = np.kron(channels, np.eye(9))[None]  # patches are (I, taps): taps uncorrelated, channels alike at each
    base = problem_of(rng.standard_normal((1, 5, 4, 3, 3)), "both" if rooted else "none", 3)
    problem = FitProblem(base.target, gram, base.root)
    found = FORMATS["channel_svd_in"].decompose(Geometry((3, 3)), problem)
    for rank in ranks(found.full_rank):
        error = problem.error(compose(found.stages(rank)))
        assert found.loss(rank) == pytest.approx(error, rel=1e-8, abs=1e-10 * problem.energy())


def test_the_loss_of_tucker2_is_a_bound() -> None:
    # HOSVD: the errors of the two projections add up at worst (De Lathauwer et al. 2000, property 10)
    problem = problem_of(np.random.default_rng(4).standard_normal((2, 5, 4, 3, 3)), "none")
    found = FORMATS["tucker2"].decompose(Geometry((3, 3), groups=2), problem)
    for rank in ranks(found.full_rank):
        error = problem.error(compose(found.stages(rank)))
        assert error <= found.loss(rank) * (1 + 1e-9) + 1e-9 * problem.energy()


SITES = [
    ("svd", ()),
    ("svd", (1, 1)),
    ("channel_svd_out", (3, 3)),
    ("channel_svd_in", (3, 3)),
    ("spatial_svd_vh", (3, 3)),
    ("spatial_svd_hv", (3, 3)),
    ("tucker2", (3, 3)),
    ("tucker2", (3,)),
    ("spatial_svd_vh", (2, 2, 2)),
]


@pytest.mark.parametrize(("name", "kernel"), SITES)
@pytest.mark.parametrize("metric", ["in", "both"])
def test_factors_fitted_to_the_data_beat_those_that_are_not(name: str, kernel: tuple[int, ...], metric: str) -> None:
    for seed in range(3):
        weight = np.random.default_rng(seed).standard_normal((1, 6, 4, *kernel))
        problem, blind = problem_of(weight, metric, seed), FitProblem(weight)
        geometry = Geometry(kernel)
        aware, plain = (FORMATS[name].decompose(geometry, p) for p in (problem, blind))
        # all but the full rank, where both are exact
        for rank in [r for r in ranks(aware.full_rank) if all(a < b for a, b in zip(r, aware.full_rank, strict=True))]:
            with_data = problem.error(compose(fitted(aware, rank, problem, rounds=3)))
            without = problem.error(compose(fitted(plain, rank, blind, rounds=3)))
            assert with_data < without


@pytest.mark.parametrize(("name", "kernel"), SITES)
@pytest.mark.parametrize("metric", ["none", "in", "both"])
def test_the_fitted_error_does_not_rise_with_any_rank(name: str, kernel: tuple[int, ...], metric: str) -> None:
    problem = problem_of(np.random.default_rng(6).standard_normal((2, 4, 3, *kernel)), metric, 6)
    found = FORMATS[name].decompose(Geometry(kernel, groups=2), problem)
    errors = {r: problem.error(compose(fitted(found, r, problem, rounds=20))) for r in ranks(found.full_rank)}
    slack = 1e-6 * problem.energy()
    for rank, error in errors.items():
        for axis in range(len(rank)):
            smaller = tuple(r - (a == axis) for a, r in enumerate(rank))
            # alternation ends in a local optimum, within a hundredth of the best (test_alternate)
            assert error <= 1.01 * errors.get(smaller, np.inf) + slack


@picky
@given(layer=layers(linear=False), draw=st.data())
def test_a_depthwise_layer_splits_along_its_axes(layer: tuple[Stage, Array], draw: st.DataObject) -> None:
    stage, x = layer
    channels = stage.in_channels
    geometry = Geometry(
        stage.geometry.kernel, stage.geometry.strides, stage.geometry.dilations, stage.geometry.pads, channels,
        stage.geometry.transposed, stage.geometry.output_padding,
    )  # fmt: skip
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    column, row = (rng.standard_normal((channels, 1, *geometry.kernel)) for _ in range(2))
    n = geometry.ndim
    assume(n > 1)
    # a separable kernel: one column times one row is rank 1, and a chain of rank 1 is the layer
    column = column[(slice(None), slice(None), slice(None), *(slice(0, 1),) * (n - 1))]
    row = row[:, :, :1]
    depthwise = Stage(column * row, None, geometry)
    format = FORMATS["spatial_svd_vh"]
    assume(format.full_rank(depthwise) is not None)
    found = format.decompose(geometry, FitProblem(depthwise.grouped_weight()))
    stages = found.stages((1,))
    assert [s.weight.shape[:2] for s in stages] == [(channels, 1), (channels, 1)]
    chain = chain_of("spatial_svd_vh", (1,), stages, None)
    assert relative_l2(apply_chain(chain, x), torch_reference(depthwise, x)) < 1e-5


def test_the_bias_stands_on_the_last_stage_alone() -> None:
    bias = np.arange(4.0)
    problem = problem_of(np.random.default_rng(0).standard_normal((1, 4, 3, 3, 3)), "none")
    found = FORMATS["tucker2"].decompose(Geometry((3, 3)), problem)
    chain = chain_of("tucker2", (2, 2), found.stages((2, 2)), bias)
    assert [s.bias is None for s in chain] == [True, True, False]
    np.testing.assert_array_equal(chain.stages[-1].bias, bias.astype(np.float32))
    assert all(s.weight.dtype == np.float32 and s.weight.flags.c_contiguous for s in chain)
    assert (chain.format, chain.rank) == ("tucker2", (2, 2))
