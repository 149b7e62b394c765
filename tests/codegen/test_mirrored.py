"""Mirror images of the calibration samples: when they count, what they judge, and what the chosen plan is fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from codegen import driver
from codegen import mirrored as module
from codegen.config import LowerConfig
from codegen.emission import Emission
from codegen.events import QuietEvents, RecordingEvents
from codegen.memory import Forgetful
from codegen.mirrored import Mirrored, mirrored
from codegen.search import Attempt, best_within_budgets, carry_out, fit_finally
from codegen.space import EFFORTS, Selection, Space, build_space
from codegen.target import parse_target
from codegen.walks import outputs_under
from passes import registry
from passes.core.site import Chain
from passes.correct import Correction, correct
from passes.factorize import Factorize
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Stepper
from passes.ranks.milp import MilpSolver
from tests.onnx_models import normal, onnx_model

Array = NDArray[Any]

LAYERS = """
        a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>({x}, w1, b1)
        c = Relu(a)
        d = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(c, w2, b2)
        d1 = Relu(d)
        d2 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(d1, w4, b4)
        e = Relu(d2)
"""
HEAD = """
        f = GlobalAveragePool(e)
        g = Flatten(f)
        logits = Gemm(g, w3, b3)
"""
CLASSIFIER = "agraph (float[N,3,8,8] x) => (float[N,5] logits) {" + LAYERS.format(x="x") + HEAD + "}"
TWO_INPUTS = (
    "agraph (float[N,3,8,8] x, float[N,3,8,8] z) => (float[N,5] logits) {\n        xz = Add(x, z)"
    + LAYERS.format(x="xz")
    + HEAD
    + "}"
)
MAPS = "agraph (float[N,3,8,8] x) => (float[N,32,8,8] e) {" + LAYERS.format(x="x") + "}"

CORRECTION = Correction(samples=20, sweeps=1)
EFFORT = replace(EFFORTS["default"], turns=1)


def network(folder: Path, symmetric: bool = True, body: str = CLASSIFIER) -> OnnxGraph:
    """A network of 8x8 images; with symmetric kernels, one that gives an image and its mirror image the same scores."""
    weights = {
        "w1": normal(32, 3, 3, 3, seed=1) / 4, "b1": normal(32, seed=2) / 4,
        "w2": normal(32, 32, 3, 3, seed=3) / 12, "b2": normal(32, seed=4) / 4,
        "w4": normal(32, 32, 3, 3, seed=7) / 12, "b4": normal(32, seed=8) / 4,
        "w3": 4 * normal(32, 5, seed=5), "b3": normal(5, seed=6),
    }  # fmt: skip
    if symmetric:
        for name in ("w1", "w2", "w4"):
            weights[name] = weights[name] + weights[name][..., ::-1]
    if "logits" not in body:
        del weights["w3"], weights["b3"]
    path = folder / "network.onnx"
    path.write_bytes(onnx_model(body, weights).SerializeToString())
    return OnnxGraph.read(path)


def images(count: int = 32, seed: int = 0) -> Array:
    return normal(count, 3, 8, 8, seed=seed)


def turned(x: Array) -> Array:
    return np.ascontiguousarray(x[..., ::-1])


def twin_of(graph: OnnxGraph, feeds: Any) -> Mirrored | None:
    return mirrored(Stepper(graph.model(), graph.sites().sites), feeds, graph.workload())


def scores(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0], np.float64)


def log_softmax(z: Array) -> Array:
    z = z - z.max(1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(1, keepdims=True)))


def written(graph: OnnxGraph, chains: Mapping[str, Chain], path: Path) -> Path:
    rewritten = graph.clone()
    PassManager([Factorize(dict(chains))]).run(rewritten)
    rewritten.save(path)
    return path


def test_a_network_that_does_not_see_the_difference_has_mirrored_samples(tmp_path: Path) -> None:
    graph, x = network(tmp_path), images()
    twin = twin_of(graph, {"x": x})
    assert twin is not None and twin.count == 32
    assert isinstance(twin.feeds, Mapping) and isinstance(twin.both, Mapping)
    np.testing.assert_array_equal(twin.feeds["x"], x[..., ::-1])
    np.testing.assert_array_equal(twin.both["x"], np.concatenate([x, x[..., ::-1]]))
    np.testing.assert_allclose(
        twin.outputs["logits"].numpy(), scores(tmp_path / "network.onnx", turned(x)), rtol=1e-4, atol=1e-4
    )
    assert twin.loss({}) == pytest.approx(0.0, abs=1e-12), "the network as it is loses nothing"


def test_what_the_network_makes_of_the_samples_need_not_be_computed_again(tmp_path: Path) -> None:
    graph, x = network(tmp_path), images()
    stepper = Stepper(graph.model(), graph.sites().sites)
    straight = outputs_under(stepper, {"x": x}, {})
    assert mirrored(stepper, {"x": x}, graph.workload(), straight) is not None
    other = {"logits": straight["logits"].flip(0)}  # it is believed what it makes of them
    assert mirrored(stepper, {"x": x}, graph.workload(), other) is None


def test_the_loss_is_the_divergence_on_mirrored_samples(tmp_path: Path) -> None:
    graph, x = network(tmp_path), images()
    twin = twin_of(graph, {"x": x})
    assert twin is not None
    site = next(s for s in twin.stepper.sites.values() if s.stage.in_channels == 32 and s.stage.geometry.ndim)
    chains = {site.name: Chain((replace(site.stage, weight=site.stage.weight * np.float32(0.8)),), "tucker2", (1, 1))}
    after = log_softmax(scores(written(graph, chains, tmp_path / "after.onnx"), turned(x)))
    before = log_softmax(scores(tmp_path / "network.onnx", turned(x)))
    wanted = float((np.exp(before) * (before - after)).sum(1).mean())
    assert wanted > 1e-3
    assert twin.loss(chains) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    "why", ["sees the difference", "one by one", "two inputs", "no scores", "no room", "one image"]
)
def test_there_are_none_where_mirroring_is_not_known_to_mean_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    feeds: Any = {"x": images()}
    graph = network(tmp_path, symmetric=why != "sees the difference")
    if why == "one by one":
        feeds = [{"x": images(1, seed)} for seed in range(8)]
    elif why == "two inputs":
        graph, feeds = network(tmp_path, body=TWO_INPUTS), {"x": images(), "z": images(seed=1)}
    elif why == "no scores":
        graph = network(tmp_path, body=MAPS)
    elif why == "no room":
        monkeypatch.setattr(module, "calibration_count", lambda ops, count: count - 1)
    elif why == "one image":
        feeds = {"x": images(1)}
    assert twin_of(graph, feeds) is None


def space_of(graph: OnnxGraph, twin: Mirrored, x: Array) -> Space:
    formats = registry.FORMATS.load_all()[0]
    return build_space(
        graph, parse_target("asic").latency, formats, Selection(), twin.stepper, {"x": x}, EFFORT, CORRECTION,
        QuietEvents(), Forgetful(),
    )  # fmt: skip


class Keeping:
    """A memory in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[dict[str, Array], dict[str, Any]]] = {}

    def checkpoint(self, name: str, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
        self.kept[name] = dict(arrays), dict(meta)

    def restore(self, name: str) -> tuple[dict[str, Array], dict[str, Any]] | None:
        return self.kept.get(name)


def test_mirrored_samples_judge_and_the_chosen_plan_is_fitted_to_both(tmp_path: Path) -> None:
    graph, x = network(tmp_path), images(96)
    twin = twin_of(graph, {"x": x})
    assert twin is not None
    space = space_of(graph, twin, x)
    assert len(space.weights) >= 2, "there are plans to choose between"
    memory = Keeping()
    space = replace(space, memory=memory)
    budget = {"latency": 0.7 * space.baseline.latency}
    best, trace = best_within_budgets(
        space, MilpSolver(), budget, twin.stepper, {"x": x}, CORRECTION, EFFORT, lambda: False, QuietEvents(),
        judge=twin,
    )  # fmt: skip
    losses = [meta["numbers"]["loss"] for _, meta in memory.kept.values()]
    assert best.loss == min(losses) == pytest.approx(twin.loss(best.chains), rel=1e-9)
    assert all("loss on the mirrored calibration data" in turn["note"] for turn in trace if "note" in turn)

    draft = replace(CORRECTION, samples=CORRECTION.samples // 2)
    alone = carry_out(best, replace(space, memory=Forgetful()), twin.stepper, {"x": x}, draft, QuietEvents())
    assert same(alone, best), "judged plans are fitted to half as many positions"

    final = fit_finally(best, space, twin, CORRECTION, QuietEvents())
    twice = replace(CORRECTION, samples=2 * CORRECTION.samples, clean=3)
    wanted, before, after = correct(twin.stepper, twin.both, best.choices, twice, space.metrics)
    assert {name: chain.rank for name, chain in final.chains.items()} == {n: c.rank for n, c in best.choices.items()}
    for name, chain in wanted.items():
        for ours, theirs in zip(final.chains[name].stages, chain.stages, strict=True):
            np.testing.assert_array_equal(ours.weight, theirs.weight)
    a, b = (o["logits"][:96].double() for o in (before, after))
    assert final.relative_l2 == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-9)
    assert same(fit_finally(best, space, twin, CORRECTION, QuietEvents()), final), "read back from the memory"


def same(one: Attempt, other: Attempt) -> bool:
    return all(
        np.array_equal(a.weight, b.weight)
        for name, chain in one.chains.items()
        for a, b in zip(chain.stages, other.chains[name].stages, strict=True)
    )


@pytest.mark.parametrize(("symmetric", "budget"), [(True, True), (False, True), (True, False)])
def test_lower_uses_them_for_budgets_where_the_network_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symmetric: bool, budget: bool
) -> None:
    def target(text: str) -> Any:
        return replace(parse_target(text), emit=lambda request: Emission({"binary": None}))

    monkeypatch.setattr(driver, "parse_target", target)
    network(tmp_path, symmetric)
    calib = tmp_path / "calib.npz"
    np.savez(calib, x=images(64))
    events = RecordingEvents(QuietEvents())
    values = {"model": tmp_path / "network.onnx", "target": "asic", "calib": str(calib), "output": tmp_path / "out"}
    values |= {"budgets": {"latency": "70%"}} if budget else {"max_error": 0.3}
    report = driver.lower(LowerConfig.from_values(values), events).report
    used = symmetric and budget
    assert ("fit the chosen plan" in events.timings) is used
    assert ("mirror the samples" in events.timings) is budget
    notes = [turn["note"] for turn in report["solver"]["iterations"] if turn.get("note")]
    assert any("mirrored" in note for note in notes) is used
    if used:
        again = RecordingEvents(QuietEvents())
        plan = {"plan": tmp_path / "out" / "plan.json", "output": tmp_path / "again"}
        driver.lower(LowerConfig.from_values({k: v for k, v in values.items() if k != "budgets"} | plan), again)
        assert "fit the chosen plan" in again.timings and "correct in sequence" not in again.timings
        one, other = ((tmp_path / name / "model.onnx").read_bytes() for name in ("out", "again"))
        assert one == other, "the same factors, fitted once"
