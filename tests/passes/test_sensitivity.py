from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import passes.sensitivity
from passes.core.error import fisher_errors
from passes.core.factor import fitted
from passes.core.fit import FitProblem
from passes.core.formats import FORMATS
from passes.core.moments import Moments
from passes.core.site import Chain, Site, Stage, compose
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Stepper, Stop
from passes.ranks.candidates import CandidateLimits, candidates
from passes.sensitivity import (
    Reaction,
    divergence,
    drawn_label,
    is_classifier,
    moments_by_site,
    output_metric,
    output_noise,
    reactions,
    score,
    scores,
)
from passes.torch_apply import run_chain
from tests.onnx_models import normal, onnx_model
from tests.passes.core.layers import covariance, problem_of
from tests.passes.ranks.prices import TiledPrices

Array = NDArray[Any]
Outputs = Mapping[str, torch.Tensor]

NETWORK = """net (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w0, b0)
    r = Relu (a)
    b = Conv <group = 2> (r, w1)
    p = GlobalAveragePool (b)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w2, b2)
}"""
WEIGHTS = {
    "w0": normal(4, 3, 3, 3),
    "b0": normal(4),
    "w1": normal(6, 2, 2, 3),
    "w2": normal(5, 6),
    "b2": normal(5),
}
LINEAR = "net (float[N,4] x) => (float[N,3] y) { y = Gemm <transB = 1> (x, w, b) }"


def network(body: str, weights: dict[str, Array]) -> Stepper:
    graph = OnnxGraph.from_model(onnx_model(body, weights))
    return Stepper(graph.model(), graph.sites().sites)


def named(stepper: Stepper) -> dict[str, Site]:
    return {site.name: site for site in stepper.sites.values()}


def dense(stop: Stop) -> torch.Tensor:
    return run_chain(stop.site, Chain((stop.site.stage,)), stop.input)


def unfolded() -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """The network in torch, with the patches and outputs of its layers: (groups, rows, K) and (groups, rows, O)."""
    x = normal(20, 3, 8, 8, seed=1)
    w0, b0, w1, w2, b2 = (torch.from_numpy(WEIGHTS[n]).double() for n in ("w0", "b0", "w1", "w2", "b2"))
    value = torch.from_numpy(x).double()
    unfold = torch.nn.functional.unfold
    found = {}

    def rows(columns: torch.Tensor, y: torch.Tensor, groups: int) -> tuple[Array, Array]:
        flat = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        outs = y.movedim(1, -1).reshape(-1, y.shape[1])
        return (
            np.stack([part.numpy() for part in flat.chunk(groups, 1)]),
            np.stack([part.numpy() for part in outs.chunk(groups, 1)]),
        )

    a = torch.conv2d(value, w0, b0, 2, 1)
    found["a"] = rows(unfold(value, 3, padding=1, stride=2), a, 1)
    r = a.relu()
    b = torch.conv2d(r, w1, None, 1, 0, 1, 2)
    found["b"] = rows(unfold(r, (2, 3)), b, 2)
    f = b.mean((2, 3))
    y = f @ w2.T + b2
    found["y"] = (f.numpy()[None], y.numpy()[None])
    return x, found


def test_moments_are_those_of_the_patches() -> None:
    stepper = network(NETWORK, WEIGHTS)
    x, wanted = unfolded()
    told: list[str] = []
    found, outputs = moments_by_site(stepper, {"x": x}, 10**8, 0, lambda site: told.append(site.output))
    assert sorted(told) == ["a", "b", "y"]
    np.testing.assert_allclose(outputs["y"].numpy(), wanted["y"][1][0], rtol=1e-4, atol=1e-4)
    for output, (columns, targets) in wanted.items():
        moments = found[stepper.sites[output].name]
        assert moments.count == columns.shape[1]
        for g in range(len(columns)):
            both = np.cov(np.hstack([columns[g], targets[g]]), rowvar=False, bias=True)
            k = columns.shape[2]
            scale = np.abs(both).max()  # the walk is in float32
            np.testing.assert_allclose(moments.gram[g], both[:k, :k], rtol=0, atol=1e-5 * scale)
            np.testing.assert_allclose(moments.cross[g], both[k:, :k], rtol=0, atol=1e-5 * scale)
            np.testing.assert_allclose(moments.mean_x[g], columns[g].mean(0), rtol=0, atol=1e-5)


