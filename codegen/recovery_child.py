"""One of the processes that share a recovery: ``torchrun -m codegen.recovery_child FOLDER``; the first one speaks."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from codegen.child_process import end_with_parent
from codegen.recovery import train
from codegen.recovery_processes import LABELS, PROGRESS, REQUEST, RESULT, STUDENT, TEACHER, TRAINED, kind_of
from codegen.training_data import augmentation
from passes.errors import RankcError
from passes.onnx_graph import OnnxGraph
from passes.onnx_module import to_trainable
from passes.training.data import TrainingSet
from passes.training.devices import joined
from passes.training.options import TrainingOptions
from passes.training.progress import Epoch, Step
from passes.training.recovery import RecoveryOptions


def main(place: Path) -> int:
    """0 where training came to its end, 1 otherwise; the reason is in the result file."""
    request: dict[str, Any] = json.loads((place / REQUEST).read_bytes())
    with joined(request["device"]) as group, (place / PROGRESS).open("a", encoding="utf-8") as file:
        teller = Teller(file if group.leads else None)
        try:
            network, report = _train(place, request, group, teller)
        except RankcError as error:
            if group.leads:
                result = {"error": str(error), "kind": kind_of(error)}
                (place / RESULT).write_text(json.dumps(result), encoding="utf-8")
            return 1
        if group.leads:
            network.save(place / TRAINED)
            (place / RESULT).write_text(json.dumps({"report": asdict(report)}), encoding="utf-8")
    return 0


def _train(place: Path, request: dict[str, Any], group: Any, teller: Teller) -> Any:
    shapes = {name: tuple(shape) for name, shape in request["shapes"].items()}
    student, dense = (OnnxGraph.read(place / name, shapes) for name in (STUDENT, TEACHER))
    arrays = {name: np.load(place / f"{index}.npy", allow_pickle=False) for index, name in enumerate(request["inputs"])}
    labels = np.load(place / LABELS, allow_pickle=False) if (place / LABELS).is_file() else None
    recipe = TrainingOptions(**request["options"].pop("training"))
    options = RecoveryOptions(recipe, **request["options"])
    augment = augmentation(request["source"], recipe.augment)
    data = TrainingSet.of(arrays, labels)
    return train(student, to_trainable(dense), data, augment, options, Path(request["folder"]), group, teller)


class Teller:
    """Writes what happens to a file that the parent reads; nothing without one."""

    def __init__(self, file: TextIO | None) -> None:
        self.file = file

    def start(self, measure: str, before: float, dense: float | None) -> None:
        self._tell("start", {"measure": measure, "before": before, "dense": dense})

    def step(self, step: Step) -> None:
        self._tell("step", asdict(step))

    def epoch(self, epoch: Epoch) -> None:
        self._tell("epoch", asdict(epoch))

    def note(self, text: str) -> None:
        self._tell("note", text)

    def _tell(self, kind: str, content: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps([kind, content]) + "\n")
            self.file.flush()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1])))
