"""What ``rankc simulate`` was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from codegen.simulate.machine import Machine, parse_machine
from codegen.simulate.sweep import Axis
from passes.errors import UsageError


@dataclass(frozen=True)
class SimulateConfig:
    """``model``: a network (.onnx, floats or QDQ) or a program (program.bin).

    ``shapes`` binds inputs with symbolic dimensions. ``calibration`` and ``inputs`` are data as
    :mod:`codegen.dataset_files` reads them: the first gives a network of floats its ranges, the second is run with
    values. ``axes``: what a sweep changes. ``price_list``: prices alone, no program. ``layer_by_layer``: no map stays
    on chip between two layers. UsageError where options do not fit each other.
    """

    model: Path
    machines: tuple[Machine, ...] = field(default_factory=lambda: (parse_machine("asic"),))
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    calibration: str | None = None
    samples: int | None = 64
    inputs: str | None = None
    axes: tuple[Axis, ...] = ()
    price_list: bool = False
    layer_by_layer: bool = False
    seed: int = 0
    output: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        written = [machine.written for machine in self.machines]
        if len(set(written)) < len(written):
            raise UsageError(f"--target {max(written, key=written.count)} is given twice")
        if self.axes and len(self.machines) > 1:
            raise UsageError("--sweep changes one machine: give one --target")
        if self.price_list and self.inputs is not None:
            raise UsageError("--inputs needs a program to run: leave --price-list out")

    @property
    def is_program(self) -> bool:
        """Whether the model is a program and no network."""
        return self.model.suffix == ".bin"
