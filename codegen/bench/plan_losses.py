"""Random plans of one network: what they really lose, and what each error model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from codegen.bench.network import opened
from codegen.events import Events, RecordingEvents
from codegen.search import affordable
from codegen.space import EFFORTS
from codegen.walks import head, outputs_under, plain_chain, whitened_chain
from passes.core.error import fisher_errors
from passes.core.fit import FitProblem
from passes.core.site import Chain, Site, compose
from passes.correct import Choice, correct
from passes.ranks.milp import MilpSolver
from passes.sensitivity import Probe, divergence, drawn_label, moments_by_site, reactions, scores

if TYPE_CHECKING:
    from codegen.bench.error_models import ErrorModels

Array = NDArray[Any]

TEMPERATURE = 4.0
"""Of the softened Fisher estimate: logits are divided by it, so that sure predictions have gradients too."""

DATA_FREE = "relative weight error (data-free)"

LEVEL = 0.65
"""The budget that all plans of the family "solved" share, as a fraction of the dense network's latency."""


@dataclass(frozen=True, eq=False)
class Plan:
    """``picks``: an index into the site's candidates for every site, the dense layer being 0."""

    family: str
    picks: tuple[tuple[str, int], ...]
    latency_ratio: float


class PlanLosses:
    """One network with its statistics on ``seen`` images; losses are those on ``held`` ones."""

    def __init__(self, options: ErrorModels, model: Path, seen: Array, held: Array, events: Events) -> None:
        from codegen.bench.error_models import Stopwatch

        self.options, self.events = options, events
        self.opened = opened(model, options.target)
        self.stepper = self.opened.stepper
        self.kind = self.opened.before.kind.value
        # metrics and sensitivities as the default effort has them, whatever the fits are given
        self.effort = replace(EFFORTS[options.effort], macs=EFFORTS["default"].macs)
        self.correction = self.effort.correction(options.seed)
        self.seen, self.held = {self.opened.input: seen}, {self.opened.input: held}
        self.clock = Stopwatch()
        self.recorded = RecordingEvents(events)
        self.space = self.opened.space(self.seen, self.effort, self.correction, self.recorded)
        self.sites: dict[str, Site] = {site.name: site for site in self.space.sites}
        with events.stage("statistics of the error models"):
            self.moments, self.logits_seen = self.clock.timed(
                "moments",
                lambda: moments_by_site(self.stepper, self.seen, self.effort.elements, options.seed),
            )
            self.logits_held = outputs_under(self.stepper, self.held, {})
        self._chains: dict[tuple[str, int], Chain] = {}
        self._cache: dict[tuple[str, str, int], float] = {}

    def random_plans(self, count: int, low: float = 0.5, high: float = 0.95) -> list[Plan]:
        """Plans whose latencies, priced as networks, spread evenly over ``low`` to ``high`` of the dense network's.

        A random share of the sites stays dense, the others take a random candidate out of a pool; of such draws each of
        five bins of latency keeps the first ones that fall into it. Raises RuntimeError where a bin stays empty.
        """
        rng = np.random.default_rng(self.options.seed)
        pools = {name: self._pool(name, rng) for name in self.sites}
        edges = np.linspace(low, high, 6)
        wanted = [len(part) for part in np.array_split(np.arange(count), 5)]
        bins: list[list[Plan]] = [[] for _ in wanted]
        for _ in range(400 * count):
            share = rng.uniform()
            picks = tuple(
                (name, int(rng.choice(pool)) if len(pool) and rng.uniform() < share else 0)
                for name, pool in pools.items()
            )
            ratio = self._latency_ratio(picks)
            place = int(np.searchsorted(edges, ratio, side="right")) - 1
            if 0 <= place < len(bins) and len(bins[place]) < wanted[place]:
                bins[place].append(Plan("random", picks, ratio))
            if all(len(found) == want for found, want in zip(bins, wanted, strict=True)):
                break
        else:
            short = [f"{edges[i]:.0%}" for i, found in enumerate(bins) if len(found) < wanted[i]]
            raise RuntimeError(f"random plans do not reach the latencies from {', '.join(short)} on")
        # taken in turn from the bins, so that the first plans span the whole range as well
        return [found[i] for i in range(max(wanted)) for found in bins if i < len(found)]

    def solved_plans(self, count: int) -> list[Plan]:
        """Plans such as a solver makes: least whitened error within one budget, under random weights of the sites.

        They cost the same and differ in where they spend it, which is what an error model has to judge.
        """
        rng = np.random.default_rng(self.options.seed)
        solver = MilpSolver()
        budget = {"latency": LEVEL * self.opened.before.latency}
        plans: dict[tuple[tuple[str, int], ...], Plan] = {}
        for _ in range(20 * count):
            weights = {name: float(rng.lognormal(0, 1)) for name in self.sites}
            attempt, _ = affordable(self.space, solver, budget, weights, self.effort)
            picks = tuple((name, self._index(name, attempt.choices[name])) for name in self.sites)
            plans.setdefault(picks, Plan("solved", picks, self._latency_ratio(picks)))
            if len(plans) == count:
                return list(plans.values())
        raise RuntimeError(f"random weights gave only {len(plans)} different plans, {count} were wanted")

    def _pool(self, site: str, rng: np.random.Generator) -> Array:
        others = np.arange(1, len(self.space.scored[site].candidates))
        return rng.choice(others, min(self.options.pool, len(others)), replace=False)

    def _index(self, site: str, choice: Choice) -> int:
        name = "dense" if choice.format is None else choice.format.name
        return self.space.scored[site].candidates.index(self.space.candidate(site, name, choice.rank))

    def _latency_ratio(self, picks: tuple[tuple[str, int], ...]) -> float:
        cost = self.space.price({name: self._choice(name, index) for name, index in picks})
        return float(cost.latency / self.opened.before.latency)

    def _choice(self, site: str, index: int) -> Choice:
        candidate = self.space.scored[site].candidates[index]
        return Choice(candidate.format, candidate.rank)

    def whitened(self, plan: Plan) -> float:
        """True KL with factors fitted layer by layer."""
        chains = {name: self._chain(name, index) for name, index in plan.picks if index}
        return self._kl(chains)

    def corrected(self, plan: Plan) -> float:
        """True KL after sequential correction as ``lower`` does it, dense layers refitted as well."""
        choices = {name: self._choice(name, index) for name, index in plan.picks}
        chains, _, _ = self.clock.timed(
            "correction", lambda: correct(self.stepper, self.seen, choices, self.correction, self.space.metrics)
        )
        return self._kl(chains)

    def _kl(self, chains: Mapping[str, Chain]) -> float:
        return divergence(outputs_under(self.stepper, self.held, chains), self.logits_held)

    def _chain(self, site: str, index: int) -> Chain:
        key = (site, index)
        if key not in self._chains:
            place, choice, moments = self.sites[site], self._choice(site, index), self.moments[site]
            self._chains[key] = self.clock.timed(
                "fit", lambda: whitened_chain(place, choice, moments, self.correction.ridge)
            )
        return self._chains[key]

    def models(self) -> dict[str, Callable[[str, int], float]]:
        """The error models: each gives the number of one pick; dense layers count 0. Made when first asked for."""
        sensitive = "whitened relative error x layer's sensitivity"
        makers: dict[str, Callable[[str, int], float]] = {
            "latency saved (control)": self._saved,
            DATA_FREE: self._weight_error,
            "whitened relative error": self._whitened_error,
            "whitened relative error in the output metric": self._metric_error,
            sensitive: self._sensitive_error,
            "Fisher": self._fisher("Fisher", drawn_label),
            f"Fisher, logits / {TEMPERATURE:g}": self._fisher(
                f"Fisher, logits / {TEMPERATURE:g}", partial(drawn_label, temperature=TEMPERATURE)
            ),
            "single-layer KL": self._single_layer,
        }
        return {name: self._cached(name, maker) for name, maker in makers.items()}

    def _cached(self, model: str, maker: Callable[[str, int], float]) -> Callable[[str, int], float]:
        def value(site: str, index: int) -> float:
            if not index:
                return 0.0
            key = (model, site, index)
            if key not in self._cache:
                self._chain(site, index)  # fitted before the clock starts: every model but the data-free one needs it
                self._cache[key] = self.clock.timed(model, lambda: maker(site, index))
            return self._cache[key]

        return value

    def _weight_error(self, site: str, index: int) -> float:
        place = self.sites[site]
        problem = FitProblem(place.stage.grouped_weight().astype(np.float64))
        chain = plain_chain(place, self._choice(site, index))
        return problem.error(compose(chain.stages)) / problem.energy()

    def _whitened_error(self, site: str, index: int) -> float:
        gram = self.moments[site].ridge(self.correction.ridge)
        problem = FitProblem(self.sites[site].stage.grouped_weight().astype(np.float64), gram)
        return problem.error(compose(self._chains[site, index].stages)) / problem.energy()

    def _metric_error(self, site: str, index: int) -> float:
        gram = self.moments[site].ridge(self.correction.ridge)
        weight = self.sites[site].stage.grouped_weight().astype(np.float64)
        metric = self.space.metrics.get(site)
        problem = FitProblem(weight, gram, None if metric is None else metric.root)
        return problem.error(compose(self._chains[site, index].stages)) / problem.energy()

    def _sensitive_error(self, site: str, index: int) -> float:
        return self._whitened_error(site, index) * self.space.weights[site]

    def _saved(self, site: str, index: int) -> float:
        candidates = self.space.scored[site].candidates
        return candidates[0].cost.latency - candidates[index].cost.latency

    def _fisher(self, model: str, probe: Probe) -> Callable[[str, int], float]:
        found: dict[str, Array] = {}

        def value(site: str, index: int) -> float:
            weight = self.sites[site].stage.grouped_weight()
            delta = (compose(self._chains[site, index].stages) - weight).reshape(1, *weight.shape[:2], -1)
            return float(fisher_errors(delta, found[site])[0])

        def gradients() -> None:
            batches = head(self.seen, self.options.reacting)
            samples = min(self.options.reacting, self.options.statistics)
            reacted = reactions(self.stepper, batches, self.options.seed, probe, keep_inputs=True)
            found.update({site: scores(self.sites[site], reacted.pop(site), samples) for site in list(reacted)})

        def first(site: str, index: int) -> float:
            if not found:
                self.clock.timed(f"{model}, once", gradients)
            return value(site, index)

        return first

    def _single_layer(self, site: str, index: int) -> float:
        few = {name: rows[: self.options.probing] for name, rows in self.seen.items()}
        reference = {name: logits[: self.options.probing] for name, logits in self.logits_seen.items()}
        return divergence(outputs_under(self.stepper, few, {site: self._chains[site, index]}), reference)

    def costs(self, models: list[str]) -> list[dict[str, Any]]:
        """What each error model takes: seconds once per network and per candidate, its fit included."""
        count = sum(len(scored.candidates) - 1 for scored in self.space.scored.values())
        rows = []
        for model in models:
            if model == "latency saved (control)":
                continue
            fisher = self.clock.seconds.get(f"{model}, once", 0.0)
            own = self.clock.seconds[model] - fisher  # the first call of a Fisher model gathers its gradients
            each = own / self.clock.calls[model] + (0.0 if model == DATA_FREE else self.clock.each("fit"))
            stage = {"in the output metric": "probe the outputs", "sensitivity": "measure sensitivities"}
            before = sum(self.recorded.timings.get(name, 0.0) for end, name in stage.items() if model.endswith(end))
            once = fisher + before + (0.0 if model == DATA_FREE else self.clock.seconds["moments"])
            rows.append(
                {"model": model, "once_s": once, "per_candidate_s": each, "candidates": count,
                 "measured_candidates": self.clock.calls[model], "network_s": once + count * each}
            )  # fmt: skip
        return rows
