"""What a benchmark is, and which there are.

Other distributions add theirs through the entry points "rankc.benchmarks". Nothing is imported before it is asked for.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from codegen.bench import BUILTIN
from codegen.events import Events
from passes.errors import InputError, UsageError
from passes.registry import Registry

_SHARED = Path(__file__).resolve().parents[2].parent / "shared"
MODELS = _SHARED / "models"
DATA = _SHARED / "data"
SCALESIM_REPORTS = _SHARED / "reference" / "scalesim"
"""Where networks, data and reports are looked for when no option says otherwise: beside the checkout, never inside."""

EFFORT_NAMES = ("quick", "default", "extensive")


@dataclass(frozen=True)
class Table:
    """A result as people read it. ``columns`` beyond the first are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Benchmark(Protocol):
    """A frozen dataclass; its fields are its options, all with defaults. UsageError where one does not fit."""

    name: ClassVar[str]

    def run(self, events: Events) -> dict[str, Any]:
        """The result as plain JSON values. InputError where a network or data are missing."""
        ...

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """What :meth:`run` gave, as tables."""
        ...


BENCHMARKS: Registry[type[Benchmark]] = Registry(
    "benchmark",
    "rankc.benchmarks",
    BUILTIN,
    members=("name", "run", "tables"),
)


def make(name: str, options: Mapping[str, Any]) -> Benchmark:
    """The benchmark ``name`` with ``options``; UsageError for an unknown name or an option that it lacks."""
    kind: Any = BENCHMARKS.load(name)
    known = {field.name for field in fields(kind)}
    for option in options:
        if option not in known:
            raise UsageError(f"--{option} does not apply to the benchmark {name}; see rankc bench --help")
    if options.get("effort", "default") not in EFFORT_NAMES:
        raise UsageError(f"--effort {options['effort']!r}: there are: {', '.join(EFFORT_NAMES)}")
    benchmark: Benchmark = kind(**options)
    return benchmark


def envelope(benchmark: Benchmark, result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with what it takes to read it later: options, machine, versions."""
    from codegen.report.build import tool_versions

    options = {f.name: _plain(getattr(benchmark, f.name)) for f in fields(benchmark)}  # type: ignore[arg-type]
    machine = {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1}
    return {
        "schema": 1,
        "benchmark": benchmark.name,
        "options": options,
        "machine": {**machine, "system": platform.system(), "processor": platform.machine()},
        "tool": tool_versions(),
        **result,
    }


def existing(path: Path, option: str, what: str) -> Path:
    """``path``, once it is known to be there; InputError names the option that leads elsewhere."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: the benchmark needs {what}; give its folder with {option} DIR")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name  # results travel, folders of one machine mean nothing elsewhere
    return list(value) if isinstance(value, tuple) else value
