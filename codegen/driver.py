"""The pipeline, top to bottom.

read -> canonicalize -> sites -> candidates -> price and error -> solve -> factorize -> verify
     -> price the whole network -> (tighten, solve again) -> emit -> (adjust, solve again) -> recover -> emit -> report
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from codegen.checked_passes import CANONICAL, run_checked
from codegen.checkpoint import RunKey, file_sha256
from codegen.config import LowerConfig
from codegen.dataset import Dataset, load
from codegen.emission import Emission, EmissionRequest, as_emitted
from codegen.events import Events, RecordingEvents
from codegen.measurable import MeasurablePrices
from codegen.plan_search import PlanSearch, formats_named, read_plan
from codegen.recovery import Recovery, check_training, output_error
from codegen.report.build import Verification
from codegen.report.numbers import quantity
from codegen.report.recovery import RecoveryReport
from codegen.result import InspectRow, LowerResult
from codegen.results import NO_GAIN, Facts, plan_layers, plan_sha256, write_results
from codegen.search import Attempt
from codegen.space import Selection
from codegen.target import Target, parse_target
from codegen.tune.statistics import Ratio
from codegen.verification import accuracies, verify_written
from codegen.workspace import Workspace, check_output
from passes import registry
from passes.core.cost import Cost
from passes.drop_dead_code import DropDeadCode
from passes.errors import InputError, UnsupportedError, UsageError
from passes.factorize import Factorize
from passes.fuse_pointwise import FusePointwise
from passes.graph import Note
from passes.instruments import DumpIR
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.ranks.candidates import candidates

__all__ = ["CANONICAL", "inspect", "lower"]


_CORRECTIONS = 2
"""How often a plan is searched anew because the emitted files take more, or less, than the price list said."""


Finish = Callable[[Path, dict[str, Any]], dict[str, Any]]
"""What a caller adds to the complete staging folder: takes it and the report, returns the report as it stands then."""


def lower(config: LowerConfig, events: Events, finish: Finish | None = None) -> LowerResult:
    """Carries out one run and writes its output folder, whole or not at all; ``finish`` is part of the whole.

    Raises RankcError for everything that a person can mend; ``missed`` in the result means exit code 3.
    """
    if config.output is None:
        raise UsageError("no output folder: give -o DIR")
    run = RecordingEvents(events)
    _check_names(config)
    check_training(config)
    check_output(config.output, force=config.force, resume=config.resume)
    target = parse_target(config.target).under(config.tuning)
    try:
        return _lower(config, target, run, finish)
    finally:
        target.close()


def _lower(config: LowerConfig, target: Target, run: RecordingEvents, finish: Finish | None) -> LowerResult:
    assert config.output is not None
    for budget in config.parsed_budgets:
        if budget.metric not in target.metrics:
            known = ", ".join(f"--{metric}" for metric in target.metrics)
            raise UsageError(
                f"--{budget.metric}: nothing tells the {budget.metric} of {target.name}; there are {known}"
            )
    with run.stage("read"):
        original = OnnxGraph.read(config.model, config.shapes)
        data = _data(config.calib, original, config)
        evaluation = None if config.eval is None else _labelled(load(config.eval, original.inputs, None))
        recovery = None if config.train is None else Recovery.read(config, original, run)
        if data is None and recovery is not None:
            data = recovery.calibration(original.inputs)
            run.note(f"no --calib data: {len(data)} samples of --train are what factors and ranges are fitted to")
    for note in original.notes:
        run.note(f"{note.node}: {note.reason}")
    digests = _digests(config, original, data, evaluation) | ({} if recovery is None else recovery.digests())
    key = RunKey(config.run_options(), digests, target.versions)
    with (
        threadpool_limits(limits=1, user_api="blas"),  # small products: threads cost more than they bring
        Workspace(config.output, key, force=config.force, resume=config.resume, events=run) as workspace,
    ):
        one = original.random_feeds(config.seed) if data is None else next(iter(data.batches(1)))
        with run.stage("canonicalize"):
            instruments = [] if config.dump_ir is None else [DumpIR(workspace.place(config.dump_ir))]
            network, canonical = run_checked(CANONICAL, original, one, instruments, run)
        if recovery is None:
            target.get_ready()  # what it starts takes a core that the first stages leave idle
        else:
            recovery.check(network)
        emitted = None
        if target.baseline is not None:
            with run.stage("emit the input roughly"):
                emitted = target.baseline(config.model, original.input_shapes, config.seed, run)
        before = target.latency.network(original.workload())  # after its layers were measured, where they are
        search = PlanSearch(config, target, network, data, before, emitted, run)
        search.training = None if recovery is None else recovery.kept()
        draft = recovery is not None
        made = _carry_through(search, original, evaluation, one, instruments, workspace, draft)
        best = made
        for _ in range(_CORRECTIONS):
            kept = search.keeps(made.emission, made.priced)
            out_of_reach = made.found.plan.status == "infeasible" and not kept
            if made.harm or out_of_reach or not search.adjust(made.emission, made.priced):
                break
            made = _carry_through(search, original, evaluation, one, instruments, workspace, draft)
            best = _better(search, best, made)
        if best is not made:
            run.note("the search that followed found nothing better: the plan before it stands")
            made = _emitted(search, original, evaluation, workspace, best, draft)
        if made.emission.cost is None:
            search.by_price_alone()
        made = _unharmful(search, original, evaluation, workspace, made)
        if recovery is not None and not made.harm:
            made = _recovered(search, recovery, made, workspace)
            made = _emitted(search, original, evaluation, workspace, made)
            made = _unharmful(search, original, evaluation, workspace, made)
        accuracy: tuple[float | None, float | None] = (None, None)
        if evaluation is not None:
            with run.stage("evaluate"):
                accuracy = accuracies(config.model, made.paths[0], evaluation, apart=original.is_large)
        assert search.space is not None
        facts = Facts(
            config, target, run, search.space, made.found, search.trace, search.budgets, search.before, made.after,
            made.priced, search.unseen, made.harm, made.check, made.emission, accuracy,
            (*canonical.notes, *made.notes), made.paths, search.data.source, len(search.data),
            errors_bind=_errors_bind(search), recovery=made.recovery, training=recovery.data if recovery else None,
        )  # fmt: skip
        report = write_results(facts, workspace.staging)
        if finish is not None:
            report = finish(workspace.staging, report)
        with run.stage("commit"):
            workspace.commit()
    missed = any(not b["met"] for b in report["budgets"])
    return LowerResult(report, missed, config.output)


@dataclass(frozen=True, eq=False)
class _Made:
    """A plan carried through to the emitted files. ``priced``: the price list's view of ``after``."""

    found: Attempt
    network: OnnxGraph
    priced: Cost
    after: Cost
    harm: str
    check: Verification
    emission: Emission
    notes: tuple[Note, ...]
    paths: tuple[Path, ...]
    recovery: RecoveryReport | None = None