def test_positions_are_sampled_where_there_are_too_many() -> None:
    stepper = network(NETWORK, WEIGHTS)
    x = np.concatenate([unfolded()[0]] * 8)  # 160 images of 4 x 4 positions: 2560 rows of the first layer
    name = stepper.sites["a"].name
    whole, _ = moments_by_site(stepper, {"x": x}, 10**8, 0)
    first, again, other = (moments_by_site(stepper, {"x": x}, 1, seed)[0][name] for seed in (0, 0, 1))
    assert whole[name].count == 2560 and first.count == 1024  # never fewer than that
    np.testing.assert_array_equal(first.gram, again.gram)
    assert not np.array_equal(first.gram, other.gram)
    # a sample of 1024: an entry of a covariance is off by about 1/32 of a variance
    assert np.abs(first.gram - whole[name].gram).max() < 0.25 * np.abs(whole[name].gram).max()


@pytest.mark.parametrize("threads", [2, 5])
def test_moments_are_the_same_for_any_number_of_threads(threads: int) -> None:
    """The walk goes on while they are measured, and clamps the output of ``a`` in place."""
    stepper = network(NETWORK, WEIGHTS)
    x = np.concatenate([unfolded()[0]] * 8)
    told: list[str] = []
    alone, before = moments_by_site(stepper, {"x": x}, 1, 0)
    for _ in range(5):
        told.clear()
        found, outputs = moments_by_site(stepper, {"x": x}, 1, 0, lambda site: told.append(site.name), threads)
        assert told == list(found) == list(alone)
        for name, moments in alone.items():
            for of_one, of_many in zip(vars(moments).values(), vars(found[name]).values(), strict=True):
                np.testing.assert_array_equal(of_one, of_many)
        np.testing.assert_array_equal(outputs["y"].numpy(), before["y"].numpy())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("failing", [1, 3])
