"""The pipeline of ``rankc tune``: networks to workloads, workloads to trials, trials to a report."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from codegen.events import Events, RecordingEvents
from codegen.target import split_target
from codegen.tune import spaces
from codegen.tune.database import Database
from codegen.tune.device import Device
from codegen.tune.measuring import Measurer
from codegen.tune.options import TuningOptions
from codegen.tune.proposals import Proposer, TemplateProposer
from codegen.tune.record import Record
from codegen.tune.tuner import Outcome, Stopping, Summary, Tuner
from codegen.tune.workload import Workload
from passes.errors import InputError, UnsupportedError, UsageError

SCHEMA_VERSION = 1
SPACES = ("templates", "metaschedule", "evolutionary")


@dataclass(frozen=True)
class TuneConfig:
    """``models``: networks (.onnx) whose conv and linear layers are tuned; none: only ``merge`` and ``compact``.

    ``shapes`` binds inputs with symbolic dimensions. ``space``: where schedules come from, one of :data:`SPACES`.
    ``patience``: trials without a gain after which a layer has enough, None for half of its trials. ``merge``:
    databases whose trials are taken over first; ``compact``: how many trials of a layer are kept in the end.
    """

    models: tuple[Path, ...]
    database: Path
    target: str = "cpu"
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trials: int = 8
    patience: int | None = None
    time_budget_s: float | None = None
    space: str = SPACES[0]
    seed: int = 0
    rpc: str | None = None
    rpc_key: str | None = None
    merge: tuple[Path, ...] = ()
    compact: int | None = None

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise UsageError(f"--space {self.space!r}: there are {', '.join(SPACES)}")
        if (self.rpc is None) != (self.rpc_key is None):
            raise UsageError("--rpc and --rpc-key belong together")


def tune(config: TuneConfig, events: Events) -> dict[str, Any]:
    """Carries out what ``config`` asks for; the report as ``schema.json`` describes it.

    Raises RankcError where that cannot be done, UnsupportedError where every trial of every layer broke.
    """
    started = time.monotonic()
    watched = RecordingEvents(events)
    device = tunable_device(config.target)
    layers = _layers(config, watched)
    database = Database(config.database, warn=watched.warning)
    merged = database.merge(config.merge) if config.merge else 0
    tunable = [workload for workload in layers if spaces.templates(workload, device)]
    summary = Summary((), True)
    if tunable:
        with _proposer(config, device, database) as proposer, _measurer(config, device, watched) as measurer:
            stopping = Stopping(config.trials, config.patience)
            summary = Tuner(database, measurer, proposer).tune(
                tunable, stopping, watched, _clock(started, config.time_budget_s)
            )
    if summary.outcomes and len(summary.unusable) == len(summary.outcomes):
        raise UnsupportedError(f"every trial of every layer broke; the first: {summary.outcomes[0].error}")
    if not summary.complete:
        few = [o for o in summary.outcomes if o.ended == "time"]
        watched.warning(f"time was up: {len(few)} of {len(summary.outcomes)} kernels had fewer trials than they may")
    dropped = database.compact(config.compact) if config.compact is not None else 0
    return _report(config, device, database, layers, summary, watched, {"merged": merged, "dropped": dropped})


def tunable_device(target: str) -> Device:
    """The device of a target as on the command line; UsageError for one whose layers have no kernels to tune."""
    head, options = split_target(target)
    if head == "cpu":
        from codegen.cpu_device import device_for

        return device_for(options)
    raise UsageError(f"--target {target}: only cpu has kernels to tune, such as cpu or cpu:threads=2")


def _layers(config: TuneConfig, events: Events) -> Counter[Workload]:
    """The networks' workloads in the order in which they stand there, with how many layers are one."""
    from passes.onnx_graph import OnnxGraph

    found: Counter[Workload] = Counter()
    for path in config.models:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.suffix != ".onnx":
            raise UsageError(f"{path}: give a network (.onnx)")
        with events.stage(f"read {path.name}"):
            ops = OnnxGraph.read(path, config.shapes).workload()
        works = [Workload.of(op.stage) for op in ops if op.stage is not None]
        if not works:
            events.warning(f"{path}: has no conv or linear layer")
        found.update(works)
    return found


@contextmanager
def _measurer(config: TuneConfig, device: Device, events: Events) -> Iterator[Measurer]:
    from codegen.cpu_trials import measurer_of
    from codegen.farm.measurer import FarmMeasurer

    make = measurer_of(device, TuningOptions(rpc=config.rpc, rpc_key=config.rpc_key))
    if make is None:
        raise UsageError(
            f"--target {config.target}: this host does not run its code; measure on a farm of such devices: "
            "--rpc HOST:PORT --rpc-key KEY"
        )
    measurer = make()
    farm = measurer if isinstance(measurer, FarmMeasurer) else None
    if farm is not None:
        farm.watch(events.warning)
    try:
        yield measurer
    finally:
        for line in farm.summary().lines() if farm is not None else ():
            events.note(line)
        measurer.close()


