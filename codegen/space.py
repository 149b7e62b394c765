"""What the solver chooses from: sites, candidates, prices, errors, and what the calibration data says of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from codegen.events import Events
from codegen.measurable import MeasurablePrices
from codegen.memory import (
    Forgetful,
    Memory,
    Scores,
    load_scores,
    save_scores,
)
from codegen.walks import head, outputs_under, outputs_under_each, relative_error, whitened_chain
from passes import registry
from passes.core.cost import METRICS, Cost, Kind, LatencyModel, OpWork, StageWork
from passes.core.factor import FactorFormat, Rank
from passes.core.metric import OutputMetric
from passes.core.moments import Moments
from passes.core.site import Chain, Site
from passes.correct import Choice, Correction, Original
from passes.graph import Note
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Feeds, Stepper
from passes.ranks.candidates import Candidate, candidates, chain_works, dense_work
from passes.ranks.problem import Option, RankProblem, SiteOptions, undominated
from passes.sensitivity import ScoredSite, is_classifier, moments_by_site, output_metric, reactions, score

if TYPE_CHECKING:
    import torch

CALIBRATION_MACS = 150e9
"""Calibration stops at this many multiply-adds of the network, or at ``CALIBRATION_BYTES`` of its activations."""


CALIBRATION_BYTES = 3 << 30


@dataclass(frozen=True)
class Effort:
    """How far a search goes.

    ``elements`` bounds the patches that statistics are made of, ``samples`` the positions by unknown that a
    correction is fitted to, ``sweeps`` its refits behind a clamp. ``weightings`` are pairs
    of a power of the measured sensitivities and a tilt (:mod:`codegen.weighting`): each gives a plan that is carried
    out. ``turns`` is how often more plans follow, under weights learned from those before; the best plan stays.
    ``macs`` bounds the work that measuring sensitivities may take; where it cannot be done within it, one plan is all
    there is.
    """

    elements: int
    samples: int
    sweeps: int
    weightings: tuple[tuple[float, float], ...]
    turns: int
    macs: float
    solver_s: float

    def correction(self, seed: int) -> Correction:
        return Correction(samples=self.samples, elements=4 * self.elements, sweeps=self.sweeps, seed=seed)


EFFORTS = {
    "quick": Effort(4_000_000, 40, 1, (), 0, 0.0, 10),
    "default": Effort(12_000_000, 120, 1, ((1.0, 0.4), (0.5, 0.6)), 1, 120e9, 30),
    "extensive": Effort(48_000_000, 480, 3, ((1.0, 0.4), (0.5, 0.6), (1.0, 0.8), (1.0, 0.0)), 8, 4e12, 300),
}


ROOT_FLOOR = 0.1
"""Output directions that the network does not react to still count this much, relative to the mean."""


PROBE_ERROR = 0.15
"""The relative error at which a site's sensitivity is measured: what a site loses at half its latency."""


@dataclass(eq=False)
class Space:
    """What the solver chooses from, on one network and one target.

    ``scored`` and ``baseline`` hold prices: where the target's list has moved, :meth:`reprice` brings them up to date.
    ``outputs``: a classifier's on the calibration samples, as it came, where they have been computed.
    ``original``: what one correction leaves for the next.
    """

    sites: tuple[Site, ...]
    scored: dict[str, ScoredSite]
    ops: tuple[OpWork, ...]
    model: LatencyModel
    baseline: Cost
    kept: tuple[Note, ...]
    memory: Memory = field(default_factory=Forgetful)
    metrics: dict[str, OutputMetric] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    outputs: Mapping[str, torch.Tensor] | None = None
    original: Original = field(default_factory=Original)

    def problem(self, budgets: Mapping[str, float], errors: Mapping[str, float], measured: bool = False) -> RankProblem:
        """The rank problem; ``errors`` scales the error of each site's candidates.

        ``measured`` leaves out chains of which a stage was not measured.
        """
        metrics = tuple(METRICS)
        sites = []
        dense = dict.fromkeys(METRICS, 0.0)
        for site in self.sites:
            scored = self.scored[site.name]
            options = []
            for index, candidate in enumerate(scored.candidates):
                if measured and index and candidate.cost.kind is not Kind.MEASURED:
                    continue
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

    def reprice(self) -> None:
        """Gives candidates and baseline the prices that the list has now; problems made before keep theirs."""
        works = {
            name: [self.works(name, c.name, c.rank) for c in scored.candidates] for name, scored in self.scored.items()
        }
        prices = iter(self.model.chains([work for each in works.values() for work in each]))
        for name, scored in self.scored.items():
            candidates = tuple(
                replace(
                    candidate,
                    cost=replace(
                        candidate.cost,
                        latency=price.latency,
                        energy_pj=price.energy_pj,
                        dram_bytes=price.dram_bytes,
                        kind=price.kind,
                    ),
                )
                for candidate, price in zip(scored.candidates, prices, strict=False)
            )
            self.scored[name] = replace(scored, candidates=candidates)
        self.baseline = self.model.network(self.ops)

    def works(self, site: str, format: str, rank: Rank) -> tuple[StageWork, ...]:
        """The stages of a chain at a site; of the layer as it is for "dense"."""
        place = next(s for s in self.sites if s.name == site)
        return (dense_work(place),) if format == "dense" else chain_works(place, registry.FORMATS.load(format), rank)

    def candidate(self, site: str, format: str, rank: Rank) -> Candidate:
        for candidate in self.scored[site].candidates:
            if (candidate.name, candidate.rank) == (format, rank):
                return candidate
        raise KeyError(f"{site} has no candidate {format} {rank}")

    def error(self, site: str, choice: Choice) -> float:
        """The relative error that a candidate of the site is expected to have."""
        name = "dense" if choice.format is None else choice.format.name
        scored = self.scored[site]
        return float(scored.relative[scored.candidates.index(self.candidate(site, name, choice.rank))])

    def single(self, site: str, format: str, rank: Rank) -> Cost:
        """The cost of one chain at a site, whether it is a candidate or not."""
        works = self.works(site, format, rank)
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
    largest = sorted((4 * int(np.prod(s)) for op in ops for s in op.output_shapes), reverse=True)[:8]
    by_time = CALIBRATION_MACS / network_macs(ops)
    by_memory = CALIBRATION_BYTES / max(sum(largest), 1)
    return max(1, min(available, int(by_time), int(by_memory)))


