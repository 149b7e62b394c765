from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from passes.core.alternate import _FirstStage, _Split, affordable_rounds, alternate, refit_first, separable
from passes.core.factor import Rank, fitted
from passes.core.fit import FitProblem, refit_last
from passes.core.formats import FORMATS
from passes.core.site import Array, Geometry, Stage, compose
from tests.passes.core.layers import problem_of

SHAPE = (1, 4, 3, 3, 3)  # groups, O, I, kernel
CASES = [
    ("channel_svd_in", (2,)),
    ("spatial_svd_vh", (3,)),
    ("spatial_svd_hv", (4,)),
    ("tucker2", (2, 3)),
]


def composed(name: str, weights: list[torch.Tensor]) -> torch.Tensor:
    """The chain's weight (O, I, 3, 3), written out per format."""
    first, *rest = weights
    if name == "channel_svd_in":
        return torch.einsum("ri,orhw->oihw", first[:, :, 0, 0], rest[0])
    if name == "tucker2":
        return torch.einsum("ri,srhw,os->oihw", first[:, :, 0, 0], rest[0], rest[1][:, :, 0, 0])
    if name == "spatial_svd_vh":
        return torch.einsum("rih,orw->oihw", first[:, :, :, 0], rest[0][:, :, 0, :])
    return torch.einsum("riw,orh->oihw", first[:, :, 0, :], rest[0][:, :, :, 0])


def best_found(name: str, problem: FitProblem, starts: list[tuple[Stage, ...]]) -> float:
    """The least error that L-BFGS on all factors at once reaches from the given starts."""
    shapes = [s.weight.shape for s in starts[0]]
    sizes = [int(np.prod(shape)) for shape in shapes]
    target = torch.from_numpy(problem.target[0])
    gram = torch.eye(target[0].numel(), dtype=torch.float64) if problem.gram is None else torch.tensor(problem.gram[0])
    root = torch.eye(len(target), dtype=torch.float64) if problem.root is None else torch.tensor(problem.root[0])

    def value(flat: Array) -> tuple[float, Array]:
        x = torch.tensor(flat, requires_grad=True)
        weights = [part.reshape(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)]
        delta = root @ (composed(name, weights) - target).reshape(len(target), -1)
        error = ((delta @ gram) * delta).sum()
        error.backward()
        return float(error.detach()), x.grad.numpy()

    results = []
    for stages in starts:
        flat = np.concatenate([s.weight.reshape(-1) for s in stages])
        found = minimize(value, flat, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-9})
        results.append(float(found.fun))
    return min(results)


def random_like(stages: tuple[Stage, ...], seed: int) -> tuple[Stage, ...]:
    rng = np.random.default_rng(seed)
    return tuple(Stage(rng.standard_normal(s.weight.shape), None, s.geometry) for s in stages)


def sliced(name: str, rank: Rank, problem: FitProblem) -> tuple[Stage, ...]:
    kernel = problem.target.shape[3:]
    return FORMATS[name].decompose(Geometry(kernel, groups=len(problem.target)), problem).stages(rank)


@pytest.mark.parametrize("metric", ["in", "both"])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_the_optimum_of_an_independent_optimiser_is_reached(name: str, rank: Rank, metric: str) -> None:
    problem = problem_of(np.random.default_rng(0).standard_normal(SHAPE), metric)
    start = sliced(name, rank, problem)
    reached = problem.error(compose(alternate(start, problem, rounds=200, steps=40, gain=1e-5)))
    wanted = best_found(name, problem, [start, random_like(start, 0)])
    assert reached < problem.error(compose(start))
    assert reached <= 1.02 * wanted


@pytest.mark.parametrize("name", ["channel_svd_in", "spatial_svd_vh", "spatial_svd_hv", "tucker2"])
@given(seed=st.integers(0, 2**32 - 1), metric=st.sampled_from(["none", "in", "both"]), good=st.booleans())
def test_the_error_never_rises(name: str, seed: int, metric: str, good: bool) -> None:
    problem = problem_of(np.random.default_rng(seed).standard_normal((2, 3, 3, 3, 2)), metric, seed)
    rank = tuple(2 for _ in FORMATS[name].widths((2, 2) if name == "tucker2" else (2,)))
    stages = sliced(name, rank, problem)
    if not good:
        stages = random_like(stages, seed)
    errors = [problem.error(compose(stages))]
    for _ in range(4):
        stages = alternate(stages, problem, rounds=1, steps=3)
        errors.append(problem.error(compose(stages)))
    assert all(b <= a for a, b in pairwise(errors))


