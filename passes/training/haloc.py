"""Ranks by gradient: a supernet of all candidates, whose choice is learned under the target's costs.

After HALOC (Xiao et al., AAAI 2023): rank choice as differentiable architecture search, with the hardware's cost in
the loss, selection and weights trained in turn, and a loss that draws feature maps to the dense network's so that the
candidates do not disturb each other. What is public of it leaves open the candidates' form, the estimator and how the
budget comes to hold; those are our own (:mod:`passes.training.haloc_supernet`, :mod:`passes.training.haloc_selection`):

    selection   E[loss] x prod max(1, E[cost] / budget)^1.5 + multipliers, AdamW on theta, one half of the data
    weights     loss of one drawn network + feature maps, SGD on the factors, the other half
    plan        least sum of -log p within every budget, exactly (:mod:`passes.ranks.milp`)

Candidates and costs are the exact solver's. The trained factors are let go: every plan's chains are fitted alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from passes.errors import InputError, UsageError
from passes.ranks.candidates import dense_work
from passes.ranks.context import SearchContext
from passes.ranks.milp import MilpSolver
from passes.ranks.problem import RankPlan, RankProblem, SiteOptions
from passes.registry import FORMATS
from passes.training.augment import Batch
from passes.training.data import LABELS, TrainingSet, generator
from passes.training.distillation import Distillation, relative_square, scores_kind
from passes.training.haloc_selection import Multipliers, Selection, penalised, second_order
from passes.training.haloc_supernet import SupernetLayer
from passes.training.network import TrainableNetwork

Tensor = torch.Tensor

_SOLVER_S = 30.0
"""What the exact knapsack may take, before and after the training."""


@dataclass(frozen=True)
class HalocOptions:
    """The recipe of a search.

    ``rounds`` of a pass over the selection and one over the weights, ``steps`` of ``batch`` samples each, in ``draws``
    parts with a network drawn for each; ``macs`` bounds the multiply-adds of all of them. The temperature falls
    geometrically from ``hot`` to ``cold``. ``power`` is that of (cost / budget) while it is exceeded. ``breadth``
    candidates a site are open at the start. ``features`` weighs the feature maps; ``softness`` and ``labels`` are the
    temperature of distillation and the weight of the labels' cross entropy. ``damping`` and ``rate`` are those of the
    multipliers. ``trust``: shares of the way from hot to cold at which the learned distribution gives a plan; the one
    whose network loses least is taken.
    """

    rounds: int = 12
    steps: int = 32
    batch: int = 64
    draws: int = 4
    macs: float = 3e13
    selection_lr: float = 1e-2
    weights_lr: float = 1e-2
    momentum: float = 0.9
    clip_norm: float = 1.0
    hot: float = 5.0
    cold: float = 0.1
    power: float = 1.5
    breadth: float = 4.0
    features: float = 1.0
    softness: float = 1.0
    labels: float = 0.5
    damping: float = 20.0
    rate: float = 1.0
    trust: tuple[float, ...] = (0.0, 0.4, 0.6, 0.8, 1.0)

    def temperature(self, done: float) -> float:
        """After a share ``done`` of all steps."""
        return float(self.hot * (self.cold / self.hot) ** min(max(done, 0.0), 1.0))


EFFORTS = {
    "quick": HalocOptions(rounds=6, steps=12, macs=3e12),
    "default": HalocOptions(),
    "extensive": HalocOptions(rounds=30, steps=196, batch=128, macs=1e16),
}


@dataclass(frozen=True)
class HalocSolver:
    """``options`` None: those of the context's effort."""

    name: str = "haloc"
    options: HalocOptions | None = None

    def search(self, problem: RankProblem, context: SearchContext, time_limit_s: float | None = None) -> RankPlan:
        """The plan that the learned distribution prefers within every budget.

        Its objective is the sum of predicted errors, like the exact solver's, and its bound the proven least one: what
        the search knows better than the prediction shows in that difference, and in the network's loss. Budgets out of
        reach are the exact solver's finding, with its proof, and nothing is trained; neither is anything where the
        dense network keeps them. UsageError without a budget.
        """
        if not problem.budgets:
            raise UsageError(f"--solver {self.name} needs a budget, such as --latency 60%")
        exact = MilpSolver().solve(problem, _SOLVER_S)
        if exact.status == "infeasible" or exact.objective <= 0:
            return replace(exact, solver=self.name)
        options = self.options or EFFORTS[context.effort]
        if time_limit_s is not None and time_limit_s <= 0:
            return self._plan(problem, exact, Selection(problem, options.breadth), options.hot)
        search = _Search(problem, context, options, time_limit_s)
        end = options.temperature(search.run())
        plans: dict[tuple[int, ...], RankPlan] = {}
        for share in options.trust:
            plan = self._plan(problem, exact, search.selection, options.hot * (end / options.hot) ** share)
            plans.setdefault(plan.picks, plan)
        losses = {picks: context.evaluate(picks) for picks in plans} if len(plans) > 1 else {}
        known = {picks: loss for picks, loss in losses.items() if math.isfinite(loss)}
        return plans[min(known, key=known.__getitem__)] if known else list(plans.values())[-1]

    def _plan(self, problem: RankProblem, exact: RankPlan, selection: Selection, temperature: float) -> RankPlan:
        learned = _rows(selection, temperature)
        chosen = MilpSolver().solve(preferring(problem, learned), _SOLVER_S)
        value = problem.total(chosen.picks, "error")
        return RankPlan(
            self.name, "feasible", chosen.picks, value, min(exact.bound, value), problem.digest(),
            preferences=tuple(tuple(row) for row in learned),
        )  # fmt: skip


