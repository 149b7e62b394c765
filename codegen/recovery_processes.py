"""Recovery in several processes of this machine: torchrun's agent, its workers, and files between them and this one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codegen.child_process import child_environment
from codegen.report.recovery import EpochRow, RecoveryReport
from codegen.space import cores
from passes.errors import InputError, RankcError, UnsupportedError, UsageError, VerificationError
from passes.onnx_graph import OnnxGraph

if TYPE_CHECKING:  # torch is loaded by those who train
    from codegen.recovery import Job, Watching

REQUEST, PROGRESS, RESULT = "request.json", "progress.jsonl", "result.json"
STUDENT, TEACHER, TRAINED, LABELS = "student.onnx", "teacher.onnx", "trained.onnx", "labels.npy"

_POLL_S, _STOP_S = 0.2, 60.0

_AGENT = (
    "from codegen.child_process import end_with_parent; end_with_parent(); "
    "from torch.distributed.run import main; main()"
)


def train_apart(
    rewritten: OnnxGraph, dense: OnnxGraph, job: Job, folder: Path, processes: int, watch: Watching
) -> tuple[OnnxGraph, RecoveryReport]:
    """:meth:`codegen.recovery.Recovery.run` in ``processes`` processes; ``folder`` keeps the checkpoint.

    The same errors for what a process found unusable, RankcError where one failed in another way. An interrupt stops
    them first, with their state saved.
    """
    with tempfile.TemporaryDirectory(prefix="rankc-") as name:
        place = Path(name)
        _write(place, rewritten, dense, job, folder)
        with (place / "log").open("wb") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the others once and in order.
            agent = subprocess.Popen(
                [sys.executable, "-P", "-c", _AGENT, "--standalone", f"--nproc-per-node={processes}", "-m",
                 "codegen.recovery_child", str(place)],
                env=child_environment({"OMP_NUM_THREADS": str(max(cores() // processes, 1)), "PYTHONSAFEPATH": "1"}),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                _follow(agent, place / PROGRESS, watch)
            finally:
                _stop(agent)
        result = place / RESULT
        found: dict[str, Any] = json.loads(result.read_bytes()) if result.is_file() else {}
        if "error" in found:
            raise error_of(found)
        if agent.returncode or "report" not in found:
            tail = (place / "log").read_text(errors="replace").strip().splitlines()
            raise RankcError(f"training in {processes} processes failed: {tail[-1] if tail else 'no message'}")
        report = _report(found["report"])
        return (OnnxGraph.read(place / TRAINED, rewritten.input_shapes) if report.best_epoch else rewritten), report


def error_of(result: Mapping[str, str]) -> RankcError:
    """The error that a process wrote into its result."""
    return _kinds()[result["kind"]](result["error"])


def kind_of(error: RankcError) -> str:
    """The name by which the other process knows what kind of error it is."""
    return next(name for name, kind in _kinds().items() if isinstance(error, kind))


def _kinds() -> dict[str, type[RankcError]]:
    """From the special to the general, by name: a recovery goes on without training after the first two."""
    from passes.training.recovery import NotTrainedError

    kinds = (NotTrainedError, UnsupportedError, InputError, UsageError, VerificationError, RankcError)
    return {kind.__name__: kind for kind in kinds}


def _write(place: Path, rewritten: OnnxGraph, dense: OnnxGraph, job: Job, folder: Path) -> None:
    rewritten.save(place / STUDENT)
    dense.save(place / TEACHER)
    for index, x in enumerate(job.data.inputs.values()):
        np.save(place / f"{index}.npy", x.numpy(), allow_pickle=False)
    if job.data.labels is not None:
        np.save(place / LABELS, job.data.labels.numpy(), allow_pickle=False)
    options = dataclasses.asdict(job.options)
    request = {
        "source": job.source,
        "inputs": list(job.data.inputs),
        "shapes": {name: list(shape) for name, shape in rewritten.input_shapes.items()},
        "options": options,
        "device": job.device,
        "folder": str(folder),
    }
    (place / REQUEST).write_text(json.dumps(request), encoding="utf-8")


def _follow(agent: subprocess.Popen[bytes], path: Path, watch: Watching) -> None:
    """Passes on what the leading process writes, until all have ended."""
    from passes.training.progress import Epoch, Step

    at, running = 0, True
    while running:
        running = agent.poll() is None
        if running:
            time.sleep(_POLL_S)
        if not path.is_file():
            continue
        with path.open("rb") as file:
            file.seek(at)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        at += len(whole)
        for line in whole.splitlines():
            kind, content = json.loads(line)
            if kind == "step":
                watch.step(Step(**content))
            elif kind == "epoch":
                watch.epoch(Epoch(**content))
            elif kind == "start":
                watch.start(**content)
            else:
                watch.note(content)


def _stop(agent: subprocess.Popen[bytes]) -> None:
    """Ends the agent and with it the workers: first so that they save their state, then at once."""
    if agent.poll() is None:
        agent.send_signal(signal.SIGTERM)
        try:
            agent.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


def _report(found: dict[str, Any]) -> RecoveryReport:
    curve = tuple(EpochRow(**row) for row in found.pop("curve"))
    return RecoveryReport(
        **{**found, "aligned": tuple(found["aligned"]), "normalized": tuple(found["normalized"])}, curve=curve
    )