def _carry_through(
    search: PlanSearch,
    original: OnnxGraph,
    evaluation: Dataset | None,
    one: Mapping[str, Any],
    instruments: Sequence[DumpIR],
    workspace: Workspace,
    draft: bool,
) -> _Made:
    """Searches, rewrites, verifies the written file and emits, a ``draft`` where the network is going to be trained."""
    run, target = search.run_events, search.target
    found = search.run(workspace)
    with run.stage("rewrite"):
        factorized = search.network.clone()
        outcome = PassManager([Factorize(found.chains)], instruments).run(factorized)
        metrics = ("latency", *(m for m in search.budgets if m != "latency"))
        tidy = (FusePointwise(target.latency, metrics), DropDeadCode())
        rewritten, tidied = run_checked(tidy, factorized, one, instruments, run)
    if isinstance(target.latency, MeasurablePrices):
        stages = [op.stage for op in rewritten.workload() if op.stage is not None]
        if target.latency.measure(stages, run):
            search.reprice()
    priced = target.latency.network(rewritten.workload())
    harm = _harm(search.priced_before, priced)
    if harm:
        run.warning(harm)
    notes = (*outcome.notes, *tidied.notes)
    made = _Made(found, rewritten, priced, priced, harm, _UNVERIFIED, Emission(), notes, ())
    return _emitted(search, original, evaluation, workspace, made, draft)


def _emitted(
    search: PlanSearch,
    original: OnnxGraph,
    evaluation: Dataset | None,
    workspace: Workspace,
    made: _Made,
    draft: bool = False,
) -> _Made:
    """Writes and verifies the rewritten network, or where it does harm the input, and emits it."""
    run, network, priced = search.run_events, made.network, made.priced
    for name in made.emission.artifacts.values():
        if name:  # of an emission that this one replaces
            (workspace.staging / name).unlink(missing_ok=True)
    if made.harm:
        network, priced = original, search.priced_before
    with run.stage("verify"):
        paths = tuple(network.save(workspace.staging / "model.onnx"))
        check = verify_written(paths[0], network, search.samples(4), walked=search.stepper is not None)
    assert search.space is not None
    plan = "" if made.harm else plan_sha256(plan_layers(search.space.sites, made.found.choices))
    emission = search.target.emit(
        EmissionRequest(
            paths[0], workspace.staging, search.config.model, network.input_shapes, search.samples(4), search.data,
            search.calibrated, evaluation, search.config.seed, run, search.emitted_before, plan,
            draft=draft and not made.harm,
        )
    )  # fmt: skip
    check = replace(check, binary=emission.check)
    after = as_emitted(priced, emission.cost)
    search.rebase(emission, priced)
    return replace(made, priced=priced, after=after, check=check, emission=emission, paths=paths)


