"""A network's binary for this processor with the best schedules that a database of trials has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from codegen.cpu_device import device_for
from codegen.tune.database import Database
from codegen.tvm_build import Binary, NoBinary, build
from passes.errors import UnsupportedError
from passes.onnx_graph import OnnxGraph


def tuned_build(
    model: Path, database: Path | None, library: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Binary:
    """Compiles ``model`` to ``library`` for one thread of this host. UnsupportedError where TVM cannot.

    Without a ``database`` every kernel has the schedule that needs no trial.
    """
    device = device_for({})
    schedules = {} if database is None else Database(database).schedules(device)
    shapes = OnnxGraph.read(model).input_shapes if shapes is None else shapes
    made = build(model, library, shapes, device=device, schedules=schedules, bind=True)
    if isinstance(made, NoBinary):
        raise UnsupportedError(f"{model.name}: {made.reason}")
    return made