def test_an_error_in_the_moments_arrives(threads: int, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails(*_: Any) -> Moments:
        calls.append(1)
        if len(calls) == failing:
            raise FloatingPointError("not finite")
        return Moments(*[np.zeros(1)] * 4, 1)  # type: ignore[arg-type]

    monkeypatch.setattr(passes.sensitivity.Moments, "of", fails)
    with pytest.raises(FloatingPointError, match="not finite"):
        moments_by_site(network(NETWORK, WEIGHTS), {"x": unfolded()[0]}, 10**8, 0, threads=threads)


class TestDivergence:
    def test_of_scores_is_the_mean_of_the_kullback_leibler_divergence(self) -> None:
        a, b = (torch.from_numpy(normal(6, 4, seed=s)) for s in (0, 1))
        p, q = (np.exp(v.numpy().astype(float)) for v in (a, b))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        wanted = (p * np.log(p / q)).sum(1).mean()
        assert divergence({"y": b}, {"y": a}) == pytest.approx(wanted, rel=1e-6)
        # probabilities are taken as they are
        found = divergence({"y": torch.softmax(b, 1)}, {"y": torch.softmax(a, 1)})
        assert found == pytest.approx(wanted, rel=1e-4)
        # and a constant added to the scores of a sample is nothing
        assert divergence({"y": a + torch.arange(6.0)[:, None]}, {"y": a}) == pytest.approx(0, abs=1e-6)

    def test_of_other_outputs_is_the_mean_of_their_relative_squared_errors(self) -> None:
        a, b = torch.from_numpy(normal(2, 3, 4)), torch.from_numpy(normal(5))
        found = divergence({"a": 1.1 * a, "b": b, "n": torch.ones(3)}, {"a": a, "b": b, "n": torch.tensor([1, 2, 3])})
        assert found == pytest.approx(0.01 / 2, rel=1e-5)

    def test_a_vanishing_class_is_no_infinity(self) -> None:
        reference = {"y": torch.tensor([[0.5, 0.5], [1.0, 0.0]])}
        assert np.isfinite(divergence({"y": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, reference))

    @pytest.mark.parametrize(
        ("outputs", "wanted"),
        [
            ({"y": torch.zeros(4, 2)}, True),
            ({"y": torch.zeros(4, 1)}, False),
            ({"y": torch.zeros(4, 2, 3)}, False),
            ({"y": torch.zeros(4, 2), "z": torch.zeros(4)}, False),
            ({"y": torch.zeros(4, 2), "n": torch.zeros(4, dtype=torch.int64)}, True),
        ],
    )
    def test_what_a_classifier_is(self, outputs: Outputs, wanted: bool) -> None:
        assert is_classifier(outputs) == wanted


def squares(outputs: Outputs, generator: torch.Generator) -> torch.Tensor:
    return outputs["y"].square().sum()


def test_a_reaction_is_the_gradient_at_the_output_of_the_layer() -> None:
    stepper = network(NETWORK, WEIGHTS)
    x = unfolded()[0][:4]
    found = reactions(stepper, [{"x": x[:1]}, {"x": x[1:]}], 0, squares, keep_inputs=True)
    assert sorted(found) == sorted(named(stepper))
    generator = torch.Generator()
    for name, site in named(stepper).items():
        reaction = found[name]
        inputs: list[torch.Tensor] = []

        def value(shift: torch.Tensor | None = None, site: Site = site, inputs: list[torch.Tensor] = inputs) -> float:
            def at_site(stop: Stop) -> torch.Tensor:
                if stop.site is site:
                    inputs.append(stop.input)
                    return dense(stop) + (0 if shift is None else shift)
                return dense(stop)

            with torch.no_grad():
                return float(squares(stepper.run({"x": x}, at_site), generator))

        direction = torch.from_numpy(normal(*reaction.gradients.shape, seed=7))
        slope = (value(1e-3 * direction) - value(-1e-3 * direction)) / 2e-3
        wanted = float((torch.from_numpy(reaction.gradients) * direction).sum())
        scale = float(np.abs(reaction.gradients * direction.numpy()).sum())
        # a few outputs of the first layer lie within a step of the kink of their ReLU
        assert abs(slope - wanted) < 1e-2 * scale
        np.testing.assert_allclose(reaction.inputs, inputs[0].numpy(), rtol=1e-4, atol=1e-4)


def test_a_layer_behind_which_the_gradient_is_cut_is_left_out() -> None:
    body = """net (float[N,4] x) => (float[N,3] y) {
        a = MatMul (x, w0)
        s = Softplus (a)
        y = MatMul (s, w1)
    }"""
    stepper = network(body, {"w0": normal(4, 4), "w1": normal(4, 3)})
    found = reactions(stepper, [{"x": normal(5, 4)}], 0)
    assert list(found) == [stepper.sites["y"].name]
    assert found[stepper.sites["y"].name].inputs is None
    all_cut = body.replace("y = MatMul (s, w1)", "t = MatMul (s, w1)  y = Softplus (t)")
    assert reactions(network(all_cut, {"w0": normal(4, 4), "w1": normal(4, 3)}), [{"x": normal(5, 4)}], 0) == {}


def test_the_noise_probe_measures_relative_squared_error() -> None:
    """E (d probe)^2 = sum d^2 / (size^2 D) per sample: the relative squared error, for every direction alike."""
    y = torch.from_numpy(3 * normal(500, 4, 5)).requires_grad_()
    (gradient,) = torch.autograd.grad(output_noise({"y": y}, torch.Generator().manual_seed(0)), y)
    size = float(y.detach().square().mean())
    # 10000 squares of unit normals: their mean is 1 with a deviation of sqrt(2 / 10000)
    assert float(gradient.square().mean()) * size * 20 == pytest.approx(1, abs=0.07)


def test_the_noise_probe_of_scores_does_not_see_a_constant() -> None:
    y = torch.from_numpy(normal(30, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(output_noise({"y": y}, torch.Generator().manual_seed(0)), y)
    np.testing.assert_allclose(gradient.sum(1).numpy(), 0, atol=1e-5)
    assert gradient.abs().min(1).values.max() > 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_drawn_labels_follow_the_prediction(temperature: float) -> None:
    score = torch.tensor([[2.0, 0.0, -1.0]]).repeat(20000, 1).requires_grad_()
    probe = drawn_label({"y": score}, torch.Generator().manual_seed(0), temperature)
    (gradient,) = torch.autograd.grad(probe, score)
    p = torch.softmax(torch.tensor([2.0, 0.0, -1.0]) / temperature, 0)
    # d log p(label) / d score = (1[label] - p) / T: its mean is 0, its second moment the Fisher information
    np.testing.assert_allclose(gradient.mean(0).numpy(), 0, atol=0.02)
    wanted = (torch.diag(p) - torch.outer(p, p)) / temperature**2
    np.testing.assert_allclose((gradient.T @ gradient / 20000).numpy(), wanted.numpy(), atol=0.02 / temperature**2)


def test_scores_are_the_gradients_of_each_sample() -> None:
    stepper = network(NETWORK, WEIGHTS)
    x = unfolded()[0][:3]
    found = reactions(stepper, [{"x": x}], 0, squares, keep_inputs=True)
    for name, site in named(stepper).items():
        per_sample = scores(site, found[name], 3)
        weight = torch.from_numpy(np.array(site.stage.weight)).requires_grad_()
        for sample in range(3):

            def at_site(stop: Stop, site: Site = site, weight: torch.Tensor = weight) -> torch.Tensor:
                if stop.site is not site:
                    return dense(stop)
                g = site.stage.geometry
                if g.ndim:
                    bias = None if site.stage.bias is None else torch.from_numpy(np.array(site.stage.bias))
                    return torch.conv2d(stop.input, weight, bias, g.strides, g.pads[:2], g.dilations, g.groups)
                return stop.input @ weight.T + torch.from_numpy(np.array(site.stage.bias))

            loss = squares(stepper.run({"x": x[sample : sample + 1]}, at_site), torch.Generator())
            (gradient,) = torch.autograd.grad(loss, weight)
            wanted = gradient.numpy().reshape(per_sample.shape[1:])
            np.testing.assert_allclose(per_sample[sample], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_scores_need_the_inputs() -> None:
    stepper = network(LINEAR, {"w": normal(3, 4), "b": normal(3)})
    with pytest.raises(ValueError, match="inputs"):
        scores(stepper.sites["y"], Reaction(np.zeros((2, 3))), 2)


def test_the_fisher_estimate_is_the_divergence_of_a_small_change() -> None:
    stepper = network(LINEAR, {"w": normal(3, 4), "b": normal(3)})
    (site,) = stepper.sites.values()
    x = normal(300, 4, seed=2)
    # the same 300 samples 60 times over: the expectation over labels, drawn
    found = reactions(stepper, [{"x": x}] * 60, 0, drawn_label, keep_inputs=True)
    per_sample = scores(site, found[site.name], 300 * 60)
    deltas = [0.03 * normal(1, 3, 4, seed=s) for s in range(4)]
    for delta, estimate in zip(deltas, fisher_errors(deltas, per_sample), strict=True):
        changed = Chain((Stage(site.stage.weight + delta[0], site.stage.bias),))
        with torch.no_grad():
            before = stepper.run({"x": x}, dense)
            after = stepper.run({"x": x}, lambda stop, c=changed: run_chain(stop.site, c, stop.input))
        # 18000 draws, and the third order of the change
        assert estimate == pytest.approx(divergence(after, before), rel=0.06)


def test_the_output_metric_is_the_root_of_the_gradients_second_moment() -> None:
    stepper = network(NETWORK, WEIGHTS)
    site = stepper.sites["b"]
    gradients = normal(5, 6, 3, 2)
    found = output_metric(site, Reaction(gradients), 0.125)
    root = found.root
    assert root.shape == (2, 3, 3)
    for g in range(2):
        rows = gradients[:, 3 * g : 3 * g + 3].transpose(0, 2, 3, 1).reshape(-1, 3).astype(float)
        metric = rows.T @ rows
        metric = metric / np.linalg.eigvalsh(metric).mean() + 0.125 * np.eye(3)
        np.testing.assert_allclose(root[g] @ root[g], metric, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(root[g], root[g].T, atol=1e-12)
    energy = np.square(gradients.astype(float)).sum((0, 1))
    np.testing.assert_allclose(found.positions, (energy / energy.mean() + 0.125) / 1.125, rtol=1e-6)
    silent = output_metric(site, Reaction(np.zeros((5, 6, 3, 2), np.float32)), 0.125)
    np.testing.assert_allclose(silent.root, np.sqrt(0.125) * np.stack([np.eye(3)] * 2))
    np.testing.assert_array_equal(silent.positions, np.ones((3, 2)))


class TestScore:
    def site(self) -> Site:
        body = "net (float[N,12,8,8] x) => (float[N,16,6,6] y) { y = Conv (x, w, b) }"
        return network(body, {"w": normal(16, 12, 3, 3), "b": normal(16)}).sites["y"]

    def found(self, site: Site, formats: tuple[str, ...] = tuple(FORMATS)) -> tuple[Any, ...]:
        known = {name: FORMATS[name] for name in formats}
        limits = CandidateLimits(per_format=30)
        return candidates([site], known, TiledPrices(tile=2), {site.name: 4}, limits)[site.name]

    def moments(self, site: Site) -> Any:
        stepper = network("net (float[N,12,8,8] x) => (float[N,16,6,6] y) { y = Conv (x, w, b) }",
                          {"w": normal(16, 12, 3, 3), "b": normal(16)})  # fmt: skip
        mixed = np.einsum("ij,njhw->nihw", covariance(1, 12, np.random.default_rng(0))[0], normal(40, 12, 8, 8))
        return moments_by_site(stepper, {"x": mixed.astype(np.float32)}, 10**8, 0)[0][site.name]

    def test_the_dense_layer_comes_first_and_loses_nothing(self) -> None:
        site = self.site()
        for moments in (None, self.moments(site)):
            scored = score(site, self.found(site), moments, 1e-3)
            assert scored.site is site and scored.fisher is None
            assert scored.candidates[0].format is None and scored.relative[0] == 0
            assert len(scored.candidates) == len(scored.relative) > 5
            assert (scored.relative[1:] > 0).all() and (scored.relative[1:] < 1).all()

    @pytest.mark.parametrize("with_data", [False, True])
    def test_a_loss_is_that_of_the_fitted_factors(self, with_data: bool) -> None:
        site = self.site()
        moments = self.moments(site) if with_data else None
        scored = score(site, self.found(site), moments, 1e-3)
        weight = site.stage.grouped_weight().astype(np.float64)
        problem = FitProblem(weight, None if moments is None else moments.ridge(1e-3))
        for candidate, loss in list(zip(scored.candidates, scored.relative, strict=True))[1::7]:
            decomposed = candidate.format.decompose(site.stage.geometry, problem)
            sliced = problem.error(compose(decomposed.stages(candidate.rank))) / problem.energy()
            best = problem.error(compose(fitted(decomposed, candidate.rank, problem, 50))) / problem.energy()
            assert best * (1 - 1e-6) <= loss <= sliced * (1 + 1e-6)

    def test_what_is_dropped_is_beaten_by_something_as_cheap(self) -> None:
        site = self.site()
        found = self.found(site)
        scored = score(site, found, None, 1e-3, limit=10**6)
        problem = problem_of(site.stage.grouped_weight().astype(np.float64), "none")
        kept = dict(zip(map(id, scored.candidates), scored.relative, strict=True))
        dropped = [c for c in found if id(c) not in kept]
        assert dropped and len(kept) > 3
        for candidate in dropped:
            decomposed = candidate.format.decompose(site.stage.geometry, problem)
            own = decomposed.loss(candidate.rank) / problem.energy()
            assert any(c.cost.latency <= candidate.cost.latency and kept[id(c)] < 0.6 * own for c in scored.candidates)

    def test_the_limit_holds_and_spans_all_latencies(self) -> None:
        site = self.site()
        found = self.found(site)
        every, few = (score(site, found, None, 1e-3, limit=n) for n in (10**6, 6))
        assert len(every.candidates) > 6 == len(few.candidates)
        assert few.candidates[0].format is None
        latencies = [sorted(c.cost.latency for c in s.candidates[1:]) for s in (every, few)]
        third = len(latencies[0]) // 3
        assert latencies[1][0] <= latencies[0][third] and latencies[1][-1] >= latencies[0][-third]

    def test_with_reactions_the_change_of_the_output_is_judged(self) -> None:
        stepper = network(LINEAR, {"w": normal(3, 4), "b": normal(3)})
        (site,) = stepper.sites.values()
        x = normal(200, 4, seed=2)
        (reaction,) = reactions(stepper, [{"x": x}], 0, drawn_label, keep_inputs=True).values()
        prices = TiledPrices(tile=1, start=0)
        found = candidates([site], {"svd": FORMATS["svd"]}, prices, {site.name: 4})[site.name]
        assert len(found) > 1
        scored = score(site, found, None, 1e-3, reaction, 200)
        problem = FitProblem(site.stage.grouped_weight().astype(np.float64))
        decomposed = FORMATS["svd"].decompose(site.stage.geometry, problem)
        deltas = [compose(decomposed.stages(c.rank)) - problem.target for c in scored.candidates[1:]]
        wanted = fisher_errors(deltas, scores(site, reaction, 200))
        assert scored.fisher[0] == 0
        np.testing.assert_allclose(scored.fisher[1:], wanted, rtol=1e-4)
