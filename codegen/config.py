"""The resolved options of one run: what the command line, Python callers and ``config.toml`` all end in."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from codegen.budget import Budget
from codegen.dataset import split_source
from codegen.toml_text import dumps
from codegen.tune.options import TuningOptions
from passes import registry
from passes.core.cost import METRICS
from passes.errors import InputError, UsageError, first_line

COMMAND_LINE = "command line"
"""Where options stand that are written with dashes."""

_HEADER = "The resolved run. To repeat it: rankc lower --config config.toml -o ANOTHER_FOLDER"
_OCCASION = frozenset({"output", "force", "resume", "dump_ir", "explain", "dry_run"})
"""Options of the occasion: they change what is said and where it goes, never the result."""
_NEVER_SAVED = frozenset({"force", "resume", "dry_run"})

SOURCES = ("calib", "eval", "train")
"""Options that name data."""

TRAINING = ("epochs", "batch", "lr", "augment", "label_smoothing", "held_out", "device", "train_processes")
"""Options that mean something with ``train`` alone; None takes the effort's or the method's own. ``device`` is also
where a solver trains that looks at the network itself."""

_PATHS = ("model", "plan", "output", "dump_ir", "database")

Dimension = Annotated[int, Field(ge=1)]


class LowerConfig(BaseModel):
    """Every option of ``lower``.

    ``target``, ``calib``, ``eval`` and ``train`` keep their written form (``chip.toml:rows=32``, ``load.py:function``).
    ``budgets``: metric -> text as on the command line. ``samples`` caps the calibration samples, None takes all.
    ``shapes`` binds inputs with symbolic dimensions. ``time_budget_s`` ends the search early with the best so far.
    ``margin`` overrides the target's own relative noise margin. ``database``, ``trials``, ``rpc`` and ``rpc_key`` are
    for targets that are tuned: the file of trials, how many of a layer, and the tracker of a device farm. ``train`` is
    what the rewritten network is trained on, by the options of :data:`TRAINING`; it is not trained without.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    target: str = "asic"
    budgets: dict[str, str] = {}
    max_error: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    calib: str | None = None
    eval: str | None = None
    samples: int | None = Field(default=1024, ge=1)
    shapes: dict[str, tuple[Dimension, ...]] = {}
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    plan: Path | None = None
    solver: str = "milp"
    effort: Literal["quick", "default", "extensive"] = "default"
    time_budget_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    margin: float | None = Field(default=None, ge=0, lt=1)
    database: Path | None = None
    trials: int | None = Field(default=None, ge=1)
    rpc: str | None = None
    rpc_key: str | None = None
    train: str | None = None
    epochs: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    augment: Literal["auto", "none", "flip", "crop_flip", "script"] | None = None
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    held_out: float | None = Field(default=None, gt=0, lt=1)
    device: str | None = None
    train_processes: int | None = Field(default=None, ge=1)
    output: Path | None = None
    force: bool = False
    resume: bool = False
    dump_ir: Path | None = None
    explain: bool = False
    dry_run: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> LowerConfig:
        for metric, text in self.budgets.items():
            Budget.parse(metric, text)
        if (self.rpc is None) != (self.rpc_key is None):
            raise UsageError("--rpc and --rpc-key belong together: the tracker's HOST:PORT and the devices' key there")
        if self.rpc is not None:
            host, colon, port = self.rpc.rpartition(":")
            if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise UsageError(f"--rpc {self.rpc!r}: write HOST:PORT")
        alone = [] if self.train is not None else [name for name in TRAINING if getattr(self, name) is not None]
        if "device" in alone and hasattr(registry.SOLVERS.load(self.solver), "search"):
            alone.remove("device")
        if alone:
            raise UsageError(f"--{alone[0].replace('_', '-')} is for training: give --train data, or leave it out")
        if self.force and self.resume:
            raise UsageError("--force starts over and --resume goes on: give one of them")
        return self

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str = "options") -> LowerConfig:
        """A configuration from plain values; UsageError of one line names the option and ``where`` it stands."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise UsageError(f"{where}: there is no option {option!r}; options: {known}") from error
            if first["type"] == "missing":
                raise UsageError(f"{where}: {option!r} is missing") from error
            shown = str(first["input"])
            what = (
                f"--{option.replace('_', '-')} {shown!r}" if where == COMMAND_LINE else f"{where}: {option} = {shown!r}"
            )
            raise UsageError(f"{what}: {first['msg'].lower()}") from error

    @property
    def tuning(self) -> TuningOptions:
        return TuningOptions(self.database, self.trials, self.rpc, self.rpc_key, self.effort)

    @property
    def parsed_budgets(self) -> tuple[Budget, ...]:
        """The budgets in the order of :data:`passes.core.cost.METRICS`."""
        return tuple(Budget.parse(metric, self.budgets[metric]) for metric in METRICS if metric in self.budgets)

    def resolved(self, base: Path) -> LowerConfig:
        """The same with every path made absolute; relative ones are taken from ``base``."""

        def absolute(path: str | Path) -> str:
            return os.path.normpath(base / Path(path).expanduser())

        changes: dict[str, Any] = {}
        for name in _PATHS:
            if getattr(self, name) is not None:
                changes[name] = Path(absolute(getattr(self, name)))
        for name in SOURCES:
            if getattr(self, name) is not None:
                changes[name] = _source_with_path(getattr(self, name), absolute)
        changes["target"] = _target_with_path(self.target, absolute)
        return self.model_copy(update=changes)

    def run_options(self) -> dict[str, Any]:
        """What determines the result, as plain JSON values: everything but the options of the occasion."""
        options: dict[str, Any] = self.model_dump(mode="json", exclude=set(_OCCASION))
        return options

    def input_files(self) -> dict[str, Path]:
        """Files (or folders) other than the model that the result depends on: option name -> path."""
        files: dict[str, Path] = {}
        for name in SOURCES:
            if getattr(self, name) is not None:
                files[name] = split_source(getattr(self, name))[0]
        if self.plan is not None:
            files["plan"] = self.plan
        head = self.target.partition(":")[0]
        if head.endswith(".toml"):
            files["target"] = Path(head)
        return files

    def to_toml(self, folder: Path) -> str:
        """The text of a ``config.toml`` that is going to stand in ``folder``.

        Paths inside ``folder`` or its parent become relative, so that a project moves as a whole; others stay
        absolute. ``force``, ``resume`` and ``dry_run`` are not saved.
        """
        here = folder.absolute()

        def relative(path: str | Path) -> str:
            full = Path(path).absolute()
            return os.path.relpath(full, here) if full.is_relative_to(here.parent) else str(full)

        table: dict[str, Any] = self.resolved(Path.cwd()).model_dump(mode="json", exclude=set(_NEVER_SAVED))
        for name in _PATHS:
            if table[name] is not None:
                table[name] = relative(table[name])
        for name in SOURCES:
            if table[name] is not None:
                table[name] = _source_with_path(table[name], relative)
        table["target"] = _target_with_path(table["target"], relative)
        if self.samples is None:
            table["samples"] = "all"
        return dumps(table, _HEADER)

    @classmethod
    def from_toml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> LowerConfig:
        """Reads a ``config.toml``; its relative paths start at its own folder.

        ``overrides``: option -> value with absolute paths, e.g. from the command line; they win. InputError for a file
        that is no TOML, UsageError for an option that does not exist or does not fit.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a configuration: {first_line(error)}") from error
        if table.get("samples") == "all":
            table["samples"] = None
        config = cls.from_values(table, str(path)).resolved(path.absolute().parent)
        if not overrides:
            return config
        return cls.from_values({**config.model_dump(), **overrides})


def _source_with_path(source: str, change: Callable[[str | Path], str]) -> str:
    path, function = split_source(source)
    return change(path) + (f":{function}" if function else "")


def _target_with_path(target: str, change: Callable[[str | Path], str]) -> str:
    head, colon, options = target.partition(":")
    return change(head) + colon + options if head.endswith(".toml") else target
