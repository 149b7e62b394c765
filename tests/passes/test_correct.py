from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from passes.core.factor import chain_of, fitted
from passes.core.fit import FitProblem
from passes.core.formats import FORMATS
from passes.core.metric import OutputMetric
from passes.core.reference import relative_l2
from passes.core.site import Chain, Site
from passes.correct import Choice, Correction, Original, coprime, correct, correct_each
from passes.factorize import Factorize
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Epilogue, Feeds, Stepper, Stop, Walk
from passes.sensitivity import moments_by_site
from passes.torch_apply import run_chain
from tests.onnx_models import normal, onnx_model

Array = NDArray[Any]

RESIDUAL = """net (float[N,3,8,8] x) => (float[N,12,4,4] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    ra = Relu (a)
    b = Conv <pads = [1,1,1,1]> (ra, w1, b1)
    rb = Relu (b)
    c = Conv <pads = [1,1,1,1]> (rb, w2, b2)
    s = Add (c, ra)
    rs = Relu (s)
    d = Conv <pads = [1,1,1,1], strides = [2,2]> (rs, w3, b3)
    rd = Relu (d)
    e = Conv (rd, w4, b4)
    short = Conv <strides = [2,2]> (rs, w5)
    t = Add (e, short)
    y = Relu (t)
}"""


def residual_weights(seed: int) -> dict[str, Array]:
    """He's scale, so that nothing grows or dies on the way."""
    shapes = {"w0": (12, 3, 3, 3), **{f"w{i}": (12, 12, 3, 3) for i in (1, 2, 3)}, "w4": (12, 12, 1, 1)}
    shapes["w5"] = (12, 12, 1, 1)
    weights = {
        name: normal(*shape, seed=seed + i) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        for i, (name, shape) in enumerate(shapes.items())
    }
    return {**weights, **{f"b{i}": np.float32(0.1) * normal(12, seed=seed + 10 + i) for i in range(5)}}


def network(body: str, weights: dict[str, Array]) -> tuple[OnnxGraph, Stepper]:
    graph = OnnxGraph.from_model(onnx_model(body, weights))
    return graph, Stepper(graph.model(), graph.sites().sites)


def residual(seed: int) -> tuple[OnnxGraph, Stepper, dict[str, Array]]:
    graph, stepper = network(RESIDUAL, residual_weights(seed))
    # smooth images: their channels and neighbours go together, as those of photographs do
    x = normal(48, 3, 10, 10, seed=seed)
    x = (x[..., :-2, :-2] + x[..., 1:-1, :-2] + x[..., :-2, 1:-1] + x[..., 1:-1, 1:-1] + x[..., 2:, 2:]) / 2
    return graph, stepper, {"x": x}


def sites(stepper: Stepper) -> dict[str, Site]:
    """Sites by the tensor that they write, which is what the networks here are written by."""
    return dict(stepper.sites)


def choices(stepper: Stepper, **wanted: tuple[str, tuple[int, ...]] | None) -> dict[str, Choice]:
    found = {}
    for output, choice in wanted.items():
        found[stepper.sites[output].name] = Choice() if choice is None else Choice(FORMATS[choice[0]], choice[1])
    return found


COMPRESSED: dict[str, tuple[str, tuple[int, ...]] | None] = {
    "a": None,
    "b": ("channel_svd_out", (4,)),
    "c": ("channel_svd_in", (5,)),
    "d": ("spatial_svd_vh", (8,)),
    "e": ("svd", (6,)),
    "short": None,
}
FULL: dict[str, tuple[str, tuple[int, ...]] | None] = {
    "a": ("channel_svd_out", (12,)),
    "b": ("tucker2", (12, 12)),
    "c": ("channel_svd_in", (12,)),
    "d": ("spatial_svd_hv", (36,)),
    "e": ("svd", (12,)),
    "short": ("svd", (12,)),
}
EXACT = Correction(ridge=1e-6)


def missed(found: tuple[dict[str, Chain], dict[str, torch.Tensor], dict[str, torch.Tensor]], name: str = "y") -> float:
    _, before, after = found
    return relative_l2(after[name].numpy(), before[name].numpy())


def test_dense_layers_left_alone_change_nothing() -> None:
    _, stepper, feeds = residual(0)
    nothing = choices(stepper, **dict.fromkeys(COMPRESSED))
    for found in (
        correct(stepper, feeds, nothing, Correction(dense=False)),
        correct(stepper, feeds, {}, Correction()),
    ):
        chains, before, after = found
        assert chains == {}
        assert torch.equal(before["y"], after["y"])