def preferring(problem: RankProblem, losses: list[list[float]]) -> RankProblem:
    """The problem with learned losses, by site and option, in the place of the predicted errors."""
    sites = tuple(
        SiteOptions(site.site, tuple(replace(o, error=loss) for o, loss in zip(site.options, row, strict=True)))
        for site, row in zip(problem.sites, losses, strict=True)
    )
    return replace(problem, sites=sites)


class _Search:
    """One training of a supernet."""

    def __init__(
        self, problem: RankProblem, context: SearchContext, options: HalocOptions, limit_s: float | None
    ) -> None:
        self.problem, self.context, self.options = problem, context, options
        self.until = math.inf if limit_s is None else time.monotonic() + limit_s
        device = torch.device(context.device)
        self.supernet = context.network()
        teacher = self.supernet.clone()
        self.layers = supernet_layers(self.supernet, problem, context)
        for module in (self.supernet.module, teacher.module):
            module.to(device).eval()  # statistics of BatchNorm as they will be emitted
        data = context.data
        kind = scores_kind(teacher.module, _few(data).to(device))
        if data.labels is not None and kind == "values":
            data = TrainingSet(data.inputs)
        self.objective = Distillation(
            teacher.module, len(teacher.outputs), kind, temperature=options.softness, alpha=options.labels, beta=0.0,
            label_smoothing=0.0,
        )  # fmt: skip
        self.wanted = _Kept(teacher, list(self.layers))
        self.halves = data.split(0.5, context.seed) if len(data) > 1 else (data, data)
        self.selection = Selection(problem, options.breadth, device)
        self.steps, self.batch = _affordable_steps(self.supernet, options)

    def run(self) -> float:
        """Trains the selection; returns the share of the steps that was done."""
        options, selection = self.options, self.selection
        if not self.layers:  # no site that gradients reach: the prediction is all that is known
            return 0.0
        weights = [p for layer in self.layers.values() for p in layer.parameters()]
        chooser = torch.optim.AdamW([selection.theta], options.selection_lr)
        trainer = torch.optim.SGD(weights, options.weights_lr, options.momentum)
        scale = min(max(selection.price, 0.1), 100.0)
        multipliers = Multipliers(selection.metrics, scale, options.damping, options.rate)
        total = 2 * options.rounds * self.steps
        done = 0
        first, second = (self._batches(half, k) for k, half in enumerate(self.halves))
        draws = generator(self.context.seed, 5)
        level = 0.0  # of the loss, as a running mean
        for _ in range(options.rounds):
            for phase in range(2):
                for _ in range(self.steps):
                    if time.monotonic() > self.until:
                        return done / total
                    temperature = options.temperature(done / max(total - 1, 1))
                    if phase == 0:
                        scores = selection.scores(temperature)
                        excess = selection.excess(scores.softmax(1))
                        value, slope = self._slope(scores, next(first), draws)
                        level = 0.95 * level + 0.05 * value if done else value
                        loss = _carried(value, slope, scores)
                        whole = penalised(loss, list(excess.values()), options.power)
                        whole = whole + multipliers.penalty(excess, max(level, 1e-12))
                        (selection.theta.grad,) = torch.autograd.grad(whole, [selection.theta])
                        chooser.step()
                        multipliers.step(excess)
                        note = ", ".join(f"{m} {float(r.detach()):.1%} of its budget" for m, r in excess.items())
                    else:
                        trainer.zero_grad(set_to_none=True)
                        value = 0.0
                        parts = self._parts(next(second))
                        for part in parts:
                            self._choose(selection.draw(temperature, draws))
                            loss = self._loss(part, features=True) / len(parts)
                            value += _finite(loss)
                            loss.backward()  # type: ignore[no-untyped-call]
                        for group in trainer.param_groups:
                            group["lr"] = options.weights_lr * 0.5 * (1 + math.cos(math.pi * done / total))
                        nn.utils.clip_grad_norm_(weights, options.clip_norm)
                        trainer.step()
                        note = f"temperature {temperature:.2g}, loss {value:.3g}"
                    done += 1
                    self.context.progress(done, total, note)
        return 1.0

    def _slope(self, scores: Tensor, batch: Batch, draws: torch.Generator) -> tuple[float, Tensor]:
        """The mean loss over some draws, each on its part of the batch, and its estimated gradient in the scores."""
        fixed = scores.detach()
        slope, value = torch.zeros_like(fixed), 0.0
        parts = self._parts(batch)
        for part in parts:
            own = fixed.clone().requires_grad_()
            self._choose(second_order(own, self.selection.draw_from(fixed, draws)))
            loss = self._loss(part) / len(parts)
            value += _finite(loss)
            slope += torch.autograd.grad(loss, [own])[0]
        return value, slope

    def _parts(self, batch: Batch) -> list[Batch]:
        """A step's samples in as many parts as there are draws."""
        count = min(self.options.draws, len(next(iter(batch.values()))))
        split = {name: x.tensor_split(count) for name, x in batch.items()}
        return [{name: parts[k] for name, parts in split.items()} for k in range(count)]

    def _choose(self, gates: Tensor) -> None:
        for index, site in enumerate(self.problem.sites):
            layer = self.layers.get(site.site)
            if layer is not None:
                layer.gate = gates[index, : len(site.options)]

    def _loss(self, batch: Batch, features: bool = False) -> Tensor:
        for layer in self.layers.values():
            layer.keeps = features
        loss = self.objective(self.supernet.module, batch, 0.0, 1.0)
        if features and self.options.features > 0:
            wanted = self.wanted.taken()
            parts = [relative_square(_output(layer), wanted[name]) for name, layer in self.layers.items()]
            loss = loss + self.options.features * torch.stack(parts).mean()
        self.wanted.taken()
        return loss

    def _batches(self, half: TrainingSet, stream: int) -> Iterator[Batch]:
        """Batches without end, every sample once before any comes again."""
        number, device = 0, torch.device(self.context.device)
        while True:
            yield from half.epoch(number, self.batch, self.context.seed + stream, device=device)
            number += 1


