"""The rank search: sites, candidates, errors, a plan, and the loop that holds it against the whole network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from codegen.dataset import Dataset
from codegen.events import Events
from codegen.memory import (
    Forgetful,
    Memory,
    Scores,
    attempt_name,
    load_chains,
    load_scores,
    save_chains,
    save_scores,
)
from passes import registry
from passes.core.cost import METRICS, Cost, LatencyModel, OpWork
from passes.core.factor import FactorFormat, Rank, chain_of, fitted
from passes.core.fit import FitProblem
from passes.core.moments import Moments
from passes.core.site import Array, Chain, Site, compose
from passes.correct import Choice, Correction, correct
from passes.graph import Note
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Feeds, Stepper
from passes.ranks.candidates import Candidate, candidates, chain_works
from passes.ranks.milp import least
from passes.ranks.problem import Option, RankPlan, RankProblem, RankSolver, SiteOptions, undominated
from passes.sensitivity import ScoredSite, divergence, moments_by_site, output_root, reactions, score
from passes.torch_apply import run_chain

CALIBRATION_MACS = 150e9
"""Calibration stops at this many multiply-adds of the network, or at ``CALIBRATION_BYTES`` of its activations."""
CALIBRATION_BYTES = 3 << 30


@dataclass(frozen=True)
class Effort:
    """How far a search goes.

    ``elements`` bounds the patches that a fit sees, ``sweeps`` its refits behind a clamp. ``weightings`` are powers
    of the measured sensitivities: each gives a plan that is carried out, and the best one stays. ``macs`` bounds the
    work that measuring sensitivities, or carrying out one more plan, may take.
    """

    elements: int
    sweeps: int
    weightings: tuple[float, ...]
    macs: float
    solver_s: float


EFFORTS = {
    "quick": Effort(4_000_000, 1, (0.0,), 0.0, 10),
    "default": Effort(12_000_000, 3, (1.0, 0.0), 120e9, 30),
    "extensive": Effort(48_000_000, 6, (1.0, 0.0, 0.5, 1.5), 4e12, 300),
}

ROOT_FLOOR = 0.1
"""Output directions that the network does not react to still count this much, relative to the mean."""


@dataclass(frozen=True, eq=False)
class Space:
    """What the solver chooses from, on one network and one target."""

    sites: tuple[Site, ...]
    scored: dict[str, ScoredSite]
    ops: tuple[OpWork, ...]
    model: LatencyModel
    baseline: Cost
    kept: tuple[Note, ...]
    memory: Memory = field(default_factory=Forgetful)
    roots: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def problem(self, budgets: Mapping[str, float], errors: Mapping[str, float]) -> RankProblem:
        """The rank problem; ``errors`` scales the error of each site's candidates."""
        metrics = tuple(METRICS)
        sites = []
        dense = dict.fromkeys(METRICS, 0.0)
        for site in self.sites:
            scored = self.scored[site.name]
            options = []
            for index, candidate in enumerate(scored.candidates):
                costs = {m: candidate.cost.metric(m) for m in METRICS}
                error = float(scored.relative[index]) * errors.get(site.name, 1.0)
                options.append(Option(candidate.name, candidate.rank, costs, error))
            for metric in METRICS:
                dense[metric] += options[0].costs[metric]
            used = (*(m for m in metrics if m in budgets), "latency")
            sites.append(SiteOptions(site.name, (options[0], *undominated(options[1:], used))))
        fixed = {m: self.baseline.metric(m) - dense[m] for m in METRICS}
        return RankProblem(tuple(sites), fixed, dict(budgets))

    def choices(self, problem: RankProblem, picks: Sequence[int]) -> dict[str, Choice]:
        """A plan's picks as choices by site name."""
        out = {}
        for site, pick in zip(problem.sites, picks, strict=True):
            option = site.options[pick]
            candidate = self.candidate(site.site, option.format, option.rank)
            out[site.site] = Choice(candidate.format, candidate.rank)
        return out

    def candidate(self, site: str, format: str, rank: Rank) -> Candidate:
        for candidate in self.scored[site].candidates:
            if (candidate.name, candidate.rank) == (format, rank):
                return candidate
        raise KeyError(f"{site} has no candidate {format} {rank}")

    def single(self, site: str, format: str, rank: Rank) -> Cost:
        """The cost of one chain at a site, whether it is a candidate or not."""
        place = next(s for s in self.sites if s.name == site)
        works = chain_works(place, registry.FORMATS.load(format), rank)
        return replace(self.model.chains([works])[0], macs=sum(w.macs for w in works))

    def price(self, choices: Mapping[str, Choice]) -> Cost:
        """The whole network under these choices, priced as a network and not as a sum of layers."""
        return self.model.network(self.rewritten(choices))

    def rewritten(self, choices: Mapping[str, Choice]) -> list[OpWork]:
        """The network's work with each chosen site's operator replaced by its chain's stages."""
        sites = {site.name: site for site in self.sites}
        ops: list[OpWork] = []
        for op in self.ops:
            choice = choices.get(op.name)
            if choice is None or choice.format is None or op.name not in sites:
                ops.append(op)
                continue
            ops.extend(_chain_ops(op, sites[op.name], choice))
        return ops