def test_dense_layers_refitted_on_their_own_outputs_stay_what_they_are() -> None:
    _, stepper, feeds = residual(0)
    found = correct(stepper, feeds, choices(stepper, **dict.fromkeys(COMPRESSED)), Correction())
    assert {c.format for c in found[0].values()} == {"dense"} and len(found[0]) == 6
    assert missed(found) < 1e-5


def test_full_rank_reproduces_the_outputs() -> None:
    _, stepper, feeds = residual(0)
    found = correct(stepper, feeds, choices(stepper, **FULL), Correction())
    assert {c.format for c in found[0].values()} == {c[0] for c in FULL.values() if c}
    assert missed(found) < 1e-4


def same(one: dict[str, Chain], other: dict[str, Chain]) -> bool:
    assert one.keys() == other.keys()
    return all(
        np.array_equal(a.weight, b.weight) and (a.bias is None if b.bias is None else np.array_equal(a.bias, b.bias))
        for name in one
        for a, b in zip(one[name].stages, other[name].stages, strict=True)
    )


@pytest.mark.parametrize(("limit", "walks"), [(1 << 20, 4), (0, 5), (5_000, 5)])
def test_a_later_correction_is_the_same_with_what_an_earlier_one_left(limit: int, walks: int) -> None:
    _, stepper, feeds = residual(0)
    plans = [choices(stepper, **COMPRESSED), choices(stepper, **FULL)]
    alone = [correct(stepper, feeds, plan, Correction()) for plan in plans]
    walked: list[Stepper] = []
    counted = Stepper.walk
    original = Original(limit)

    def walk(stepper: Stepper, feeds: Feeds) -> Walk:
        walked.append(stepper)
        return counted(stepper, feeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "walk", walk)
        for plan, wanted in zip(plans, alone, strict=True):
            (found,), before = correct_each(stepper, feeds, [plan], Correction(), original=original)
            assert same(found.chains, wanted[0])
            assert torch.equal(before["y"], wanted[1]["y"]) and torch.equal(found.outputs["y"], wanted[2]["y"])
        assert len(walked) == walks - 1  # two of the plans', and of the original network one or two
        original.forget()
        correct_each(stepper, feeds, plans[:1], Correction(), original=original)
        assert len(walked) == walks + 1


def test_what_was_left_is_for_the_same_options_alone() -> None:
    _, stepper, feeds = residual(0)
    plan = choices(stepper, **COMPRESSED)
    original = Original()
    correct_each(stepper, feeds, [plan], Correction(samples=3), original=original)
    for options in (Correction(), Correction(seed=1), Correction(skips=False)):
        (found,), _ = correct_each(stepper, feeds, [plan], options, original=original)
        assert same(found.chains, correct(stepper, feeds, plan, options)[0])


KINDS = """net (float[N,4,6,6] x) => (float[N,36,5] y) {
    a = Conv <pads = [1,1,1,1], group = 4> (x, w0)
    b = ConvTranspose <strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]> (a, w1, b1)
    c = Conv <strides = [2,2], pads = [0,1,1,0], group = 2> (b, w2)
    r = Clip (c, low, high)
    f = Reshape (r, shape)
    t = Transpose <perm = [0,2,1]> (f)
    m = MatMul (t, w3)
    y = Add (m, b3)
}"""
KINDS_WEIGHTS = {
    "w0": normal(4, 1, 3, 3),
    "w1": normal(4, 6, 3, 3) * np.float32(0.3),
    "b1": normal(6),
    "w2": normal(8, 3, 3, 3) * np.float32(0.3),
    "w3": normal(8, 5),
    "b3": normal(5),
    "low": np.array(-1, np.float32),
    "high": np.array(1, np.float32),
    "shape": np.array([0, 8, 36]),
}


@pytest.mark.parametrize("as_list", [False, True])
def test_every_kind_of_layer_is_reproduced_at_full_rank(as_list: bool) -> None:
    body = KINDS.replace("float[N", "float[1") if as_list else KINDS
    _, stepper = network(body, KINDS_WEIGHTS)
    assert len(stepper.sites) == 4
    assert stepper.epilogues["c"] == Epilogue(None, -1.0, 1.0)
    x = normal(40, 4, 6, 6, seed=5)
    feeds = [{"x": x[i : i + 1]} for i in range(40)] if as_list else {"x": x}
    wanted: dict[str, Choice] = {}
    for site in stepper.sites.values():
        for name in ("svd", "spatial_svd_vh", "tucker2", "channel_svd_in"):
            full = FORMATS[name].full_rank(site.stage)
            if full is not None:
                wanted[site.name] = Choice(FORMATS[name], full)
                break
    found = correct(stepper, feeds, wanted, Correction())
    assert missed(found) < 1e-4


