"""The report of a run as typed parts, and as the dict that ``schema.json`` describes."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import jsonschema

from passes.core.cost import Cost, Kind

if TYPE_CHECKING:
    from codegen.report.measurement import MeasurementReport
    from codegen.report.program import ProgramReport
    from codegen.report.recovery import RecoveryReport

SCHEMA_VERSION = 1

_LIBRARIES = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "scipy", "torch")


@dataclass(frozen=True)
class Quantity:
    """A number with its unit (cycles, s, pJ, MACs, params, B, top-1) and where it comes from."""

    value: float
    unit: str
    kind: Kind


@dataclass(frozen=True)
class Network:
    """What a whole network costs; ``energy`` and ``accuracy`` are None where unknown."""

    latency: Quantity
    energy: Quantity | None
    macs: Quantity
    params: Quantity
    size: Quantity
    accuracy: Quantity | None = None

    @classmethod
    def of(cls, cost: Cost, accuracy: float | None = None) -> Network:
        """From a cost and, where labels were given, the top-1 accuracy in 0..1. Counts come from the file itself."""
        return cls(
            Quantity(cost.latency, cost.unit, cost.kind),
            Quantity(cost.energy_pj, "pJ", cost.kind) if cost.energy_pj > 0 else None,
            Quantity(cost.macs, "MACs", Kind.MEASURED),
            Quantity(cost.params, "params", Kind.MEASURED),
            Quantity(cost.size_bytes, "B", Kind.MEASURED),
            None if accuracy is None else Quantity(accuracy, "top-1", Kind.MEASURED),
        )


@dataclass(frozen=True)
class BudgetLine:
    """One budget and what came of it: ``asked`` as it was written, ``bound`` the least value that was proven.

    ``value`` is that of the emitted files where these tell it, and ``predicted`` the price list's then, else None.
    """

    metric: str
    asked: str
    limit: float
    unit: str
    value: float
    met: bool
    kind: Kind
    bound: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Layer:
    """One conv or linear node: what was chosen and why. ``rank`` is None for dense; None marks unknown numbers."""

    name: str
    op: str
    choice: str
    rank: tuple[int, ...] | None
    reason: str
    latency_before: float | None = None
    latency_after: float | None = None
    unit: str = ""
    kind: Kind | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    params_before: int | None = None
    params_after: int | None = None
    error: float | None = None
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Iteration:
    """One turn of the outer loop: metric -> value, promised by the additive model and found on the whole network."""

    predicted: dict[str, float]
    measured: dict[str, float]
    status: str
    objective: float | None
    bound: float | None
    gap: float | None
    note: str = ""


@dataclass(frozen=True)
class Solver:
    name: str
    status: str
    objective: float | None
    bound: float | None
    gap: float | None
    iterations: tuple[Iteration, ...] = ()


@dataclass(frozen=True)
class OutputError:
    """Relative L2 error of the network's outputs on ``data``; ``limit`` is --max-error where it binds."""

    relative_l2: float | None
    limit: float | None
    data: str
    samples: int


@dataclass(frozen=True)
class BinaryCheck:
    """The binary, run in a fresh process, against its reference.

    That is model.onnx in onnxruntime, or for an accelerator's library its program on the engine.
    """

    relative_l2: float
    max_abs: float
    samples: int
    bound_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fresh_process: bool = True


@dataclass(frozen=True)
class Verification:
    """model.onnx, read back from disk, against the network as it was in memory."""

    reloaded: bool
    relative_l2: float | None
    max_abs: float | None
    samples: int
    binary: BinaryCheck | None = None


@dataclass(frozen=True)
class NoteRow:
    text: str
    node: str | None = None
    op: str | None = None


@dataclass(frozen=True)
class DataRow:
    source: str
    samples: int


@dataclass(frozen=True)
class Report:
    """Everything that a run has to say; :meth:`to_dict` is report.json."""

    model: str
    model_sha256: str
    target: str
    target_spec: dict[str, Any]
    baseline: Network
    result: Network
    output_error: OutputError
    layers: tuple[Layer, ...]
    solver: Solver
    verification: Verification
    artifacts: dict[str, str | None]
    budgets: tuple[BudgetLine, ...] = ()
    data: dict[str, DataRow] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[NoteRow, ...] = ()
    warnings: tuple[str, ...] = ()
    program: ProgramReport | None = None
    measurement: MeasurementReport | None = None
    recovery: RecoveryReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, validated against the published schema.

        An infinite or undefined gap, bound or objective has no JSON form and becomes null; jsonschema.ValidationError
        for whatever else does not fit.
        """
        parts = asdict(self)
        report = {
            "schema": SCHEMA_VERSION,
            "tool": tool_versions(),
            "model": {"path": parts.pop("model"), "sha256": parts.pop("model_sha256")},
            "target": {"name": parts.pop("target"), "spec": parts.pop("target_spec")},
            **parts,
        }
        for entry in (report["solver"], *report["solver"]["iterations"]):
            for key in ("objective", "bound", "gap"):
                if entry[key] is not None and not math.isfinite(entry[key]):
                    entry[key] = None
        plain: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
        validate(plain)
        return plain


def tool_versions() -> dict[str, str]:
    """Versions of rankc, Python and the libraries that can change a result; those not installed are left out."""
    versions = {"python": platform.python_version(), "rankc": "checkout"}
    for package in ("rankc", *_LIBRARIES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@cache
def schema() -> dict[str, Any]:
    """The published schema of report.json."""
    text = (resources.files("codegen.report") / "schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def validate(report: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError for a dict that is no report of schema 1."""
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)


def to_json(report: dict[str, Any]) -> str:
    """The text of report.json."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
