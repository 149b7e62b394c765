"""The pipeline, top to bottom.

read -> canonicalize -> sites -> candidates -> price and error -> solve -> factorize -> verify
     -> price the whole network -> (tighten, solve again) -> emit -> report
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from codegen.checked_passes import CANONICAL, run_checked
from codegen.checkpoint import RunKey, file_sha256
from codegen.config import LowerConfig
from codegen.dataset import Dataset, load, random_inputs
from codegen.emission import Emission, EmissionRequest
from codegen.events import Events, RecordingEvents
from codegen.memory import Memory
from codegen.report.build import Verification
from codegen.result import InspectRow, LowerResult
from codegen.results import NO_GAIN, Facts, emitted_value, write_results
from codegen.search import Attempt, best_within_budgets, carry_out, fastest_within
from codegen.space import EFFORTS, Selection, Space, build_space, calibration_count
from codegen.target import Target, parse_target
from codegen.verification import accuracies, verify_written, walk_disagreement
from codegen.walks import FeedsOf, batched, one_by_one
from codegen.workspace import Workspace, check_output
from passes import registry
from passes.core.cost import Cost
from passes.correct import Choice, Correction
from passes.drop_dead_code import DropDeadCode
from passes.errors import InputError, UsageError
from passes.factorize import Factorize
from passes.fuse_pointwise import FusePointwise
from passes.graph import Note
from passes.instruments import DumpIR
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Stepper
from passes.ranks.candidates import candidates
from passes.ranks.problem import RankPlan

__all__ = ["CANONICAL", "inspect", "lower"]


_CORRECTIONS = 2
"""How often a plan is searched anew because the emitted program takes more than the price list said."""


def lower(config: LowerConfig, events: Events) -> LowerResult:
    """Carries out one run and writes its output folder, whole or not at all.

    Raises RankcError for everything that a person can mend; ``missed`` in the result means exit code 3.
    """
    if config.output is None:
        raise UsageError("no output folder: give -o DIR")
    run = RecordingEvents(events)
    _check_names(config)
    check_output(config.output, force=config.force, resume=config.resume)
    target = parse_target(config.target)
    with run.stage("read"):
        original = OnnxGraph.read(config.model, config.shapes)
        data = _data(config.calib, original, config)
        evaluation = None if config.eval is None else _labelled(load(config.eval, original.inputs, None))
    for note in original.notes:
        run.note(f"{note.node}: {note.reason}")
    key = RunKey(config.run_options(), _digests(config, original, data, evaluation), target.versions)
    with (
        threadpool_limits(limits=1, user_api="blas"),  # small products: threads cost more than they bring
        Workspace(config.output, key, force=config.force, resume=config.resume, events=run) as workspace,
    ):
        one = original.random_feeds(config.seed) if data is None else next(iter(data.batches(1)))
        with run.stage("canonicalize"):
            instruments = [] if config.dump_ir is None else [DumpIR(workspace.place(config.dump_ir))]
            network, canonical = run_checked(CANONICAL, original, one, instruments, run)
        before = target.latency.network(original.workload())
        search = _Search(config, target, network, data, before, run)
        made = _carry_through(search, original, evaluation, one, instruments, workspace)
        for _ in range(_CORRECTIONS):
            if made.harm or not search.tighten(made.emission):
                break
            made = _carry_through(search, original, evaluation, one, instruments, workspace)
        accuracy: tuple[float | None, float | None] = (None, None)
        if evaluation is not None:
            with run.stage("evaluate"):
                accuracy = accuracies(config.model, made.paths[0], evaluation, apart=original.is_large)
        assert search.space is not None
        facts = Facts(
            config, target, run, search.space, made.found, search.trace, search.budgets, before, made.after, made.harm,
            made.check, made.emission, accuracy, (*canonical.notes, *made.notes), made.paths, search.data.source,
            len(search.data), errors_bind=not search.budgets and config.plan is None,
        )  # fmt: skip
        report = write_results(facts, workspace.staging)
        with run.stage("commit"):
            workspace.commit()
    missed = any(not b["met"] for b in report["budgets"])
    return LowerResult(report, missed, config.output)


@dataclass(frozen=True, eq=False)
class _Made:
    """A plan carried through to the emitted files."""

    found: Attempt
    after: Cost
    harm: str
    check: Verification
    emission: Emission
    notes: tuple[Note, ...]
    paths: tuple[Path, ...]


def _carry_through(
    search: _Search,
    original: OnnxGraph,
    evaluation: Dataset | None,
    one: Mapping[str, Any],
    instruments: Sequence[DumpIR],
    workspace: Workspace,
) -> _Made:
    """Searches, rewrites, verifies the written file and emits."""
    run, target, network = search.run_events, search.target, search.network
    found = search.run(workspace)
    with run.stage("rewrite"):
        factorized = network.clone()
        outcome = PassManager([Factorize(found.chains)], instruments).run(factorized)
        metrics = ("latency", *(m for m in search.budgets if m != "latency"))
        tidy = (FusePointwise(target.latency, metrics), DropDeadCode())
        rewritten, tidied = run_checked(tidy, factorized, one, instruments, run)
        after = target.latency.network(rewritten.workload())
        harm = _harm(search.before, after)
        if harm:
            run.warning(harm)
            rewritten, after = original, search.before
    with run.stage("verify"):
        paths = tuple(rewritten.save(workspace.staging / "model.onnx"))
        check = verify_written(paths[0], rewritten, search.samples(4), walked=search.stepper is not None)
    emission = target.emit(
        EmissionRequest(
            paths[0], workspace.staging, search.config.model, rewritten.input_shapes, search.samples(4), search.data,
            search.calibrated, evaluation, search.config.seed, run,
        )
    )  # fmt: skip
    check = replace(check, binary=emission.check)
    return _Made(found, after, harm, check, emission, (*outcome.notes, *tidied.notes), paths)


def inspect(config: LowerConfig, events: Events) -> list[InspectRow]:
    """What a run would do to each conv, linear and recurrent node, and why; computes no plan and writes nothing."""
    graph = OnnxGraph.read(config.model, config.shapes)
    target = parse_target(config.target)
    PassManager(CANONICAL).run(graph)
    scan = graph.sites()
    formats = _formats(config.formats, events)
    sites, left_out = Selection(config.include, config.exclude).of(scan.sites)
    chosen = {site.name for site in sites}
    found = candidates(sites, formats, target.latency, dict.fromkeys(chosen, 4), margin=config.margin)
    rows = []
    for site in scan.sites:
        if site.name not in chosen:
            continue
        names = sorted({c.name for c in found[site.name][1:]})
        if names:
            best = min(c.cost.latency for c in found[site.name])
            dense = found[site.name][0].cost.latency
            text = f"{', '.join(names)}; down to {best / dense:.0%} of {dense:.0f} {target.latency.unit}"
            rows.append(InspectRow(site.name, site.op, "rewritable", text))
        else:
            rows.append(InspectRow(site.name, site.op, "kept", NO_GAIN))
    rows += [InspectRow(note.node, note.op, "kept", note.reason) for note in left_out]
    rows += [InspectRow(note.node, note.op, "unsupported", note.reason) for note in scan.kept]
    return rows


def _formats(names: Sequence[str], events: Events) -> dict[str, Any]:
    """Formats by name; all there are without names, and then a note for each that cannot be loaded."""
    if not names:
        found, broken = registry.FORMATS.load_all()
        for note in broken:
            events.note(f"{note.node}: {note.reason}")
        return found
    return {name: registry.FORMATS.load(name) for name in names if name != "dense"}


def _check_names(config: LowerConfig) -> None:
    """Names are wrong at once or not at all, before anything is read."""
    registry.SOLVERS.load(config.solver)
    for name in config.formats:
        if name != "dense":
            registry.FORMATS.load(name)
    if config.plan is not None:
        _read_plan(config.plan)


def _read_plan(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Format and rank by layer. InputError where the file is no plan."""
    try:
        layers = json.loads(path.read_text())["layers"]
        return {layer["name"]: (str(layer["choice"]), tuple(int(r) for r in layer["rank"])) for layer in layers}
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a plan: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no plan; give the plan.json of an earlier run") from error