def test_the_outputs_are_those_of_the_rewritten_network() -> None:
    graph, stepper, feeds = residual(1)
    chains, before, after = correct(stepper, feeds, choices(stepper, **COMPRESSED), Correction())
    np.testing.assert_allclose(before["y"].numpy(), graph.run(feeds)[0], rtol=1e-4, atol=1e-5)
    for site in stepper.sites.values():
        assert chains[site.name].format == (COMPRESSED[site.output] or ("dense",))[0]
        assert chains[site.name].rank == (COMPRESSED[site.output] or ("", ()))[1]
    assert Factorize(chains).run(graph).modified
    np.testing.assert_allclose(after["y"].numpy(), graph.run(feeds)[0], rtol=1e-4, atol=1e-4)
    assert missed((chains, before, after)) > 1e-2  # there was something to lose


def layerwise(stepper: Stepper, feeds: dict[str, Array], wanted: dict[str, Choice]) -> dict[str, torch.Tensor]:
    """Each layer factorized in the metric of its own original inputs, on its own."""
    moments, _ = moments_by_site(stepper, feeds, 32_000_000, 0)
    chains = {}
    for site in stepper.sites.values():
        choice, stage = wanted[site.name], site.stage
        if choice.format is None:
            continue
        problem = FitProblem(stage.grouped_weight().astype(np.float64), moments[site.name].ridge(1e-6))
        stages = fitted(choice.format.decompose(stage.geometry, problem), choice.rank, problem, 6)
        chains[site.name] = chain_of(choice.format.name, choice.rank, stages, stage.bias)

    def at_site(stop: Stop) -> torch.Tensor:
        return run_chain(stop.site, chains.get(stop.site.name, Chain((stop.site.stage,))), stop.input)

    with torch.no_grad():
        return stepper.run(feeds, at_site)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_correction_loses_less_than_layers_fitted_on_their_own(seed: int) -> None:
    _, stepper, feeds = residual(seed)
    wanted = choices(stepper, **COMPRESSED)
    found = correct(stepper, feeds, wanted, EXACT)
    alone = relative_l2(layerwise(stepper, feeds, wanted)["y"].numpy(), found[1]["y"].numpy())
    assert missed(found) < 0.8 * alone
    # also with the dense layers left as they are
    assert missed(correct(stepper, feeds, wanted, replace(EXACT, dense=False))) < alone


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_dense_layers_absorb_a_part_of_the_error(seed: int) -> None:
    _, stepper, feeds = residual(seed)
    wanted = choices(stepper, **COMPRESSED)
    with_dense, without = (missed(correct(stepper, feeds, wanted, replace(EXACT, dense=d))) for d in (True, False))
    assert with_dense < without


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_comes_over_the_skip_is_undone_too(seed: int) -> None:
    _, stepper, feeds = residual(seed)
    # the error is made before the branch, and the layer inside of it can make up for it
    wanted = choices(stepper, a=("channel_svd_out", (5,)), b=None, c=None, d=None, e=None, short=None)
    seen, blind = (missed(correct(stepper, feeds, wanted, replace(EXACT, skips=s))) for s in (True, False))
    assert seen < blind


CLAMPED = """net (float[N,6,7,7] x) => (float[N,10,7,7] y) {
    k = Conv (x, v)
    a = Conv <pads = [1,1,1,1]> (x, w, b)
    TAIL
}"""
TAILS = {
    "relu": ("y = Relu (a)", 0.0, None),
    "clip": ("y = Clip (a, low, high)", -1.0, 2.0),
    "skip": ("s = Add (a, k)  y = Relu (s)", 0.0, None),
}