@contextmanager
def _proposer(config: TuneConfig, device: Device, database: Database) -> Iterator[Proposer]:
    proposer: Proposer
    if config.space == "templates":
        proposer = TemplateProposer(device, spaces, seed=config.seed)
    else:
        from codegen.tune.metaschedule import MetaScheduleProposer

        proposer = MetaScheduleProposer(device, spaces, evolutionary=config.space == "evolutionary", seed=config.seed)
    try:
        yield proposer
    finally:
        proposer.close()


def _clock(started: float, budget_s: float | None) -> Callable[[], bool]:
    return lambda: budget_s is not None and time.monotonic() - started >= budget_s


def _report(
    config: TuneConfig,
    device: Device,
    database: Database,
    layers: Counter[Workload],
    summary: Summary,
    events: RecordingEvents,
    changes: dict[str, int],
) -> dict[str, Any]:
    from codegen.report.build import tool_versions

    records = database.records()
    tuned = {outcome.workload for outcome in summary.outcomes}
    rows = [_row(outcome, layers[outcome.workload]) for outcome in summary.outcomes]
    report = {
        "schema": SCHEMA_VERSION,
        "tool": tool_versions(),
        "models": [{"path": str(path), "sha256": _sha256(path)} for path in config.models],
        "target": {"name": config.target, "spec": {**vars(device)}},
        "options": {
            "trials": config.trials,
            "space": config.space,
            "seed": config.seed,
            "time_budget_s": config.time_budget_s,
            "rpc": config.rpc,
        },
        "kinds": {"seconds": "measured", "macs": "measured"},
        "database": {
            "path": str(config.database),
            "versions": database.versions,
            "schedules": len(records),
            "broken": sum(record.seconds is None for record in records),
            **changes,
        },
        "complete": summary.complete,
        "workloads": rows,
        "without_template": [
            {"workload": workload.key, "layers": count} for workload, count in layers.items() if workload not in tuned
        ],
        "totals": {
            "default_s": _total(rows, "default_s"),
            "best_s": _total(rows, "best_s"),
            "measured": summary.measured,
            "trials": sum(outcome.trials for outcome in summary.outcomes),
            "broken": summary.broken,
        },
        "timings": dict(events.timings),
        "warnings": list(events.warnings),
    }
    plain: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    jsonschema.validate(plain, schema())
    return plain


def _row(outcome: Outcome, layers: int) -> dict[str, Any]:
    best, default = outcome.best, outcome.default
    return {
        "workload": outcome.workload.key,
        "layers": layers,
        "macs": outcome.workload.work.macs,
        "default_s": None if default is None else default.seconds,
        "best_s": None if best is None else best.seconds,
        "p10_s": None if best is None else best.p10,
        "median_s": None if best is None else best.median,
        "flops_per_s": rate(best),
        "schedule": None if best is None else best.schedule.to_json(),
        "trials": outcome.trials,
        "measured": outcome.measured,
        "broken": outcome.broken,
        "error": outcome.error,
        "ended": outcome.ended,
    }


def rate(record: Record | None) -> float | None:
    """FLOPs a second (two for a multiply-add); None for a broken trial or none."""
    if record is None or not record.seconds:
        return None
    return 2.0 * Workload.parse(record.workload).work.macs / record.seconds


def _total(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Over all layers; None where one is missing."""
    if not rows or any(row[name] is None for row in rows):
        return None
    return float(sum(row["layers"] * row[name] for row in rows))


def listing(database: Database) -> list[dict[str, Any]]:
    """Everything in a database, a row per workload, device and versions, in the order of their names."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in database.records():
        groups.setdefault((record.device, record.versions, record.workload), []).append(record)
    rows = []
    for (device, versions, workload), records in sorted(groups.items()):
        timed = [record for record in records if record.seconds is not None]
        best = min(timed, key=lambda record: record.seconds or 0.0, default=None)
        rows.append(
            {
                "device": device,
                "versions": versions,
                "workload": workload,
                "best_s": None if best is None else best.seconds,
                "flops_per_s": rate(best),
                "schedule": None if best is None else best.schedule.to_json(),
                "trials": len(records),
                "broken": len(records) - len(timed),
            }
        )
    return rows


@cache
def schema() -> dict[str, Any]:
    """The published schema of the report."""
    text = resources.files("codegen.tune").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
