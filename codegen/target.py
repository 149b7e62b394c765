"""Targets and the way they are written: ``asic``, ``asic:rows=32,sram_kib=256``, ``my_chip.toml``.

A target brings its description, its price list and its emitter; nothing else asks for its name. Other distributions add
targets through entry points:

    [project.entry-points."rankc.targets"]
    my_target = "my_package.my_target:MyTarget"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accel_sim.spec_file import presets
from codegen.emission import Emission, EmissionRequest
from codegen.events import Events
from codegen.tune.options import TuningOptions
from passes.core.cost import METRICS, Cost, LatencyModel
from passes.errors import UsageError
from passes.registry import Registry

Emitter = Callable[[EmissionRequest], Emission]

Baseline = Callable[[Path, Mapping[str, tuple[int, ...]], int, Events], Cost | None]
"""(model, concrete input shapes, seed, events) -> what the files emitted for it would cost; None: no telling."""


def _nothing() -> None:
    pass


def _nothing_left() -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Target:
    """A resolved target. ``name`` as it was written; ``spec`` as JSON values; ``latency`` its price list.

    ``clock_hz`` converts between cycles and seconds, None where there is no one clock. ``versions``: package -> version
    of everything that can change a result on it. ``baseline``: what the emitted files of the network as it came would
    cost, where such files have a cost of their own. ``metrics``: what budgets may limit. ``tuned``: the same target
    under a run's options of tuning, None for one that is not tuned. ``get_ready`` starts one more of the things that
    ``emit`` is going to need and that are slow to start; False where none is left. ``close`` ends what is running.
    """

    name: str
    spec: dict[str, Any]
    latency: LatencyModel
    emit: Emitter
    clock_hz: float | None
    versions: dict[str, str]
    baseline: Baseline | None = None
    metrics: tuple[str, ...] = METRICS
    tuned: Callable[[TuningOptions], Target] | None = None
    get_ready: Callable[[], bool] = _nothing_left
    close: Callable[[], None] = _nothing

    def under(self, options: TuningOptions) -> Target:
        """The target of a run with these options. UsageError for options of tuning where nothing is tuned."""
        if self.tuned is not None:
            return self.tuned(options)
        if options.named:
            raise UsageError(f"{', '.join(options.named)}: the target {self.name} is not tuned")
        return self


class TargetMaker(Protocol):
    """What is registered under a target's name."""

    name: str

    def make(self, written: str, options: Mapping[str, str]) -> Target:
        """The target ``written`` as on the command line, with its ``options``; UsageError for one that is none."""
        ...


TARGETS: Registry[TargetMaker] = Registry(
    "target",
    "rankc.targets",
    {
        "asic": "codegen.asic_target:AsicTarget",
        "cpu": "codegen.cpu_target:CpuTarget",
        "cuda": "codegen.cuda_target:CudaTarget",
    },
    instantiate=True,
    members=("name", "make"),
)


def parse_target(text: str) -> Target:
    """The target that ``text`` describes: a name, a machine that comes with rankc, or a machine's TOML file.

    UsageError for an unknown name or option, InputError for a file that cannot be used.
    """
    head, options = split_target(text)
    if head.endswith(".toml") or head in presets():
        from codegen.asic_target import AsicTarget

        return AsicTarget(head).make(text, options)
    if head not in TARGETS.names():
        known = ", ".join((*TARGETS.names(), *presets()))
        raise UsageError(f"unknown target {head!r}; there are: {known}, or the path of a machine's .toml file")
    return TARGETS.load(head).make(text, options)


def split_target(text: str) -> tuple[str, dict[str, str]]:
    """``name:key=value,key=value`` as name and options. Raises UsageError."""
    head, colon, tail = text.partition(":")
    options: dict[str, str] = {}
    for part in tail.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise UsageError(f"--target {text!r}: options are written name:key=value,key=value")
        if key in options:
            raise UsageError(f"--target {text!r}: {key} is given twice")
        options[key] = value
    return head, options
