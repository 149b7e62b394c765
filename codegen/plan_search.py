"""The rank search of one run: data, walk, space, budgets, and the plan that it ends with."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.config import LowerConfig
from codegen.dataset import Dataset, random_inputs
from codegen.emission import Emission, as_emitted
from codegen.events import Events, RecordingEvents
from codegen.memory import Memory
from codegen.mirrored import Mirrored, mirrored
from codegen.refinement import TUNING_EFFORTS, Refinement
from codegen.search import Attempt, best_within_budgets, carry_out, fastest_within, fit_finally
from codegen.searching import Search
from codegen.space import EFFORTS, Selection, Space, build_space, calibration_count
from codegen.target import Target
from codegen.verification import walk_disagreement
from codegen.walks import FeedsOf, batched, one_by_one
from passes import registry
from passes.core.cost import Cost, Kind
from passes.correct import Choice, Correction
from passes.errors import InputError, UsageError, first_line
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Feeds, Stepper
from passes.ranks.context import SearchingSolver
from passes.ranks.milp import MilpSolver
from passes.ranks.problem import RankPlan, RankSolver

if TYPE_CHECKING:
    from passes.training.data import TrainingSet


_LOOSE = 0.05
"""A budget that is undercut by less of it is not worth another search."""


def formats_named(names: Sequence[str], events: Events) -> dict[str, Any]:
    """Formats by name; all there are without names, and then a note for each that cannot be loaded."""
    if not names:
        found, broken = registry.FORMATS.load_all()
        for note in broken:
            events.note(f"{note.node}: {note.reason}")
        return found
    return {name: registry.FORMATS.load(name) for name in names if name != "dense"}


def read_plan(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Format and rank by layer. InputError where the file is no plan."""
    try:
        layers = json.loads(path.read_text())["layers"]
        return {layer["name"]: (str(layer["choice"]), tuple(int(r) for r in layer["rank"])) for layer in layers}
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a plan: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no plan; give the plan.json of an earlier run") from error


def solvers(config: LowerConfig) -> tuple[RankSolver, SearchingSolver | None]:
    """The pure solver of a run, and the one that looks at the network where that was asked for.

    UsageError where the latter has no budget: bisecting towards an output error would take a search each time.
    """
    found: Any = registry.SOLVERS.load(config.solver)
    if not hasattr(found, "search"):
        return found, None
    if not config.budgets and config.plan is None:
        raise UsageError(f"--solver {config.solver} needs a budget, such as --latency 60%")
    return MilpSolver(), found