def _data(source: str | None, graph: OnnxGraph, config: LowerConfig) -> Dataset | None:
    return None if source is None else load(source, graph.inputs, config.samples)


def _labelled(data: Dataset) -> Dataset:
    if data.labels is None:
        raise InputError(f"{data.source}: holds no 'labels'; --eval data needs the class of each sample")
    return data


def _digests(
    config: LowerConfig, network: OnnxGraph, data: Dataset | None, evaluation: Dataset | None
) -> dict[str, str]:
    """Of everything that the run has read: files by their content, data sets by what was taken from them."""
    files = {"model": config.model, **config.input_files()}
    files |= {f"model's {path.name}": path for path in network.data_files}
    sets = {name: given.digest() for name, given in (("calib", data), ("eval", evaluation)) if given is not None}
    return {name: file_sha256(path) for name, path in files.items() if name not in sets} | sets


class _Search:
    """The rank search of one run: what it works on, and the plan that it ends with."""

    def __init__(
        self,
        config: LowerConfig,
        target: Target,
        network: OnnxGraph,
        data: Dataset | None,
        before: Cost,
        run: RecordingEvents,
    ) -> None:
        self.config, self.target, self.network, self.run_events = config, target, network, run
        self.effort = EFFORTS[config.effort]
        self.margin = target.latency.margin if config.margin is None else config.margin
        self.before = before
        self.started = time.perf_counter()
        self.budgets = {b.metric: b.limit(before, target.clock_hz) for b in config.parsed_budgets}
        self.goals = dict(self.budgets)
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
        self.correction = Correction(elements=self.effort.elements, sweeps=self.effort.sweeps, seed=config.seed)
        self.stepper: Stepper | None = None
        self.feeds_of: FeedsOf = batched

    def samples(self, count: int) -> list[Mapping[str, Any]]:
        """Up to ``count`` single inferences of the data."""
        return list(self.data.head(count).batches(1))

    def run(self, workspace: Memory) -> Attempt:
        """The best attempt; its chains are ready to be put into the network."""
        solver = registry.SOLVERS.load(self.config.solver)
        self.stepper = self._walkable()
        feeds = None if self.stepper is None else self.feeds_of(self.data)
        config = self.config
        self.space = build_space(
            self.network,
            self.target.latency,
            _formats(config.formats, self.run_events),
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
        if self.config.plan is not None:
            attempt = self._replayed(self.config.plan)
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
            )
            return attempt
        elif self.stepper is None:
            raise InputError(
                f"{self.config.model}: without a budget the error of the output is what limits the ranks, and this "
                "network cannot be walked layer by layer; give a budget such as --latency 60%"
            )
        else:
            assert feeds is not None
            attempt, self.trace = fastest_within(
                self.space, solver, config.max_error, self.stepper, feeds, correction, self.effort, self.run_events
            )
            return attempt
        return carry_out(attempt, self.space, self.stepper, feeds, correction, self.run_events)

    def tighten(self, emission: Emission) -> bool:
        """Lowers the goals by what the emitted files take beyond the budgets; False where they keep them all."""
        over = False
        for metric, limit in self.budgets.items():
            value = emitted_value(emission, metric)
            if self.config.plan is None and value is not None and value > limit * (1 + 1e-9):
                self.goals[metric] *= limit / value * (1 - 1e-6)
                self.run_events.note(f"the emitted program's {metric} is {value / limit - 1:.2%} over: searching again")
                over = True
        return over

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
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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
        wanted = _read_plan(path)
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


def _harm(before: Cost, after: Cost) -> str:
    """Why the rewritten network is no gain; empty when it is one."""
    if after.latency > before.latency * (1 + 1e-9):
        return (
            f"the rewritten network would take {after.latency:.0f} {after.unit} where the input takes "
            f"{before.latency:.0f}: the input is kept"
        )
    return ""