def _chain_ops(op: OpWork, site: Site, choice: Choice) -> list[OpWork]:
    assert choice.format is not None
    works = chain_works(site, choice.format, choice.rank)
    width = op.weight_bytes // op.weight_params if op.weight_params else 4
    names = [*(f"{site.output}/{i}" for i in range(len(works) - 1))]
    out = []
    shape = op.input_shapes[0] if op.input_shapes else site.input_shape
    for index, work in enumerate(works):
        last = index == len(works) - 1
        following = op.output_shapes[0] if last else _stage_shape(site, work.out_channels, work.output_spatial)
        params = work.weights + (work.out_channels if work.bias else 0)
        out.append(
            OpWork(
                f"{op.name}/{index}",
                op.op,
                work,
                (shape,),
                (following,),
                (names[index - 1] if index else site.input,),
                (op.outputs[0] if last else names[index],),
                params,
                params * width,
            )
        )
        shape = following
    return out


def _stage_shape(site: Site, channels: int, spatial: tuple[int, ...]) -> tuple[int, ...]:
    shape = list(site.output_shape)
    shape[site.channel_axis] = channels
    if spatial:
        shape[2:] = spatial
    return tuple(shape)


@dataclass(frozen=True)
class Selection:
    """Which sites a run may touch, and by how much a chain must be cheaper (None: the target's own margin)."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    margin: float | None = None

    def of(self, sites: Sequence[Site]) -> tuple[list[Site], list[Note]]:
        """Sites that the globs let through, and a note for each one that they do not."""
        chosen, notes = [], []
        for site in sites:
            if self.include and not any(fnmatchcase(site.name, glob) for glob in self.include):
                notes.append(Note(site.name, site.op, "not named by --include"))
            elif any(fnmatchcase(site.name, glob) for glob in self.exclude):
                notes.append(Note(site.name, site.op, "named by --exclude"))
            else:
                chosen.append(site)
        return chosen, notes


def calibration_count(ops: Sequence[OpWork], available: int) -> int:
    """How many samples a walk over the network can take in time and memory; at least one."""
    macs = sum(op.stage.macs for op in ops if op.stage is not None)
    largest = sorted((4 * int(np.prod(s)) for op in ops for s in op.output_shapes), reverse=True)[:8]
    by_time = CALIBRATION_MACS / max(macs, 1)
    by_memory = CALIBRATION_BYTES / max(sum(largest), 1)
    return max(1, min(available, int(by_time), int(by_memory)))


FeedsOf = Callable[[Dataset], Feeds]
"""How a data set is given to a walk."""


def batched(data: Dataset) -> Feeds:
    """All samples as one batch where every input has a symbolic batch dimension, else sample by sample."""
    return data.feeds if data.dynamic else one_by_one(data)


def one_by_one(data: Dataset) -> Feeds:
    """Each sample as an inference of its own."""
    return list(data.batches(1))


def build_space(
    graph: OnnxGraph,
    model: LatencyModel,
    formats: Mapping[str, FactorFormat],
    selection: Selection,
    stepper: Stepper | None,
    feeds: Feeds | None,
    effort: Effort,
    correction: Correction,
    events: Events,
    memory: Memory,
) -> Space:
    """Sites, candidates, prices and errors of a network. Without ``feeds`` the errors are those of the weights."""
    scan = graph.sites()
    sites, notes = selection.of(scan.sites)
    ops = graph.workload()
    width = {op.name: op.weight_bytes // op.weight_params for op in ops if op.weight_params}
    with events.stage("price candidates"):
        found = candidates(
            sites, formats, model, {s.name: width.get(s.name, 4) for s in sites}, margin=selection.margin
        )
        baseline = model.network(ops)
    space = Space(tuple(sites), {}, ops, model, baseline, (*scan.kept, *notes), memory=memory)
    scores = load_scores(memory, sites, found)
    if scores is not None:
        events.note("the candidates' scores are those of the interrupted run")
    else:
        scores = _measure(space, found, stepper, feeds, effort, correction, events)
        save_scores(memory, scores)
    scored, roots, weights = scores
    return replace(space, scored=scored, roots=roots, weights=weights)


def _measure(
    space: Space,
    found: Mapping[str, tuple[Candidate, ...]],
    stepper: Stepper | None,
    feeds: Feeds | None,
    effort: Effort,
    correction: Correction,
    events: Events,
) -> Scores:
    moments: dict[str, Moments] = {}
    if stepper is not None and feeds is not None:
        with events.stage("collect statistics", len(stepper.sites)) as progress:
            moments, _ = moments_by_site(
                stepper, feeds, effort.elements, correction.seed, lambda site: progress.advance(1, site.name)
            )
    scored = {}
    with events.stage("score candidates", len(space.sites)) as progress:
        for site in space.sites:
            scored[site.name] = score(site, found[site.name], moments.get(site.name), correction.ridge)
            progress.advance(1, site.name)
    if stepper is None or feeds is None:
        return scored, {}, {}
    space = replace(space, scored=scored)
    with events.stage("probe the outputs"):
        roots = output_roots(space, stepper, feeds, effort, correction.seed)
    return scored, roots, sensitivities(space, stepper, feeds, moments, effort, correction.ridge, events)


@dataclass(eq=False)
class Attempt:
    """One plan carried out: its chains, its price as a whole, and what it does to the calibration outputs."""

    plan: RankPlan
    problem: RankProblem
    choices: dict[str, Choice]
    cost: Cost
    chains: dict[str, Chain] = field(default_factory=dict)
    loss: float = float("nan")
    relative_l2: float = float("nan")


def network_macs(ops: Sequence[OpWork]) -> float:
    """Multiply-adds of one inference."""
    return float(max(sum(op.stage.macs for op in ops if op.stage is not None), 1))


def output_roots(space: Space, stepper: Stepper, feeds: Feeds, effort: Effort, seed: int) -> dict[str, Array]:
    """Square roots of each site's output metric, from gradients on as many samples as the effort allows."""
    count = int(min(256, effort.macs / (3 * network_macs(space.ops))))
    parts = head(feeds, count)
    if count < 1 or not parts:
        return {}
    found = reactions(stepper, parts, seed)
    return {s.name: output_root(s, found[s.name], ROOT_FLOOR) for s in space.sites if s.name in found}


