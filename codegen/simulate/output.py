"""The folder that a simulation writes, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accel_sim.program.container import write_program
from accel_sim.program.listing import write_listing
from codegen.simulate.html import to_html
from codegen.simulate.plots import roofline_svg, sweep_svg
from codegen.simulate.report import to_csv, to_dict, to_json
from codegen.simulate.run import Outcome
from passes.errors import InputError, UsageError

REPORT, LAYERS, PAGE = "simulation.json", "layers.csv", "simulation.html"
PROGRAM, LISTING, TRACE = "program.bin", "program.lst", "trace.json"
ROOFLINE, SWEEP, OUTPUTS = "roofline.svg", "sweep.svg", "outputs.npz"

_TRACED_INSTRUCTIONS = 50_000
"""A trace of more is no picture that a browser opens."""


def check_folder(folder: Path, *, force: bool) -> None:
    """Refuses a folder before any work is done. UsageError, InputError."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file, -o takes a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise UsageError(f"{folder}: is not empty; --force replaces it")
        foreign = _foreign(folder)
        if foreign is not None:
            raise UsageError(
                f"{folder}: holds {foreign!r}, which is no result of rankc simulate; choose another folder"
            )
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise InputError(f"{folder}: cannot be created: {parent} is no folder that can be written")


def _foreign(folder: Path) -> str | None:
    """An entry of ``folder`` that its report does not name, or None."""
    names = {entry.name for entry in folder.iterdir()}
    try:
        artifacts = json.loads((folder / REPORT).read_bytes())["artifacts"]
        return min(names - {Path(path).parts[0] for path in artifacts.values()}, default=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return min(names)  # without a readable report this is nobody's result


def write_folder(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Writes everything and gives the report with its artifacts. InputError where the disk refuses."""
    target = folder.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            report = _write(outcome, staging)
            staging.chmod(0o777 & ~_umask())
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    return report


def _write(outcome: Outcome, folder: Path) -> dict[str, Any]:
    artifacts = {"report": REPORT, "layers": LAYERS, "page": PAGE}
    several = len(outcome.simulations) > 1
    for number, simulation in enumerate(outcome.simulations):
        if simulation.program is None or simulation.run is None:
            continue
        name = simulation.machine.name
        part = f"{number + 1}_{re.sub(r'[^A-Za-z0-9_.=-]+', '_', name)}" if several else ""
        place = folder / part
        place.mkdir(exist_ok=True)
        written = {"program": PROGRAM, "listing": LISTING}
        write_program(simulation.program, place / PROGRAM)
        write_listing(simulation.program, place / LISTING, simulation.spec, data=False)
        if len(simulation.program.code) <= _TRACED_INSTRUCTIONS:
            (place / TRACE).write_text(simulation.run.chrome_trace(), encoding="utf-8")
            written["trace"] = TRACE
        for kind, file in written.items():
            artifacts[f"{kind} {name}" if several else kind] = f"{part}/{file}" if several else file
    if outcome.outputs is not None:
        arrays: Any = outcome.outputs.values
        np.savez(folder / OUTPUTS, **arrays)
        artifacts["outputs"] = OUTPUTS
    pictures: Mapping[str, Any] = to_dict(outcome, artifacts)
    drawn = roofline_svg(pictures["machines"][0])
    if drawn:
        (folder / ROOFLINE).write_text(drawn + "\n", encoding="utf-8")
        artifacts["roofline"] = ROOFLINE
    if pictures["sweep"] is not None:
        (folder / SWEEP).write_text(sweep_svg(pictures["sweep"]) + "\n", encoding="utf-8")
        artifacts["sweep"] = SWEEP
    report = to_dict(outcome, artifacts)
    timelines = [None if s.run is None else s.run.timeline() for s in outcome.simulations]
    (folder / PAGE).write_text(to_html(report, timelines), encoding="utf-8")
    (folder / LAYERS).write_text(to_csv(report), encoding="utf-8")
    (folder / REPORT).write_text(to_json(report), encoding="utf-8")
    return report


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