class PlanSearch:
    """The rank search of one run: what it works on, and the plan that it ends with."""

    def __init__(
        self,
        config: LowerConfig,
        target: Target,
        network: OnnxGraph,
        data: Dataset | None,
        before: Cost,
        emitted: Cost | None,
        run: RecordingEvents,
    ) -> None:
        self.config, self.target, self.network, self.run_events = config, target, network, run
        self.solver, self.searching = solvers(config)
        self.effort = EFFORTS[config.effort]
        self.margin = target.latency.margin if config.margin is None else config.margin
        self.priced_before, self.emitted_before = before, emitted
        self.before = as_emitted(before, emitted)
        self.started = time.perf_counter()
        self.budgets = self._limits()
        # What the price list does not see of the network as it came, it will hardly see of the rewritten one.
        self.unseen = {m: self.before.metric(m) - before.metric(m) for m in ("latency", "energy")}
        self.goals = {metric: self._goal(metric, self.unseen.get(metric, 0.0)) for metric in self.budgets}
        self.held: dict[str, float] = {}
        self.missed: dict[str, float] = {}
        """The largest goals that led to files within a budget, and the least ones that did not."""
        self.refinement = Refinement(TUNING_EFFORTS[config.effort], self._out_of_time, run)
        self.trace: list[dict[str, Any]] = []
        self.space: Space | None = None
        self.calibrated = data is not None
        if data is None:
            run.warning(
                "no --calib data: factors follow the weights alone, and errors are judged on random inputs; "
                "expect a lower accuracy than with a few hundred real samples"
            )
            data = random_inputs(network.inputs, network.input_shapes, 8, config.seed)
        count = calibration_count(network.workload(), len(data))
        if count < len(data):
            run.note(f"calibration uses the first {count} of {len(data)} samples: more would exceed time or memory")
        self.data = data.head(count)
        self.correction = self.effort.correction(config.seed)
        self.stepper: Stepper | None = None
        self.feeds_of: FeedsOf = batched
        self.search: Search | None = None
        self.twin: tuple[Mirrored | None] | None = None
        """What came of asking for mirror images; None before."""
        self.training: TrainingSet | None = None
        """What a solver that trains may use instead of the calibration samples."""

    def samples(self, count: int) -> list[Mapping[str, Any]]:
        """Up to ``count`` single inferences of the data."""
        return list(self.data.head(count).batches(1))

    def run(self, workspace: Memory) -> Attempt:
        """The best attempt; its chains are ready to be put into the network."""
        try:
            return self._run(workspace)
        finally:
            if self.space is not None:
                self.space.original.forget()

    def _run(self, workspace: Memory) -> Attempt:
        solver = self.solver
        self.stepper = self._walkable()
        feeds = None if self.stepper is None else self.feeds_of(self.data)
        config = self.config
        trains = self.training is not None or self.searching is not None  # for how long, nobody knows
        while not trains and self.target.get_ready():
            pass
        self.space = build_space(
            self.network,
            self.target.latency,
            formats_named(config.formats, self.run_events),
            Selection(config.include, config.exclude, config.margin),
            self.stepper,
            feeds if self.calibrated else None,
            self.effort,
            self.correction,
            self.run_events,
            workspace,
        )
        if config.include and not self.space.sites:
            globs = ", ".join(config.include)
            self.run_events.warning(f"no layer that could be rewritten is named by --include {globs}")
        correction = self.correction if self.calibrated else None
        twin = self._mirrored(feeds)
        if self.config.plan is not None:
            attempt = self._replayed(self.config.plan)
            if twin is None or self._out_of_time():
                return carry_out(attempt, self.space, self.stepper, feeds, correction, self.run_events)
            return fit_finally(attempt, self.space, twin, self.correction, self.run_events)
        if self.searching is not None and self.space.sites:
            attempt, self.trace = self._searched(self.searching, feeds, correction, twin)
        elif self.budgets or not self.space.sites:
            attempt, self.trace = best_within_budgets(
                self.space,
                solver,
                self.goals,
                self.stepper,
                feeds,
                correction,
                self.effort,
                self._out_of_time,
                self.run_events,
                self.refinement,
                twin,
            )
        elif self.stepper is None:
            raise InputError(
                f"{self.config.model}: without a budget the error of the output is what limits the ranks, and this "
                "network cannot be walked layer by layer; give a budget such as --latency 60%"
            )
        else:
            assert feeds is not None
            attempt, self.trace = fastest_within(
                self.space,
                solver,
                config.max_error,
                self.stepper,
                feeds,
                correction,
                self.effort,
                self._out_of_time,
                self.run_events,
                self.refinement,
            )
            return attempt  # as it was judged: the error is what limits it
        if twin is None or self._out_of_time():
            return attempt
        return fit_finally(attempt, self.space, twin, self.correction, self.run_events)

    def _mirrored(self, feeds: Feeds | None) -> Mirrored | None:
        """Mirror images of the samples, where the effort has plans to judge and the network takes them for the same."""
        assert self.space is not None
        if not self.calibrated or feeds is None or self.stepper is None or not self.space.weights:
            return None
        if self.twin is None and (self.budgets or self.config.plan is not None):
            with self.run_events.stage("mirror the samples"):
                self.twin = (mirrored(self.stepper, feeds, self.space.ops, self.space.outputs),)
        return None if self.twin is None else self.twin[0]

    def _searched(
        self, solver: SearchingSolver, feeds: Feeds | None, correction: Correction | None, judge: Mirrored | None
    ) -> tuple[Attempt, list[dict[str, Any]]]:
        """The plan of a solver that looks at the network. What it has learned serves later calls as well."""
        assert self.space is not None
        learned, bound = (None, 0.0) if self.search is None else (self.search.learned, self.search.bound)
        self.search = Search(
            solver, self.space, self.network, self._training(), self.stepper, feeds, correction, self.effort,
            self.config.effort, self.config.seed, self.run_events, self._device(), learned, bound, judge,
        )  # fmt: skip
        budget = self.config.time_budget_s
        left = None if budget is None else max(budget - (time.perf_counter() - self.started), 0.0)
        return self.search.run(self.goals, left, self.refinement)

    def _training(self) -> TrainingSet:
        """What a search may train on. InputError where the calibration samples cannot be trained on."""
        from passes.training.data import TrainingSet

        if self.training is not None:
            return self.training
        labels = self.data.labels
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
            labels = None  # no classes: the dense network is what there is to learn from
        try:
            return TrainingSet.of(self.data.feeds, labels)
        except ValueError as error:
            raise InputError(f"{self.data.source}: {self.config.solver} cannot train on it: {error}") from error

    def _device(self) -> str:
        """Where a search trains: on --device, with --train data or without, as recovery does."""
        from passes.training.devices import joined

        with joined(self.config.device or "auto") as group:
            return str(group.device)

    def _limits(self) -> dict[str, float]:
        return {b.metric: b.limit(self.before, self.target.clock_hz) for b in self.config.parsed_budgets}

    def _goal(self, metric: str, unseen: float) -> float:
        """What the price list may say where the emitted files keep the budget.

        A latency that is measured comes out a little differently each time, so half of the noise margin is kept free.
        """
        limit = self.budgets[metric]
        if metric == "latency" and self.before.kind is Kind.MEASURED:
            limit *= 1 - self.target.latency.margin / 2
        return limit - unseen

    def rebase(self, emission: Emission, priced: Cost) -> None:
        """Takes the network as it came for what was measured beside the emitted one: that is the fairer number.

        And where the emitted one, of a price ``priced``, shows that less goes unseen than was thought, that counts.
        """
        if emission.baseline is not None:
            self.before = as_emitted(self.priced_before, emission.baseline)
            self.budgets = self._limits()
        after = as_emitted(priced, emission.cost)
        for metric, unseen in self.unseen.items():
            self.unseen[metric] = min(unseen, after.metric(metric) - priced.metric(metric))

    def reprice(self) -> None:
        """After trials beyond those of the search: the report tells what the list says now."""
        assert self.space is not None
        self.space.reprice()

    def by_price_alone(self) -> None:
        """Takes the price list's view of the network as it came: the emitted files do not tell what they cost."""
        self.before = self.priced_before
        self.budgets = self._limits()
        self.unseen = dict.fromkeys(self.unseen, 0.0)

    def keeps(self, emission: Emission, priced: Cost) -> bool:
        """Whether the emitted files keep all budgets; True where they do not tell what they cost."""
        after = as_emitted(priced, emission.cost)
        return emission.cost is None or all(after.metric(m) <= v * (1 + 1e-9) for m, v in self.budgets.items())

    def adjust(self, emission: Emission, priced: Cost) -> bool:
        """Sets the goals by what the emitted files take beyond their price; False where no other search is due.

        One is due where a budget is missed, and where one is undercut because the rewritten network has less that its
        price does not show than the input has: then the plan gave up more than it had to.
        """
        if emission.cost is None or self.config.plan is not None:
            return False
        after = as_emitted(priced, emission.cost)
        over, loose = {}, {}
        for metric, limit in self.budgets.items():
            value, goal = after.metric(metric), self.goals[metric]
            right = self._goal(metric, value - priced.metric(metric))
            if value > limit * (1 + 1e-9):
                least = self.missed[metric] = min(goal, self.missed.get(metric, math.inf))
                right = min(right, goal - (value - limit))
                held = self.held.get(metric, -math.inf)
                over[metric] = right if right > held else (held + least) / 2
                self.run_events.note(f"the emitted files' {metric} is {value / limit - 1:.2%} over: searching again")
                continue
            most = self.held[metric] = max(goal, self.held.get(metric, goal))
            if metric in self.missed:
                right = min(right, (most + self.missed[metric]) / 2)
            if min(limit - value, right - goal) > _LOOSE * limit:
                loose[metric] = right
        if not over and loose and not self._out_of_time():
            for metric in loose:
                value, limit = after.metric(metric), self.budgets[metric]
                self.run_events.note(f"the emitted files' {metric} is {1 - value / limit:.2%} under: searching again")
            over = loose
        self.goals |= over
        return bool(over)

    def _out_of_time(self) -> bool:
        budget = self.config.time_budget_s
        return budget is not None and time.perf_counter() - self.started > budget

    def _walkable(self) -> Stepper | None:
        """A stepper over the sites, once it has shown that it computes what onnxruntime computes.

        Sets ``feeds``: all samples as one batch where the network takes that, else sample by sample.
        """
        scan = self.network.sites()
        sites, _ = Selection(self.config.include, self.config.exclude).of(scan.sites)
        if all(site.in_body for site in sites):
            return None
        with self.run_events.stage("check the walk"):
            reason = ""
            model, constants = self.network.skeleton()
            for feeds_of in (batched, one_by_one):
                try:
                    stepper = Stepper(model, sites, constants)
                    two = self.data.head(2)
                    reason = walk_disagreement(self.network, stepper, feeds_of(two), two)
                except Exception as error:  # whatever an odd network provokes in torch costs accuracy alone
                    reason = first_line(error)
                if not reason:
                    self.feeds_of = feeds_of
                    return stepper
            self.run_events.warning(
                f"the network cannot be walked layer by layer, factors follow the weights alone: {reason}"
            )
        return None

    def _replayed(self, path: Path) -> Attempt:
        """The attempt that a plan.json describes. InputError where it does not fit the network."""
        assert self.space is not None
        wanted = read_plan(path)
        sites = {site.name: site for site in self.space.sites}
        missing = sorted(set(wanted) - set(sites))
        if missing:
            raise InputError(
                f"{path}: the network has no rewritable layer {missing[0]!r}; the plan is of another network"
            )
        choices = {name: Choice() for name in sites}
        for name, (format, rank) in wanted.items():
            if format == "dense":
                continue
            chosen = registry.FORMATS.load(format)
            full = chosen.full_rank(sites[name].stage)
            if full is None or len(rank) != len(full) or not all(1 <= r <= f for r, f in zip(rank, full, strict=True)):
                raise InputError(f"{path}: {name} cannot be {format} of rank {rank}")
            choices[name] = Choice(chosen, rank)
        problem = self.space.problem(self.budgets, {})
        plan = RankPlan("plan", "feasible", (), math.nan, math.nan, problem.digest())
        return Attempt(plan, problem, choices, self.space.price(choices))
