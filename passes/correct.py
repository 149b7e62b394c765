"""Sequential correction: every layer refitted, in closed form, on what really reaches it.

Two walks over the network advance together, the original and the compressed one. At each site the patches x come
from the compressed walk, the wanted outputs y from the original one, so the fit undoes what the layers before have
lost (asymmetric reconstruction: Zhang et al., TPAMI 2016). Where a residual branch is added behind the site, the
error that arrives over it is put into the target as well, and where the sum is clamped (ReLU), outputs on the flat
side only have to stay there: targets are moved to the nearest value with the same result, and the fit is repeated.
That is majorisation-minimisation: what each sweep lowers is an upper bound of the error behind the clamp, which
counts an output in full where the original is not flat and the fit is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import gcd
from typing import TypeAlias

import numpy as np
import torch

from passes.core.alternate import alternate, refit_tail
from passes.core.factor import FactorFormat, Rank, chain_of, fitted
from passes.core.fit import WIDE, FitProblem, Regression
from passes.core.metric import OutputMetric
from passes.core.moments import Moments, Samples
from passes.core.patches import outputs_at, patches, sample_rows
from passes.core.site import Array, Chain, Site, Stage, compose
from passes.core.workers import ALONE, Workers
from passes.onnx_stepper import Epilogue, Feeds, Stepper, Stop, Walk
from passes.torch_apply import as_array, run_chain


@dataclass(frozen=True)
class Choice:
    """What the plan puts at a site: a format and a rank, or the dense layer (format None)."""

    format: FactorFormat | None = None
    rank: Rank = ()


@dataclass(frozen=True)
class Correction:
    """Options of the sequential correction.

    A fit with K unknowns by output sees ``samples`` x K positions, fewer for K above ``FULL``, where the work by layer
    stays the same; ``elements`` bounds the patch matrix (positions x K) held at a time. ``ridge`` is relative to the
    mean eigenvalue of the patches' covariance and shrinks towards the original weight; ``sweeps`` counts refits behind
    a clamp, ``rounds`` the alternations of the first fit.
    ``dense`` refits layers that stay dense as well: the same cost, and they absorb part of the error. With ``clean``
    n, about every n-th position is seen a second time as the original network has it, beyond ``elements``: an error
    that is peculiar to the calibration samples is then not made up for at any price.
    """

    samples: int = 120
    elements: int = 48_000_000
    ridge: float = 1e-3
    sweeps: int = 3
    rounds: int = 6
    dense: bool = True
    skips: bool = True
    clean: int | None = None
    seed: int = 0

    def rows(self, unknowns: int, groups: int) -> int:
        """Positions that a fit with so many unknowns for each output of a group is given."""
        wanted = self.samples * unknowns * min(1.0, (FULL / unknowns) ** 3)
        return int(min(wanted, self.elements / (unknowns * groups)))


FULL = 576
"""64 channels under a 3x3 kernel: up to here positions grow with the unknowns, so that no layer is fitted to noise."""


KEPT_BYTES = 512 << 20
"""What may be kept of the original network between corrections."""


@dataclass(frozen=True, eq=False)
class Corrected:
    """A plan's chains by site name, and the outputs of the network that has them."""

    chains: dict[str, Chain]
    outputs: dict[str, torch.Tensor]