def _unharmful(
    search: PlanSearch, original: OnnxGraph, evaluation: Dataset | None, workspace: Workspace, made: _Made
) -> _Made:
    """The same, or where what was emitted is no gain over the input, the input emitted in its place."""
    for_speed = not search.goals or "latency" in search.goals
    harm = _harm(search.before, made.after, made.emission.comparison, for_speed)
    if not harm or made.harm:
        return made
    search.run_events.warning(harm)
    return _emitted(search, original, evaluation, workspace, replace(made, harm=harm, recovery=None))


def _recovered(search: PlanSearch, recovery: Recovery, made: _Made, workspace: Workspace) -> _Made:
    """The settled network with trained weights; as it was where training made it no better. Nothing is emitted."""
    from passes.training.recovery import NotTrainedError

    run, found = search.run_events, made.found
    if all(choice.format is None for choice in found.choices.values()):
        run.note("no recovery: no layer was rewritten")
        return made
    assert search.space is not None
    plan = plan_sha256(plan_layers(search.space.sites, found.choices))
    try:
        network, report = recovery.run(made.network, search.network, workspace.training_of(plan[:16]))
    except (NotTrainedError, UnsupportedError) as error:
        run.warning(f"no recovery: {error}")
        return made
    if not report.best_epoch:
        run.warning("recovery: no epoch was better than the start on held-out samples, which is kept")
        return replace(made, recovery=report)
    distance = output_error(search.network, network, search.data)
    if _errors_bind(search) and distance > search.config.max_error:
        run.warning(
            f"recovery: training took the output error to {distance:.3g}, beyond --max-error: the untrained network is "
            "kept; give a budget to have the accuracy decide"
        )
        return replace(made, recovery=replace(report, best_epoch=0, after=report.before))
    return replace(made, found=replace(found, relative_l2=distance), network=network, recovery=report)


def _better(search: PlanSearch, one: _Made, other: _Made) -> _Made:
    """The one that keeps the budgets; of two that do, the one that loses less; else the ``other``, the later one."""
    if one.found.choices == other.found.choices or one.harm or not search.keeps(one.emission, one.priced):
        return other
    later = not other.harm and search.keeps(other.emission, other.priced)
    return other if later and not other.found.loss >= one.found.loss else one


_UNVERIFIED = Verification(False, None, None, 0)


def inspect(config: LowerConfig, events: Events) -> list[InspectRow]:
    """What a run would do to each conv, linear and recurrent node, and why; computes no plan and writes nothing."""
    graph = OnnxGraph.read(config.model, config.shapes)
    target = parse_target(config.target).under(config.tuning)
    PassManager(CANONICAL).run(graph)
    scan = graph.sites()
    formats = formats_named(config.formats, events)
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
            text = f"{', '.join(names)}; down to {best / dense:.0%} of {quantity(dense, target.latency.unit)}"
            rows.append(InspectRow(site.name, site.op, "rewritable", text))
        else:
            rows.append(InspectRow(site.name, site.op, "kept", NO_GAIN))
    rows += [InspectRow(note.node, note.op, "kept", note.reason) for note in left_out]
    rows += [InspectRow(note.node, note.op, "unsupported", note.reason) for note in scan.kept]
    return rows


def _check_names(config: LowerConfig) -> None:
    """Names are wrong at once or not at all, before anything is read."""
    registry.SOLVERS.load(config.solver)
    for name in config.formats:
        if name != "dense":
            registry.FORMATS.load(name)
    if config.plan is not None:
        read_plan(config.plan)


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


def _errors_bind(search: PlanSearch) -> bool:
    """True where the output error is what limits the ranks: without budgets, and without a plan to replay."""
    return not search.budgets and search.config.plan is None


def _harm(before: Cost, after: Cost, measured: Ratio | None = None, for_speed: bool = True) -> str:
    """Why the rewritten network is no gain; empty when it is one.

    ``measured``: its latency over the input's, from one run of both. It must be a gain beyond noise then where the
    rewriting was ``for_speed``, and no loss beyond noise elsewhere.
    """
    took = f"{quantity(after.latency, after.unit)} where the input takes {quantity(before.latency, before.unit)}"
    if measured is None:
        slower = after.latency > before.latency * (1 + 1e-9)
        return f"the rewritten network would take {took}: the input is kept" if slower else ""
    if measured.loss if not for_speed else not measured.gain:
        interval = f"{measured.low:.3f} to {measured.high:.3f} of it with {measured.confidence:.0%} confidence"
        return f"the rewritten network takes {took}, {interval}: the input is kept"
    return ""
