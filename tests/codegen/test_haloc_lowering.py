"""--solver haloc through the pipeline, on the demo's network and a few dozen images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from codegen import driver
from codegen.config import LowerConfig
from codegen.emission import Emission, EmissionRequest
from codegen.events import QuietEvents, RecordingEvents
from codegen.plan_search import PlanSearch
from codegen.result import LowerResult
from codegen.search import Attempt
from codegen.target import Target, parse_target
from passes.errors import UsageError
from passes.ranks.problem import RankPlan
from passes.registry import SOLVERS
from passes.training import haloc

DIGITS = Path(__file__).parents[2] / "examples" / "digits.onnx"


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(request: EmissionRequest) -> Emission:
        return Emission({"binary": None})

    def target(text: str) -> Target:
        return replace(parse_target(text), emit=emit)

    monkeypatch.setattr(driver, "parse_target", target)
    monkeypatch.setitem(haloc.EFFORTS, "quick", haloc.HalocOptions(rounds=2, steps=3, batch=8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random images without labels."""
    rng = np.random.default_rng(0)
    (image,) = onnx.load(DIGITS).graph.input
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim][1:]
    noise = rng.standard_normal((64, *shape)).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "calib.npz"
    inputs: dict[str, Any] = {image.name: noise + np.roll(noise, 1, -1) + np.roll(noise, 1, -2)}
    np.savez(path, **inputs)
    return path


def run(out: Path, data: Path, events: RecordingEvents | None = None, **options: Any) -> LowerResult:
    values = {"model": DIGITS, "output": out, "effort": "quick", "solver": "haloc", "calib": str(data), **options}
    return driver.lower(LowerConfig.from_values(values), events or RecordingEvents(QuietEvents()))


def test_the_plan_keeps_both_budgets_and_is_the_same_again(tmp_path: Path, data: Path) -> None:
    events = RecordingEvents(QuietEvents())
    result = run(tmp_path / "a", data, events, budgets={"latency": "65%", "macs": "50%"})
    report = result.report
    assert not result.missed and all(b["met"] for b in report["budgets"])
    assert events.steps["search with haloc"] == 2 * 2 * 3
    solver = report["solver"]
    assert (solver["name"], solver["status"]) == ("haloc", "feasible")
    assert 0 < solver["bound"] <= solver["objective"]
    run(tmp_path / "b", data, budgets={"latency": "65%", "macs": "50%"})
    plans = [(tmp_path / name / "plan.json").read_bytes() for name in "ab"]
    assert plans[0] == plans[1]
    assert json.loads(plans[0])["solver"] == "haloc"


def test_without_a_budget_it_says_what_it_needs(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UsageError, match="--solver haloc needs a budget, such as --latency 60%"):
        run(tmp_path / "out", data)


def test_a_budget_out_of_reach_comes_with_the_exact_proof(tmp_path: Path, data: Path) -> None:
    result = run(tmp_path / "out", data, budgets={"latency": "1%"})
    (budget,) = result.report["budgets"]
    assert result.missed and budget["limit"] < budget["bound"] <= budget["value"] * (1 + 1e-9)
    assert result.report["solver"]["status"] == "infeasible"


def test_emitted_files_over_the_budget_do_not_train_a_second_time(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goals are lowered once, as after an emission that takes more: the second plan comes from what was learned."""
    trained: list[str] = []
    inner = haloc._Search.run

    def counted(self: haloc._Search) -> float:
        trained.append("once")
        return inner(self)

    found: list[Attempt] = []
    search = PlanSearch.run

    def again(self: PlanSearch, workspace: Any) -> Attempt:
        found.append(search(self, workspace))
        self.goals = {m: 0.9 * limit for m, limit in self.goals.items()}
        found.append(search(self, workspace))
        return found[-1]

    monkeypatch.setattr(haloc._Search, "run", counted)
    monkeypatch.setattr(PlanSearch, "run", again)
    result = run(tmp_path / "out", data, budgets={"latency": "70%"})
    first, second = found
    assert trained == ["once"]
    limit = result.report["budgets"][0]["limit"]
    assert first.cost.latency <= limit and second.cost.latency <= 0.9 * limit
    for attempt in found:
        assert (attempt.plan.solver, attempt.plan.status) == ("haloc", "feasible")
        assert attempt.plan.bound <= attempt.plan.objective and attempt.loss > 0


class Wanderer:
    """Random plans within the budgets, the best of a few by the network's own loss: all that a learner would need."""

    name = "wanderer"

    def search(self, problem: Any, context: Any, time_limit_s: float | None = None) -> RankPlan:
        rng = np.random.default_rng(context.seed)
        tried: dict[tuple[int, ...], float] = {}
        for _ in range(400):
            picks = tuple(int(rng.integers(len(site.options))) for site in problem.sites)
            costs = context.cost(picks)
            if all(costs[m] <= limit for m, limit in problem.budgets.items()) and picks not in tried:
                tried[picks] = context.evaluate(picks)
                context.progress(len(tried), 3, f"loss {tried[picks]:.3g}")
            if len(tried) == 3:
                break
        best = min(tried, key=tried.__getitem__)
        self.tried = sorted(tried.values())
        return RankPlan(self.name, "feasible", best, problem.total(best, "error"), 0.0, problem.digest())


def test_a_solver_that_knows_nothing_but_evaluate_finds_its_place(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanderer = Wanderer()
    load = type(SOLVERS).load
    monkeypatch.setattr(type(SOLVERS), "load", lambda self, name: wanderer if name == "wanderer" else load(self, name))
    found: list[Attempt] = []
    search = PlanSearch.run

    def kept(self: PlanSearch, workspace: Any) -> Attempt:
        found.append(search(self, workspace))
        return found[-1]

    monkeypatch.setattr(PlanSearch, "run", kept)
    result = run(tmp_path / "out", data, budgets={"latency": "80%"}, solver="wanderer")
    assert not result.missed and result.report["solver"]["name"] == "wanderer"
    assert len(wanderer.tried) == 3
    assert found[0].loss == wanderer.tried[0], "what it evaluated is what was carried out"