class _Kept:
    """What the dense network's sites gave in its last run."""

    def __init__(self, network: TrainableNetwork, sites: list[str]) -> None:
        self._outputs: dict[str, Tensor] = {}
        for site in sites:
            network.layer(site).register_forward_hook(self._keeper(site))

    def _keeper(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[site] = output.clone()  # an operator behind it may work in place

        return keep

    def taken(self) -> dict[str, Tensor]:
        taken, self._outputs = self._outputs, {}
        return taken


def supernet_layers(
    network: TrainableNetwork, problem: RankProblem, context: SearchContext
) -> dict[str, SupernetLayer]:
    """Puts a supernet into the place of every site that has a choice, and freezes the rest; the layers by site."""
    for parameter in network.module.parameters():
        parameter.requires_grad_(False)
    layers = {}
    for options in problem.sites:
        if len(options.options) < 2 or options.site not in network.layers:
            continue
        site = network.sites[options.site]
        names = {o.format for o in options.options} - {"dense"}
        formats = {name: FORMATS.load(name) for name in sorted(names)}
        factors = {name: context.factors(options.site, name) for name in formats}
        layer = SupernetLayer(site.stage, site.channel_axis, options.options, formats, factors)
        network.put(options.site, layer)
        layers[options.site] = layer
    return layers


def _affordable_steps(network: TrainableNetwork, options: HalocOptions) -> tuple[int, int]:
    """Steps of a pass, and samples of a step: as wished, or fewer samples, then fewer steps, for a large network."""
    macs = sum(dense_work(site).macs for site in network.sites.values())
    samples = options.macs / max(4.0 * macs, 1.0)  # forward twice (once dense), backward once at twice its work
    passes = 2 * options.rounds
    batch = int(min(options.batch, max(samples / (passes * options.steps), min(8, options.batch))))
    return int(min(options.steps, max(samples / (passes * batch), 1))), batch


def _carried(value: float, slope: Tensor, scores: Tensor) -> Tensor:
    """A loss of this value and this gradient in the scores."""
    linear = (slope * scores).sum()
    return value + linear - linear.detach()


def _rows(selection: Selection, temperature: float) -> list[list[float]]:
    """-log p of every option, by site."""
    return [[float(x) for x in row] for row in selection.preferences(temperature)]


def _few(data: TrainingSet) -> TrainingSet:
    batch = data.take(torch.arange(min(len(data), 8)))
    labels = batch.pop(LABELS, None)
    return TrainingSet(batch, labels)


def _output(layer: SupernetLayer) -> Tensor:
    assert layer.output is not None
    return layer.output


def _finite(loss: Tensor) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError("the rank search diverged: the loss is no number; are all samples finite?")
    return value
