"""From the facts of a run to the files that tell them: report.json, report.html, layers.csv, plan.json, config.toml."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.checkpoint import file_sha256
from codegen.config import LowerConfig
from codegen.emission import Emission
from codegen.events import RecordingEvents
from codegen.report.build import (
    BudgetLine,
    DataRow,
    Iteration,
    Layer,
    Network,
    NoteRow,
    OutputError,
    Report,
    Solver,
    Verification,
    to_json,
)
from codegen.report.html import to_html
from codegen.report.layers_csv import to_csv
from codegen.report.recovery import RecoveryReport
from codegen.search import Attempt
from codegen.space import Space
from codegen.target import Target
from passes.core.cost import Cost
from passes.core.site import Site
from passes.correct import Choice
from passes.graph import Note
from passes.ranks.candidates import chain_works, dense_work
from passes.ranks.milp import least
from passes.ranks.problem import RankProblem, as_json

if TYPE_CHECKING:  # torch is loaded by those who train
    from passes.training.data import TrainingSet

IN_BODY = "; in a body of If or Loop: its factors follow the weights alone, not the calibration data"
NO_GAIN = "no chain is cheaper than the dense layer on this target"


@dataclass(frozen=True, eq=False)
class Facts:
    """What a run found out.

    ``before`` and ``after`` as the emitted files tell them, where they do; ``priced``: the price list's view of
    ``after``; ``unseen``: what it does not see of ``before``, by metric. ``harm`` says why the rewritten network was
    refused, empty when it was not.
    """

    config: LowerConfig
    target: Target
    run: RecordingEvents
    space: Space
    found: Attempt
    trace: list[dict[str, Any]]
    budgets: dict[str, float]
    before: Cost
    after: Cost
    priced: Cost
    unseen: dict[str, float]
    harm: str
    verification: Verification
    emission: Emission
    accuracy: tuple[float | None, float | None]
    notes: tuple[Note, ...]
    files: tuple[Path, ...]
    data: str
    samples: int
    errors_bind: bool
    recovery: RecoveryReport | None = None
    training: TrainingSet | None = None


def write_results(facts: Facts, folder: Path) -> dict[str, Any]:
    """Writes every file but the model and the binary into ``folder``; returns report.json as a dict."""
    artifacts: dict[str, str | None] = {"onnx": facts.files[0].name}
    for extra in facts.files[1:]:
        artifacts["onnx_data"] = extra.name
    artifacts |= facts.emission.artifacts
    artifacts |= {"plan": "plan.json", "config": "config.toml", "layers": "layers.csv", "html": "report.html"}
    report = build_report(facts, artifacts).to_dict()
    plan = as_json(facts.found.plan, plan_layers(facts.space.sites, facts.found.choices))
    assert facts.config.output is not None
    texts = {
        "report.json": to_json(report),
        "report.html": to_html(report),
        "layers.csv": to_csv(report),
        "plan.json": json.dumps(_finite(plan), indent=2, allow_nan=False) + "\n",
        "config.toml": facts.config.to_toml(facts.config.output),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return report


def build_report(facts: Facts, artifacts: dict[str, str | None]) -> Report:
    plan = facts.found.plan
    return Report(
        model=str(facts.config.model),
        model_sha256=file_sha256(facts.config.model),
        target=facts.target.name,
        target_spec=facts.target.spec,
        baseline=Network.of(facts.before, facts.accuracy[0]),
        result=Network.of(facts.after, facts.accuracy[1]),
        output_error=OutputError(
            None if facts.harm or math.isnan(facts.found.relative_l2) else facts.found.relative_l2,
            facts.config.max_error if facts.errors_bind else None,
            facts.data,
            facts.samples,
        ),
        layers=tuple(_layers(facts)),
        solver=Solver(plan.solver, plan.status, plan.objective, plan.bound, plan.gap, tuple(_iterations(facts.trace))),
        verification=facts.verification,
        artifacts=artifacts,
        budgets=tuple(_budget_lines(facts)),
        data=_data_rows(facts),
        timings=dict(facts.run.timings),
        notes=tuple(
            [NoteRow(text) for text in facts.run.notes] + [NoteRow(n.reason, n.node, n.op) for n in facts.notes]
        ),
        warnings=tuple(facts.run.warnings),
        program=facts.emission.program,
        measurement=facts.emission.measurement,
        recovery=facts.recovery,
    )


def _data_rows(facts: Facts) -> dict[str, DataRow]:
    rows = {"calibration": DataRow(facts.data, facts.samples)}
    if facts.config.train is not None and facts.training is not None:
        rows["training"] = DataRow(facts.config.train, len(facts.training))
    return rows


def _iterations(trace: list[dict[str, Any]]) -> list[Iteration]:
    return [
        Iteration(
            dict(turn["predicted"]),
            dict(turn["network"]),
            "met" if turn["met"] else "missed",
            turn.get("objective"),
            turn.get("bound"),
            turn.get("gap"),
            turn.get("note", ""),
        )
        for turn in trace
    ]


def _budget_lines(facts: Facts) -> list[BudgetLine]:
    units = {"latency": facts.after.unit, "energy": "pJ", "macs": "MACs", "params": "params", "size": "B"}
    problem = facts.space.problem(facts.budgets, {})
    lines = []
    for budget in facts.config.parsed_budgets:
        metric = budget.metric
        limit, value = facts.budgets[metric], facts.after.metric(metric)
        met = value <= limit * (1 + 1e-9)
        # counts are read off the written file; times and energies are the target's
        simulated = metric in ("latency", "energy")
        kind = facts.after.kind if simulated else Network.of(facts.after).macs.kind
        bound = None
        if not met:
            bound = min(reach(problem, facts.space, metric) + facts.unseen.get(metric, 0.0), value)
        predicted = facts.priced.metric(metric) if simulated and facts.emission.cost is not None else None
        asked = facts.config.budgets[metric]
        lines.append(BudgetLine(metric, asked, limit, units[metric], value, met, kind, bound, predicted))
    return lines


def reach(problem: RankProblem, space: Space, metric: str) -> float:
    """What no plan gets below, in a metric: the target's floor for latency and energy, a sum of minima for counts.

    Latency and energy are those of the network as the target prices it, neighbours fused; counts simply add up.
    """
    if metric not in ("latency", "energy"):
        return least(problem, metric)
    options = {}
    for site in space.sites:
        scored = space.scored[site.name].candidates
        works = [(dense_work(site),) if c.format is None else chain_works(site, c.format, c.rank) for c in scored]
        if site.stage.bias is None:  # a chain gets a bias only where the data ask for one
            works += [(*work[:-1], replace(work[-1], bias=False)) for work in works]
        options[site.name] = works
    return space.model.floor(space.ops, options).metric(metric)


def _layers(facts: Facts) -> list[Layer]:
    rows = []
    space, found = facts.space, facts.found
    for site in space.sites:
        scored = space.scored[site.name]
        dense = scored.candidates[0].cost
        choice = found.choices[site.name]
        formats = tuple(dict.fromkeys(c.name for c in scored.candidates[1:]))
        cost, name = dense, "dense"
        error: float | None = 0.0
        if choice.format is not None and not facts.harm:
            name = choice.format.name
            cost, error = _priced(facts, site.name, name, choice.rank)
        rows.append(
            Layer(
                site.name,
                site.op,
                name,
                None if name == "dense" else choice.rank,
                _reason(facts, site, name, bool(formats), dense, cost),
                dense.latency,
                cost.latency,
                dense.unit,
                dense.kind.weaker(cost.kind),
                dense.macs,
                cost.macs,
                dense.params,
                cost.params,
                error,
                formats,
            )
        )
    rows += [Layer(note.node, note.op, "dense", None, note.reason) for note in space.kept]
    return rows


def _priced(facts: Facts, site: str, format: str, rank: tuple[int, ...]) -> tuple[Cost, float | None]:
    scored = facts.space.scored[site]
    for index, candidate in enumerate(scored.candidates):
        if (candidate.name, candidate.rank) == (format, rank):
            return candidate.cost, float(scored.relative[index])
    return facts.space.single(site, format, rank), None  # a replayed plan may name a rank that is no candidate


def _reason(facts: Facts, site: Site, name: str, any_chain: bool, dense: Cost, cost: Cost) -> str:
    if facts.harm:
        return "the input network is kept: the rewritten one would not be faster"
    if name != "dense":
        return f"{cost.latency / dense.latency:.0%} of the dense latency" + (IN_BODY if site.in_body else "")
    if not any_chain:
        return NO_GAIN
    refitted = "; weights refitted" if site.name in facts.found.chains else ""
    return "its error is better spent elsewhere" + refitted


def plan_layers(sites: Sequence[Site], choices: Mapping[str, Choice]) -> list[dict[str, Any]]:
    """The layers of plan.json: what was chosen for each site."""
    return [
        {
            "name": site.name,
            "choice": "dense" if choice.format is None else choice.format.name,
            "rank": list(choice.rank),
        }
        for site in sites
        for choice in (choices[site.name],)
    ]


def plan_sha256(layers: list[dict[str, Any]]) -> str:
    """Of the layers of a plan.json as JSON without blanks, keys sorted: what a library's metadata name the plan by."""
    return hashlib.sha256(json.dumps(layers, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _finite(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plan.items()}