def head(feeds: Feeds, count: int, batch: int = 64) -> list[Mapping[str, Array]]:
    """The first ``count`` samples as a list of batches."""
    if not isinstance(feeds, Mapping):
        return [{name: np.asarray(value) for name, value in part.items()} for part in feeds[:count]]
    size = min(count, *(len(v) for v in feeds.values()))
    return [
        {name: np.asarray(value[start : min(start + batch, size)]) for name, value in feeds.items()}
        for start in range(0, size, batch)
    ]


def sensitivities(
    space: Space,
    stepper: Stepper,
    feeds: Feeds,
    moments: Mapping[str, Moments],
    effort: Effort,
    ridge: float,
    events: Events,
) -> dict[str, float]:
    """What a unit of each site's relative error does to the network's output, measured one site at a time.

    Each site alone gets a chain of medium loss; the output's squared relative error over the site's own is its weight,
    in units of their geometric mean. {} where that many runs are more than the effort allows.
    """
    sites = [s for s in space.sites if len(space.scored[s.name].candidates) > 1 and s.name in moments]
    count = int(min(128, effort.macs / (network_macs(space.ops) * max(len(sites), 1))))
    if count < 16 or len(sites) < 2:
        return {}
    parts: Feeds = head(feeds, count, count)
    parts = parts[0] if isinstance(parts, list) and len(parts) == 1 else parts
    found: dict[str, float] = {}
    with events.stage("measure sensitivities", len(sites)) as progress:
        before = outputs_under(stepper, parts, {})
        for site in sites:
            scored = space.scored[site.name]
            index = 1 + int(np.argmin(np.abs(np.log(np.maximum(scored.relative[1:], 1e-12) / PROBE_ERROR))))
            candidate = scored.candidates[index]
            chain = whitened_chain(site, Choice(candidate.format, candidate.rank), moments[site.name], ridge)
            after = outputs_under(stepper, parts, {site.name: chain})
            found[site.name] = relative_error(after, before) ** 2 / max(float(scored.relative[index]), 1e-12)
            progress.advance(1, site.name)
    level = float(np.exp(np.mean(np.log(np.maximum(list(found.values()), 1e-12)))))
    return {name: max(value, 1e-12) / level for name, value in found.items()}