def cores() -> int:
    """Cores that this process may use. No result depends on it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def network_macs(ops: Sequence[OpWork]) -> float:
    """Multiply-adds of one inference."""
    return float(max(sum(op.stage.macs for op in ops if op.stage is not None), 1))


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
    """Sites, candidates, prices and errors of a network. Without ``feeds`` the errors are those of the weights.

    Where prices are measured as the search goes on, the candidates are chosen by their outline: that is the same for
    every state of the measurements, so that a search which is repeated finds what it measured.
    """
    scan = graph.sites()
    sites, notes = selection.of(scan.sites)
    ops = graph.workload()
    width = {op.name: op.weight_bytes // op.weight_params for op in ops if op.weight_params}
    outline = model.outline() if isinstance(model, MeasurablePrices) else model
    with events.stage("price candidates"):
        found = candidates(
            sites, formats, outline, {s.name: width.get(s.name, 4) for s in sites}, margin=selection.margin
        )
        baseline = model.network(ops)
    space = Space(tuple(sites), {}, ops, model, baseline, (*scan.kept, *notes), memory=memory)
    scores = load_scores(memory, sites, found)
    if scores is not None:
        events.note("the candidates' scores are those of the interrupted run")
    else:
        scores = _measure(space, found, stepper, feeds, effort, correction, events)
        save_scores(memory, scores)
    scored, metrics, weights = scores
    space = replace(space, scored=scored, metrics=metrics, weights=weights)
    if outline is not model:
        space.reprice()
    return space


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
            moments, outputs = moments_by_site(
                stepper, feeds, effort.elements, correction.seed, lambda site: progress.advance(1, site.name), cores()
            )
        space.outputs = outputs if is_classifier(outputs) else None
    scored = {}
    # without moments a layer may be as large as the memory: then one at a time
    pool = ThreadPoolExecutor(cores() if moments else 1)
    largest_first = sorted(space.sites, key=lambda s: -s.stage.weight.size)  # so that the threads end together
    with events.stage("score candidates", len(space.sites)) as progress:
        try:
            each = pool.map(lambda s: score(s, found[s.name], moments.get(s.name), correction.ridge), largest_first)
            for site, result in zip(largest_first, each, strict=True):
                scored[site.name] = result
                progress.advance(1, site.name)
        finally:
            pool.shutdown(cancel_futures=True)
    scored = {site.name: scored[site.name] for site in space.sites}
    if stepper is None or feeds is None:
        return scored, {}, {}
    space = replace(space, scored=scored)
    with events.stage("probe the outputs"):
        metrics = output_metrics(space, stepper, feeds, effort, correction.seed)
    return scored, metrics, sensitivities(space, stepper, feeds, moments, effort, correction.ridge, events)


def output_metrics(space: Space, stepper: Stepper, feeds: Feeds, effort: Effort, seed: int) -> dict[str, OutputMetric]:
    """Each site's output metric, from gradients on as many samples as the effort allows."""
    count = int(min(256, effort.macs / (3 * network_macs(space.ops))))
    parts = head(feeds, count)
    if count < 1 or not parts:
        return {}
    found = reactions(stepper, parts, seed)
    return {s.name: output_metric(s, found[s.name], ROOT_FLOOR) for s in space.sites if s.name in found}


def _medium(scored: ScoredSite) -> tuple[Candidate, float]:
    """The candidate, but the dense layer, whose relative error is nearest to PROBE_ERROR, and that error."""
    index = 1 + int(np.argmin(np.abs(np.log(np.maximum(scored.relative[1:], 1e-12) / PROBE_ERROR))))
    return scored.candidates[index], float(scored.relative[index])


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
        errors: dict[str, float] = {}
        chains: dict[str, Callable[[], Chain]] = {}
        for site in sites:
            candidate, errors[site.name] = _medium(space.scored[site.name])
            choice = Choice(candidate.format, candidate.rank)
            chains[site.name] = partial(whitened_chain, site, choice, moments[site.name], ridge)

        def seen(name: str, after: Mapping[str, torch.Tensor]) -> None:
            found[name] = relative_error(after, before) ** 2 / max(errors[name], 1e-12)
            progress.advance(1, name)

        outputs_under_each(stepper, parts, chains, seen)
    found = {site.name: found[site.name] for site in sites}
    level = float(np.exp(np.mean(np.log(np.maximum(list(found.values()), 1e-12)))))
    return {name: max(value, 1e-12) / level for name, value in found.items()}