def clamped(tail: str, seed: int) -> tuple[Stepper, dict[str, Array]]:
    """A convolution and what follows it; the branch ``k`` is there before the convolution."""
    weights = {
        "w": normal(10, 6, 3, 3, seed=seed),
        "b": normal(10, seed=seed),
        "v": 3 * normal(10, 6, 1, 1, seed=seed),
        "low": np.array(-1, np.float32),
        "high": np.array(2, np.float32),
    }
    body = CLAMPED.replace("TAIL", tail)
    if ", k)" not in tail:
        body = body.replace("    k = Conv (x, v)\n", "")
    used = {n: v for n, v in weights.items() if n in ("w", "b") or n in tail or (n == "v" and ", k)" in tail)}
    return network(body, used)[1], {"x": normal(20, 6, 7, 7, seed=seed)}


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize("seed", range(3))
def test_sweeps_lower_the_error_behind_a_clamp(kind: str, seed: int) -> None:
    tail, low, high = TAILS[kind]
    stepper, feeds = clamped(tail, seed)
    site, other = stepper.sites["a"], stepper.sites.get("k")
    wanted = choices(stepper, a=("channel_svd_out", (4,)))
    x = torch.from_numpy(feeds["x"])
    skip = run_chain(other, Chain((other.stage,)), x).numpy() if other else 0.0
    total = run_chain(site, Chain((site.stage,)), x).numpy() + skip
    bounds, errors = [], []
    for sweeps in (0, 1, 2, 3, 6):
        found = correct(stepper, feeds, wanted, Correction(ridge=1e-7, sweeps=sweeps))
        errors.append(missed(found))
        # what the sweeps minimise lies above the error: free on the flat side where the original is flat, and
        # the plain square everywhere else
        y = run_chain(site, found[0][site.name], x).numpy() + skip
        goal = total if low is None else np.where(total <= low, np.minimum(y, low), total)
        goal = goal if high is None else np.where(total >= high, np.maximum(y, high), goal)
        bounds.append(float(np.square(y - goal).sum(dtype=np.float64)))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(bounds))
    assert errors[3] < 0.99 * errors[0]


def test_without_a_clamp_sweeps_change_nothing() -> None:
    stepper, feeds = clamped("y = Tanh (a)", 0)
    wanted = choices(stepper, a=("channel_svd_out", (4,)))
    first, second = (correct(stepper, feeds, wanted, Correction(sweeps=n))[2]["y"] for n in (0, 3))
    assert torch.equal(first, second)


JOINED = """net (float[N,6,7,7] x) => (float[N,10,7,7] y) {
    a = Conv <pads = [1,1,1,1]> (x, w)
    k = Conv (x, v)
    s = Add (a, k)
    y = Relu (s)
}"""


def test_a_clamp_behind_an_unknown_branch_is_left_out_of_account() -> None:
    """Where the branch is not there yet, nobody knows on which side of the clamp the sum will end."""
    _, stepper = network(JOINED, {"w": normal(10, 6, 3, 3), "v": normal(10, 6, 1, 1)})
    feeds = {"x": normal(20, 6, 7, 7)}
    skips = {}

    def at_site(stop: Stop) -> torch.Tensor:
        skips[stop.site.output] = stop.skip
        return run_chain(stop.site, Chain((stop.site.stage,)), stop.input)

    stepper.run(feeds, at_site)
    (first,) = [output for output, skip in skips.items() if skip is None]
    assert first == "a" and stepper.epilogues["a"] == Epilogue("k", 0.0, None)
    wanted = choices(stepper, a=("channel_svd_out", (4,)))
    plain, swept = (correct(stepper, feeds, wanted, Correction(sweeps=n))[0] for n in (0, 3))
    for one, other in zip(plain[stepper.sites["a"].name], swept[stepper.sites["a"].name], strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)


def test_an_output_metric_draws_the_rank_to_what_counts() -> None:
    stepper, feeds = clamped("y = Tanh (a)", 1)
    (site,) = stepper.sites.values()
    wanted = choices(stepper, a=("channel_svd_out", (3,)))
    weight = np.ones(10)
    weight[:3] = 100.0  # three channels of ten, and a rank of three
    metric = OutputMetric(np.diag(weight)[None], np.ones((7, 7)))
    plain, before, _ = correct(stepper, feeds, wanted, EXACT)
    drawn, *_ = correct(stepper, feeds, wanted, EXACT, {site.name: metric})

    def error(chains: dict[str, Chain], channels: slice) -> float:
        x = torch.from_numpy(feeds["x"])
        y, found = run_chain(site, Chain((site.stage,)), x), run_chain(site, chains[site.name], x)
        return relative_l2(found[:, channels].numpy(), y[:, channels].numpy())

    assert error(drawn, slice(0, 3)) < 0.05 < error(plain, slice(0, 3))
    assert error(drawn, slice(3, None)) > error(plain, slice(3, None))
    assert before["y"].shape == (20, 10, 7, 7)