def correct(
    stepper: Stepper,
    feeds: Feeds,
    choices: Mapping[str, Choice],
    options: Correction,
    metrics: Mapping[str, OutputMetric] | None = None,
    progress: Callable[[Site], None] = lambda site: None,
) -> tuple[dict[str, Chain], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Fits a chain for every site in ``choices`` (by site name); sites left out stay as they are.

    ``feeds``: input name -> array with all calibration samples. ``metrics``: by site.
    Returns the chains and the outputs of the original and of the corrected network on the feeds.
    """
    (found,), before = correct_each(stepper, feeds, [choices], options, metrics, progress)
    return found.chains, before, found.outputs


def correct_each(
    stepper: Stepper,
    feeds: Feeds,
    plans: Sequence[Mapping[str, Choice]],
    options: Correction,
    metrics: Mapping[str, OutputMetric] | None = None,
    progress: Callable[[Site], None] = lambda site: None,
    threads: int = 1,
    original: Original | None = None,
) -> tuple[list[Corrected], dict[str, torch.Tensor]]:
    """:func:`correct` for several plans beside one walk over the original network, whose outputs are returned too.

    Each plan gets what it would get alone, whatever the number of ``threads`` that share the plans at each site, or
    where there is one plan, its samples. ``original``: what earlier calls with this stepper, these feeds and metrics
    have left for later ones.
    """
    refitted = {site for plan in plans for site, choice in plan.items() if choice.format is not None or options.dense}
    with torch.no_grad(), Workers(threads, _alone) as workers:
        of_plans, of_samples = (ALONE, workers) if len(plans) == 1 else (workers, ALONE)
        walks = list(of_plans.each(lambda choices: _PlanWalk(stepper.walk(feeds), choices), plans))
        goals = (original or Original(0)).goals(
            (options, frozenset(refitted)), lambda: _goals(stepper, feeds, refitted, options, metrics or {})
        )
        coming = of_samples.ahead(goals)
        shared = (stepper, options, metrics or {}, of_samples, coming.begin)
        sites = of_plans.abreast(coming, [partial(_advance_plan, walk, *shared) for walk in walks])
        while True:
            try:
                site, _ = next(sites)
            except StopIteration as end:
                return [walk.ended() for walk in walks], end.value
            progress(site)


Goals: TypeAlias = Generator[tuple[Site, "_Goal | None"], None, dict[str, torch.Tensor]]
"""The sites in the order of the walk with what is wanted there; in the end the original network's outputs."""


class Original:
    """What the original network has at its sites, kept from one correction for the next with the same options."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self.forget()

    def forget(self) -> None:
        self._key: Hashable = None
        self._sites: list[tuple[Site, _Goal | None]] = []
        self._outputs: dict[str, torch.Tensor] = {}

    def goals(self, key: Hashable, walk: Callable[[], Goals]) -> Goals:
        """What is kept under the key, or what a walk yields, which is kept if it has no more bytes than the limit."""
        if key == self._key:
            yield from self._sites
            return self._outputs
        self.forget()
        goals, bytes_ = walk(), 0
        kept: list[tuple[Site, _Goal | None]] = []
        while True:
            try:
                at = next(goals)
            except StopIteration as end:
                outputs: dict[str, torch.Tensor] = end.value
                if bytes_ + sum(value.nbytes for value in outputs.values()) <= self._limit:
                    self._key, self._sites, self._outputs = key, kept, outputs
                return outputs
            bytes_ += 0 if at[1] is None else at[1].nbytes
            if bytes_ <= self._limit:
                kept.append(at)
            else:
                kept.clear()
            yield at


def _goals(
    stepper: Stepper,
    feeds: Feeds,
    refitted: Collection[str],
    options: Correction,
    metrics: Mapping[str, OutputMetric],
) -> Goals:
    """A walk over the original network: what its sites have, None for those not ``refitted``. Returns its outputs."""
    walk = stepper.walk(feeds)
    stop = next(walk)
    for index in count():
        site = stop.site
        y = run_chain(site, Chain((site.stage,)), stop.input)
        if site.name in refitted:
            rng = np.random.default_rng((options.seed, index))
            yield site, _Goal.of(stop, y, options, metrics.get(site.name), rng)
        else:
            yield site, None
        try:
            stop = walk.send(y)
        except StopIteration as end:
            outputs: dict[str, torch.Tensor] = end.value
            return outputs
    raise AssertionError("a walk ends")


class _PlanWalk:
    """The walk over the network under one plan. It holds the same nodes as the original one: they pause together."""

    def __init__(self, walk: Walk, choices: Mapping[str, Choice]) -> None:
        self.walk, self.choices = walk, choices
        self.chains: dict[str, Chain] = {}
        self.outputs: dict[str, torch.Tensor] | None = None
        self.stop: Stop = next(walk)

    def send(self, y: torch.Tensor) -> None:
        try:
            self.stop = self.walk.send(y)
        except StopIteration as end:
            self.outputs = end.value

    def ended(self) -> Corrected:
        if self.outputs is None:
            raise AssertionError("the walks did not end together")
        return Corrected(self.chains, self.outputs)


def _advance_plan(
    walk: _PlanWalk,
    stepper: Stepper,
    options: Correction,
    metrics: Mapping[str, OutputMetric],
    workers: Workers,
    go_ahead: Callable[[], None],
    at: tuple[Site, _Goal | None],
) -> None:
    """One site of one plan: its chain, and on to the next site.

    ``go_ahead`` is called where the workers have done most of what there is to do for them at this site.
    """
    site, goal = at
    chain = Chain((site.stage,))
    choice = walk.choices.get(site.name)
    if choice is not None and (choice.format is not None or options.dense):
        assert goal is not None
        epilogue = stepper.epilogues[site.output]
        chain = _fit(walk.stop, goal, epilogue, choice, options, metrics.get(site.name), workers, go_ahead)
        walk.chains[site.name] = chain
    walk.send(run_chain(site, chain, walk.stop.input))


def _alone() -> None:
    """What torch sets by thread: no gradients, and no threads of its own beside those of the plans."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)


@dataclass(frozen=True, eq=False)
class _Goal:
    """What the original network has at a site, at the sampled positions ``rows``: (g, n, O) each.

    ``plain`` are the layer's own outputs, ``joined`` those behind the addition; None where its branch is not known.
    ``clean``: the original network's patches at some of the positions, whose outputs stand again behind those of all;
    ``clean_skip``: what it adds there.
    """

    rows: Array
    plain: Array
    joined: Array | None
    clean: Array | None = None
    clean_skip: Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.rows, self.plain, self.joined, self.clean, self.clean_skip) if a is not None)

    @classmethod
    def of(
        cls,
        wanted: Stop,
        y: torch.Tensor,
        options: Correction,
        metric: OutputMetric | None,
        rng: np.random.Generator,
    ) -> _Goal:
        site, stage = wanted.site, wanted.site.stage
        groups = stage.geometry.groups
        unknowns = int(np.prod(stage.weight.shape[1:]))
        limit = max(options.rows(unknowns, groups), 4 * stage.out_channels)
        rows = _rows(site, as_array(site, wanted.input).shape, limit, metric, rng)
        plain = outputs_at(as_array(site, y), groups, rows)
        goal = cls(rows, plain, None)
        if options.skips and wanted.skip is not None and wanted.skip.shape == y.shape:
            goal = replace(goal, joined=plain + outputs_at(as_array(site, wanted.skip), groups, rows))
        if options.clean is None:
            return goal
        grid = y.shape[2:] if stage.geometry.ndim else y.movedim(site.channel_axis, -1).shape[1:-1]
        return goal._with_clean(wanted, coprime(options.clean, grid))

    def _with_clean(self, wanted: Stop, each: int) -> _Goal:
        rows = self.rows[::each]

        def again(values: Array) -> Array:
            return np.concatenate([values, values[:, ::each]], axis=1)

        site, geometry = wanted.site, wanted.site.stage.geometry
        found = replace(self, plain=again(self.plain), clean=patches(as_array(site, wanted.input), geometry, rows))
        if self.joined is None or wanted.skip is None:
            return found
        skip = outputs_at(as_array(site, wanted.skip), geometry.groups, rows)
        return replace(found, joined=again(self.joined), clean_skip=skip)