PROBE_ERROR = 0.15
"""The relative error at which a site's sensitivity is measured: what a site loses at half its latency."""


def affordable(
    space: Space, solver: RankSolver, budgets: Mapping[str, float], errors: Mapping[str, float], effort: Effort
) -> tuple[Attempt, list[dict[str, Any]]]:
    """Solves, prices the whole network, tightens the additive limits by what it missed, and solves again.

    The sum over layers and the price of the network differ where a target treats neighbours together. Ends when every
    budget holds on the network, or is proven out of reach, or no further plan comes.
    """
    limits = dict(budgets)
    trace: list[dict[str, Any]] = []
    best: Attempt | None = None
    for _ in range(8):
        problem = space.problem(limits, errors)
        plan = solver.solve(problem, effort.solver_s)
        choices = space.choices(problem, plan.picks)
        cost = space.price(choices)
        attempt = Attempt(plan, problem, choices, cost)
        over = {m: cost.metric(m) - budgets[m] for m in budgets if cost.metric(m) > budgets[m]}
        trace.append(
            {
                "predicted": {m: problem.total(plan.picks, m) for m in budgets},
                "network": {m: cost.metric(m) for m in budgets},
                "met": not over,
                "objective": plan.objective,
                "bound": plan.bound,
                "gap": plan.gap,
            }
        )
        if best is None or _excess(attempt, budgets) < _excess(best, budgets) or not over:
            best = attempt
        if not over or plan.status == "infeasible":
            break
        tightened = {}
        for metric in over:
            miss = cost.metric(metric) - budgets[metric]
            tightened[metric] = min(limits[metric], problem.total(plan.picks, metric)) - max(
                miss, 1e-9 * budgets[metric]
            )
        limits = {**limits, **tightened}
    assert best is not None
    return best, trace


def best_within_budgets(
    space: Space,
    solver: RankSolver,
    budgets: Mapping[str, float],
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    effort: Effort,
    out_of_time: Callable[[], bool],
    events: Events,
) -> tuple[Attempt, list[dict[str, Any]]]:
    """Plans under several weightings of the sites' errors, each carried out; the one that loses least stays.

    No sum over layers predicts the joint loss well enough to choose between plans that are close, so it is measured.
    """
    trace: list[dict[str, Any]] = []
    best: Attempt | None = None
    seen: set[tuple[Any, ...]] = set()
    powers = effort.weightings if space.weights and correction is not None else (0.0,)
    for power in powers:
        if best is not None and out_of_time():
            events.note("the time budget ended the search early: the best plan so far is used")
            break
        weights = {name: value**power for name, value in space.weights.items()}
        with events.stage("choose ranks"):
            attempt, turns = affordable(space, solver, budgets, weights, effort)
        trace.extend(turns)
        key = tuple((n, c.format.name if c.format else "", c.rank) for n, c in sorted(attempt.choices.items()))
        if key in seen:
            continue
        seen.add(key)
        attempt = carry_out(attempt, space, stepper, feeds, correction, events)
        trace[-1]["note"] = f"errors weighted by sensitivity^{power:g}: loss on the calibration data {attempt.loss:.4g}"
        if best is None or (_excess(attempt, budgets), attempt.loss) < (_excess(best, budgets), best.loss):
            best = attempt
    assert best is not None
    return best, trace


def _excess(attempt: Attempt, budgets: Mapping[str, float]) -> float:
    return sum(max(0.0, attempt.cost.metric(m) / max(b, 1e-30) - 1) for m, b in budgets.items())


def carry_out(
    attempt: Attempt,
    space: Space,
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    events: Events,
) -> Attempt:
    """Makes the attempt's chains: corrected in sequence on ``feeds``, or by the weights alone without a correction.

    Sites that cannot be walked to (inside bodies) go by their weights in either case. The loss and the relative error
    are those of the network's outputs on ``feeds``; NaN where it cannot be walked.
    """
    name = attempt_name(attempt.choices, correction is not None)
    known = load_chains(space.memory, name, space.sites, attempt.choices)
    if known is not None:
        chains, numbers = known
        return replace(attempt, chains=chains, loss=numbers["loss"], relative_l2=numbers["relative_l2"])
    done = _carry_out(attempt, space, stepper, feeds, correction, events)
    save_chains(space.memory, name, done.chains, {"loss": done.loss, "relative_l2": done.relative_l2})
    return done