def test_positions_that_count_more_are_fitted_better() -> None:
    stepper, feeds = clamped("y = Tanh (a)", 1)
    (site,) = stepper.sites.values()
    wanted = choices(stepper, a=("channel_svd_out", (3,)))
    left = np.full((7, 7), 0.01)
    left[:, :3] = 2.0
    metric = OutputMetric(np.eye(site.stage.out_channels)[None], left / left.mean())
    plain, *_ = correct(stepper, feeds, wanted, EXACT)
    drawn, *_ = correct(stepper, feeds, wanted, EXACT, {site.name: metric})

    def error(chains: dict[str, Chain], columns: slice) -> float:
        x = torch.from_numpy(feeds["x"])
        y, found = run_chain(site, Chain((site.stage,)), x), run_chain(site, chains[site.name], x)
        return relative_l2(found[..., columns].numpy(), y[..., columns].numpy())

    assert error(drawn, slice(0, 3)) < error(plain, slice(0, 3))
    assert error(drawn, slice(3, None)) > error(plain, slice(3, None))


@pytest.mark.parametrize(("unknowns", "groups", "rows"), [(144, 1, 144 * 120), (576, 1, 576 * 120), (1152, 1, 17280)])
def test_wide_layers_get_fewer_positions_for_the_same_work(unknowns: int, groups: int, rows: int) -> None:
    # products for the Gram matrix: 120 x 576^3 where K is at least 576
    assert Correction().rows(unknowns, groups) == rows
    assert Correction(elements=1000).rows(100, 2) == 5


def test_the_seed_decides_which_positions_are_looked_at() -> None:
    _, stepper, feeds = residual(1)
    wanted = choices(stepper, **COMPRESSED)
    few = Correction(elements=20_000)
    first, again, other = (correct(stepper, feeds, wanted, replace(few, seed=s)) for s in (0, 0, 1))
    assert torch.equal(first[2]["y"], again[2]["y"])
    assert not torch.equal(first[2]["y"], other[2]["y"])
    for name, chain in first[0].items():
        for one, two in zip(chain, again[0][name], strict=True):
            np.testing.assert_array_equal(one.weight, two.weight)
            if one.bias is not None:
                np.testing.assert_array_equal(one.bias, two.bias)


def test_samples_one_by_one_are_fitted_as_in_a_batch() -> None:
    weights = residual_weights(1)
    _, batched, feeds = residual(1)
    _, fixed = network(RESIDUAL.replace("float[N", "float[1"), weights)
    listed = [{"x": feeds["x"][i : i + 1]} for i in range(len(feeds["x"]))]
    one = correct(batched, feeds, choices(batched, **COMPRESSED), Correction())
    two = correct(fixed, listed, choices(fixed, **COMPRESSED), Correction())
    np.testing.assert_allclose(one[1]["y"].numpy(), two[1]["y"].numpy(), rtol=1e-4, atol=1e-5)
    # sums of float32 in another order
    np.testing.assert_allclose(one[2]["y"].numpy(), two[2]["y"].numpy(), rtol=1e-3, atol=1e-3)


def test_progress_is_told_of_every_site() -> None:
    _, stepper, feeds = residual(1)
    told: list[str] = []
    correct(stepper, feeds, {}, Correction(), progress=lambda site: told.append(site.output))
    assert sorted(told) == sorted(stepper.sites)


def test_a_correction_holds_on_samples_that_it_has_not_seen() -> None:
    _, stepper, feeds = residual(1)
    wanted = choices(stepper, **COMPRESSED)
    known, new = {"x": feeds["x"][:32]}, {"x": feeds["x"][32:]}
    chains, _, _ = correct(stepper, known, wanted, Correction())

    def run(chains: dict[str, Chain]) -> Array:
        def at_site(stop: Stop) -> torch.Tensor:
            return run_chain(stop.site, chains.get(stop.site.name, Chain((stop.site.stage,))), stop.input)

        with torch.no_grad():
            return stepper.run(new, at_site)["y"].numpy()

    alone = layerwise(stepper, new, wanted)["y"].numpy()  # and that although these are fitted on the new samples
    assert relative_l2(run(chains), run({})) < relative_l2(alone, run({}))