@pytest.mark.parametrize("metric", ["none", "in", "both"])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_the_first_stage_ends_where_its_gradient_is_zero(name: str, rank: Rank, metric: str) -> None:
    rng = np.random.default_rng(5)
    problem = problem_of(rng.standard_normal(SHAPE), metric, 5)
    start = random_like(sliced(name, rank, problem), 5)
    found = refit_first(start, problem, steps=200)
    assert all(a is b for a, b in zip(found[1:], start[1:], strict=True))
    least = problem.error(compose(found))
    first = found[0].weight
    for _ in range(10):
        change = rng.standard_normal(first.shape)
        # the error is a parabola in one stage, so at its least it rises equally in both directions
        up, down = (
            problem.error(compose((Stage(first + s * change, None, found[0].geometry), *found[1:]))) for s in (1, -1)
        )
        assert up > least and down > least
        assert up - least == pytest.approx(down - least, rel=1e-4)


def test_groups_are_fitted_apart() -> None:
    both = problem_of(np.random.default_rng(0).standard_normal((2, 4, 3, 3, 3)), "both")
    found = compose(alternate(sliced("tucker2", (2, 2), both), both, rounds=1))
    for g in range(2):
        alone = FitProblem(both.target[g : g + 1], both.gram[g : g + 1], both.root[g : g + 1])
        wanted = compose(alternate(sliced("tucker2", (2, 2), alone), alone, rounds=1))
        np.testing.assert_allclose(found[g : g + 1], wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "kernel"), [("channel_svd_out", (3, 3)), ("svd", (1, 1)), ("svd", ())])
def test_chains_whose_first_stage_sees_everything_come_back_as_they_are(name: str, kernel: tuple[int, ...]) -> None:
    problem = problem_of(np.random.default_rng(0).standard_normal((1, 4, 3, *kernel)), "in")
    stages = sliced(name, (2,), problem)
    assert not separable(stages)
    assert alternate(stages, problem, rounds=5) is stages
    # and the slice is the optimum already, so that fitting has nothing to add
    decomposition = FORMATS[name].decompose(Geometry(kernel), problem)
    assert problem.error(compose(fitted(decomposition, (2,), problem, 5))) == pytest.approx(
        problem.error(compose(stages)), rel=1e-9
    )


def test_a_chain_of_one_stage_comes_back_as_it_is() -> None:
    problem = problem_of(np.random.default_rng(0).standard_normal((1, 4, 3, 3, 3)), "in")
    stages = (Stage(np.zeros((4, 3, 3, 3)), None, Geometry((3, 3))),)
    assert alternate(stages, problem, rounds=5) is stages


def test_a_fit_is_no_worse_than_the_tail_alone() -> None:
    for seed in range(5):
        problem = problem_of(np.random.default_rng(seed).standard_normal((1, 5, 4, 3, 3)), "in", seed)
        for name, rank in (("channel_svd_in", (2,)), ("spatial_svd_hv", (3,)), ("tucker2", (2, 2))):
            decomposition = FORMATS[name].decompose(Geometry((3, 3)), problem)
            slice_ = decomposition.stages(rank)
            errors = [problem.error(compose(s)) for s in (slice_, refit_last(slice_, problem))]
            errors.append(problem.error(compose(fitted(decomposition, rank, problem, rounds=4))))
            assert errors[0] >= errors[1] * (1 - 1e-9) >= errors[2] * (1 - 1e-9)


def test_wide_patches_get_fewer_rounds() -> None:
    def width(out: int, k: int) -> FitProblem:
        return FitProblem(np.broadcast_to(np.zeros(1), (1, out, k)))

    # 2 x 512 x 4608 x 4608 x 8 steps are 174 GFLOP: not one round; an eighth of the width is 64 times cheaper
    assert affordable_rounds(width(512, 4608), 8) == 0
    assert affordable_rounds(width(512, 576), 8) == 22


@pytest.mark.parametrize(("a", "b"), [(12, 3), (5, 9)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_normal_operator_is_the_same_by_either_way(a: int, b: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((2 * a * b, a * b))
    split = _Split(a, b, rng.standard_normal((8, a * b)), samples.T @ samples, np.eye(a))
    rest, x = rng.standard_normal((8, rank, b)), rng.standard_normal((rank, a))
    composed = np.einsum("orb,ra->oab", rest, x).reshape(8, -1) @ samples.T @ samples
    wanted = np.einsum("orb,oab->ra", rest, composed.reshape(8, a, b))
    stage = _FirstStage(rest, split)
    found = [stage._normal(x)]
    assert (stage.inner is not None) == (rank < 8)
    stage.inner = None
    found.append(stage._normal(x))
    np.testing.assert_allclose(found, [wanted, wanted], rtol=1e-10, atol=1e-10 * np.abs(wanted).max())