def _carry_out(
    attempt: Attempt,
    space: Space,
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    events: Events,
) -> Attempt:
    walked = set() if stepper is None else {s.name for s in stepper.sites.values()}
    chains: dict[str, Chain] = {}
    for site in space.sites:
        choice = attempt.choices[site.name]
        if choice.format is not None and (correction is None or site.name not in walked):
            chains[site.name] = plain_chain(site, choice)
    if stepper is None or feeds is None:
        return replace(attempt, chains=chains)
    if correction is None:
        before, after = outputs_under(stepper, feeds, {}), outputs_under(stepper, feeds, chains)
    else:
        choices = {name: c for name, c in attempt.choices.items() if name in walked}
        with events.stage("correct in sequence", len(choices)) as progress:
            corrected, before, after = correct(
                stepper, feeds, choices, correction, space.roots, lambda site: progress.advance(1, site.name)
            )
        chains |= corrected
    return replace(attempt, chains=chains, loss=divergence(after, before), relative_l2=relative_error(after, before))


def outputs_under(stepper: Stepper, feeds: Feeds, chains: Mapping[str, Chain]) -> dict[str, torch.Tensor]:
    """The network's outputs with ``chains`` in the places of their sites."""
    with torch.no_grad():
        return stepper.run(
            feeds, lambda stop: run_chain(stop.site, chains.get(stop.site.name, Chain((stop.site.stage,))), stop.input)
        )


def plain_chain(site: Site, choice: Choice) -> Chain:
    """The chain by the weights alone."""
    assert choice.format is not None
    problem = FitProblem(site.stage.grouped_weight().astype(np.float64))
    stages = choice.format.decompose(site.stage.geometry, problem).stages(choice.rank)
    return chain_of(choice.format.name, choice.rank, stages, site.stage.bias)


def whitened_chain(site: Site, choice: Choice, moments: Moments, ridge: float) -> Chain:
    """The chain fitted to the original layer on the original network's inputs, each layer for itself."""
    assert choice.format is not None
    weight = site.stage.grouped_weight().astype(np.float64)
    problem = FitProblem(weight, moments.ridge(ridge))
    stages = fitted(choice.format.decompose(site.stage.geometry, problem), choice.rank, problem, rounds=6)
    composed = compose(stages).reshape(problem.matrix.shape)
    bias = moments.mean_t - np.einsum("gok,gk->go", composed, moments.mean_x)
    return chain_of(choice.format.name, choice.rank, stages, bias.reshape(-1))


def relative_error(outputs: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """Relative L2 over all floating outputs, each in units of its own norm; the worst one counts."""
    worst = 0.0
    for name, a in reference.items():
        if a.is_floating_point() and a.numel():
            norm = float(a.double().norm())
            worst = max(worst, float((outputs[name].double() - a.double()).norm()) / (norm or 1.0))
    return worst


def fastest_within(
    space: Space,
    solver: RankSolver,
    max_error: float,
    stepper: Stepper,
    feeds: Feeds,
    correction: Correction | None,
    effort: Effort,
    events: Events,
) -> tuple[Attempt, list[dict[str, Any]]]:
    """The fastest plan whose outputs stay within ``max_error`` (relative L2) of the original's on ``feeds``.

    Bisects the latency: the error is that of the network with corrected factors, not a sum over layers. Falls back to
    the network as it is when no plan stays within the error.
    """
    dense = {s.name: Choice() for s in space.sites}
    trace: list[dict[str, Any]] = []
    full = space.baseline.latency
    problem = space.problem({"latency": full}, {})
    low, high = least(problem, "latency") / full, 1.0
    best: Attempt | None = None
    with events.stage("search within the error", 7):
        for probe in range(7):
            middle = low + (high - low) / 2 if probe else low + (high - low) * 0.6
            attempt, _ = affordable(space, solver, {"latency": middle * full}, {}, effort)
            attempt = carry_out(attempt, space, stepper, feeds, correction, events)
            within = attempt.relative_l2 <= max_error
            trace.append(
                {"predicted": {"latency": middle * full}, "network": {"latency": attempt.cost.latency},
                 "relative_l2": attempt.relative_l2, "met": within}
            )  # fmt: skip
            if within:
                best, high = attempt, min(middle, attempt.cost.latency / full)
            else:
                low = middle
            if high - low < 0.01:
                break
    if best is None:
        plan = solver.solve(problem, effort.solver_s)
        picks = tuple(0 for _ in space.sites)
        plan = replace(plan, picks=picks, status="feasible", objective=0.0, bound=0.0)
        best = Attempt(plan, problem, dense, space.baseline, loss=0.0, relative_l2=0.0)
    return best, trace