@dataclass(frozen=True, eq=False)
class _Target:
    """Wanted outputs behind the epilogue, at the sampled positions: (g, n, O) each."""

    total: Array  # what the original network has after the addition
    skip: Array | None  # what the compressed network adds
    epilogue: Epilogue

    def initial(self) -> Array:
        return self.total if self.skip is None else self.total - self.skip

    def moved(self, y: Array, workers: Workers = ALONE) -> Array:
        """Targets for the layer, given its present outputs ``y``: on the flat side of the clamp, stay there."""
        found = np.empty_like(self.total)
        low, high = self.epilogue.low, self.epilogue.high

        def fill(part: slice) -> None:
            goal = total = self.total[:, part]
            now = y[:, part] if self.skip is None else y[:, part] + self.skip[:, part]
            if low is not None:
                goal = np.where(total <= low, np.minimum(now, low), goal)
            if high is not None:
                goal = np.where(total >= high, np.maximum(now, high), goal)
            found[:, part] = goal if self.skip is None else goal - self.skip[:, part]

        for _ in workers.blocks(fill, y.shape[1]):
            pass
        return found


def _fit(
    seen: Stop,
    goal: _Goal,
    epilogue: Epilogue,
    choice: Choice,
    options: Correction,
    metric: OutputMetric | None,
    workers: Workers,
    go_ahead: Callable[[], None],
) -> Chain:
    site, stage = seen.site, seen.site.stage
    samples = Samples(patches(as_array(site, seen.input), stage.geometry, goal.rows, workers, goal.clean), workers)
    if goal.joined is not None and seen.skip is not None:
        skip = _behind(outputs_at(as_array(site, seen.skip), stage.geometry.groups, goal.rows), goal.clean_skip)
        target = _Target(goal.joined, skip, epilogue)
    else:
        target = _Target(goal.plain, None, epilogue if epilogue.skip is None else Epilogue())
    moments = Moments.of(samples, target.initial())
    go_ahead()
    weight = stage.grouped_weight().astype(np.float64)
    flat = weight.reshape(*weight.shape[:2], -1)
    clamps = target.epilogue.low is not None or target.epilogue.high is not None
    regression = Regression(flat, moments, options.ridge)
    stages: tuple[Stage, ...] = ()
    composed, bias = flat, np.zeros(flat.shape[:2])
    sweeps = min(options.sweeps, 1) if flat.shape[-1] > WIDE else options.sweeps
    for sweep in range(1 + (sweeps if clamps else 0)):
        if sweep:
            moments = moments.retarget(samples, target.moved(samples.predicted(composed, bias), workers))
        best = regression.fit(moments)
        problem = FitProblem(best.reshape(weight.shape), regression.gram, None if metric is None else metric.root)
        if choice.format is None:
            stages = (replace(stage, weight=best.reshape(stage.weight.shape), bias=None),)
        elif sweep:
            stages = alternate(refit_tail(stages, problem), problem, rounds=2)
        else:
            decomposed = choice.format.decompose(stage.geometry, problem)
            stages = fitted(decomposed, choice.rank, problem, options.rounds)
        composed = _composed(stages)
        bias = moments.mean_t - np.einsum("gok,gk->go", composed, moments.mean_x)
    if choice.format is None:
        return chain_of("dense", (), stages, bias.reshape(-1))
    return chain_of(choice.format.name, choice.rank, stages, bias.reshape(-1))


def coprime(least: int, sides: Sequence[int]) -> int:
    """The first number from ``least`` on that has no divisor with a side of a grid: steps that meet all its columns."""
    return next(n for n in count(max(least, 1)) if all(gcd(n, side) == 1 for side in sides))


def _behind(values: Array, more: Array | None) -> Array:
    return values if more is None else np.concatenate([values, more], axis=1)


def _rows(
    site: Site, shape: tuple[int, ...], limit: int, metric: OutputMetric | None, rng: np.random.Generator
) -> Array:
    if site.stage.geometry.ndim:
        return sample_rows(site.stage.geometry, shape, limit, rng, None if metric is None else metric.positions)
    return np.arange(shape[0]) if shape[0] <= limit else np.sort(rng.choice(shape[0], limit, replace=False))


def _composed(stages: tuple[Stage, ...]) -> Array:
    weight = compose(stages)
    return weight.reshape(*weight.shape[:2], -1)