@pytest.mark.parametrize("threads", [1, 3])
def test_plans_side_by_side_get_what_each_gets_alone(threads: int) -> None:
    _, stepper, feeds = residual(1)
    plans = [choices(stepper, **wanted) for wanted in (COMPRESSED, FULL, dict.fromkeys(COMPRESSED))]
    plans.append(choices(stepper, d=("tucker2", (5, 7))))  # the other layers stay out of it
    few = Correction(elements=20_000)
    found, before = correct_each(stepper, feeds, plans, few, threads=threads)
    assert len(found) == len(plans)
    for plan, together in zip(plans, found, strict=True):
        chains, alone_before, after = correct(stepper, feeds, plan, few)
        assert torch.equal(before["y"], alone_before["y"]) and torch.equal(together.outputs["y"], after["y"])
        assert together.chains.keys() == chains.keys() == plan.keys()
        for name, chain in chains.items():
            for one, two in zip(chain, together.chains[name], strict=True):
                np.testing.assert_array_equal(one.weight, two.weight)
                assert (one.bias is None) == (two.bias is None)
                if one.bias is not None and two.bias is not None:
                    np.testing.assert_array_equal(one.bias, two.bias)


def test_what_fails_in_a_thread_is_not_lost() -> None:
    _, stepper, feeds = residual(1)
    broken = {"x": np.full_like(feeds["x"], np.nan)}
    plans = [choices(stepper, **COMPRESSED), choices(stepper, **FULL)]
    with pytest.raises(FloatingPointError):
        correct_each(stepper, broken, plans, Correction(), threads=2)


def test_threads_of_torch_are_those_of_before() -> None:
    _, stepper, feeds = residual(1)
    count = torch.get_num_threads()
    correct_each(stepper, feeds, [choices(stepper, **COMPRESSED)] * 2, Correction(), threads=2)
    assert torch.get_num_threads() == count and torch.is_grad_enabled()


TWO = """net (float[N,3,8,8] x) => (float[N,5,8,8] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    y = Conv (a, w1, b1)
}"""


def test_clean_inputs_are_fitted_to_beside_those_that_arrive() -> None:
    weights = {"w0": normal(8, 3, 3, 3, seed=1), "w1": normal(5, 8, 1, 1, seed=2), "b0": normal(8), "b1": normal(5)}
    _, stepper = network(TWO, weights)
    x = torch.from_numpy(normal(20, 3, 8, 8, seed=3))
    every = Correction(ridge=1e-9, samples=10**6, clean=1)
    chains, before, _ = correct(stepper, {"x": x.numpy()}, choices(stepper, a=("tucker2", (2, 3)), y=None), every)
    first, second = sites(stepper)["a"], sites(stepper)["y"]

    def pixels(values: torch.Tensor) -> Array:
        return values.movedim(1, -1).reshape(-1, values.shape[1]).double().numpy()

    inputs = np.concatenate(
        [pixels(run_chain(first, chain, x)) for chain in (chains[first.name], Chain((first.stage,)))]
    )
    wanted = np.concatenate([pixels(before["y"])] * 2)
    solution, *_ = np.linalg.lstsq(np.hstack([inputs, np.ones((len(inputs), 1))]), wanted, rcond=None)
    (stage,) = chains[second.name].stages
    assert stage.bias is not None
    np.testing.assert_allclose(stage.weight.reshape(5, 8).T, solution[:-1], rtol=0, atol=2e-3)
    np.testing.assert_allclose(stage.bias, solution[-1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("clean", [None, 3])
def test_the_samples_of_one_plan_are_shared_by_threads_without_a_difference(clean: int | None) -> None:
    _, stepper, feeds = residual(1)
    options = Correction(samples=500, clean=clean)
    plan = choices(stepper, **COMPRESSED)
    (alone,), before = correct_each(stepper, feeds, [plan], options)
    (shared,), before_too = correct_each(stepper, feeds, [plan], options, threads=3)
    assert torch.equal(before["y"], before_too["y"]) and torch.equal(alone.outputs["y"], shared.outputs["y"])


@pytest.mark.parametrize(("sides", "step"), [((), 3), ((32, 32), 3), ((3, 8), 5), ((12, 5), 7), ((1, 1), 3), ((6,), 5)])
def test_steps_over_a_grid_meet_all_of_its_columns(sides: tuple[int, ...], step: int) -> None:
    assert coprime(3, sides) == step
    for side in sides:
        assert len({k % side for k in range(0, step * side, step)}) == side
