"""An experiment: the steps that lead to a row of a table, each with its recipe, in a TOML file of this package.

title = "..."
data = "cifar10"                  # a source of codegen.reproduce.data
network = "resnet20"              # what is trained: a name of codegen.train, or "tiny"

[seeds]
short = [0]
full = [0, 1, 2]

[[steps]]
name = "dense"
kind = "dense"                    # dense, elrt, svd: trained from scratch; lower; given: a file of --models
like = "dense-resnet20"           # the recipe is that of the step of this name in another experiment

[[steps]]
name = "milp"
kind = "lower"
of = "dense"                      # whose network is lowered
recover = true                    # false: no training behind it
options = { solver = "milp", budgets = { macs = "27.8%" } }
short = { epochs = 20 }           # options of one schedule
full = { epochs = 200 }

[[steps]]
name = "elrt"
kind = "elrt"
ranks_of = "milp"                 # formats and ranks are those of the plan of that step

[[published]]
system = "..."
source = "..."
gain_points = 0.07                # top-1 over its own dense network
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from passes.errors import InputError, UsageError

ScheduleName = Literal["short", "full"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
Kind = Literal["dense", "elrt", "svd", "lower", "given"]
DENSE = "dense"
"""The step that every other is compared with."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepConfig(_Section):
    """One step. ``options`` are those of ``rankc lower`` or ``rankc train``; a schedule's own win over them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    kind: Kind
    of: str = DENSE
    like: str | None = None
    file: str | None = None
    recover: bool = True
    ranks_of: str | None = None
    options: dict[str, Any] = {}
    short: dict[str, Any] = {}
    full: dict[str, Any] = {}


class Published(_Section):
    """A figure to compare with. ``macs_removed``: percent; ``gain_points``: over its own dense network."""

    system: str
    source: str
    step: str | None = None
    accuracy: float | None = None
    gain_points: float | None = None
    macs_removed: float | None = None


class Seeds(_Section):
    short: tuple[int, ...] = Field(default=(0,), min_length=1)
    full: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)


class ExperimentConfig(_Section):
    title: str
    data: Literal["cifar10", "synthetic"]
    network: str
    seeds: Seeds = Seeds()
    steps: tuple[StepConfig, ...] = Field(min_length=1)
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        before: dict[str, Kind] = {}
        for step in self.steps:
            if step.name in before:
                raise ValueError(f"two steps are called {step.name!r}")
            if step.kind == "lower" and step.of not in before:
                raise ValueError(f"step {step.name!r} lowers {step.of!r}, which is no step before it")
            if (step.kind == "given") != (step.file is not None):
                raise ValueError(f"step {step.name!r}: a file belongs to kind 'given', and to no other")
            if step.ranks_of is not None and (step.kind != "elrt" or before.get(step.ranks_of) != "lower"):
                raise ValueError(f"step {step.name!r}: ranks_of is for kind 'elrt', and names a lowered step before it")
            if not step.recover and step.kind != "lower":
                raise ValueError(f"step {step.name!r}: recover belongs to kind 'lower', and to no other")
            before[step.name] = step.kind
        if self.steps[0].name != DENSE:
            raise ValueError(
                f"the first step is {self.steps[0].name!r}, expected {DENSE!r}: all others are compared with it"
            )
        return self


@dataclass(frozen=True)
class Step:
    """A step of one schedule, its options resolved but for the seed."""

    name: str
    kind: Kind
    of: str
    file: str | None
    options: dict[str, Any]
    recover: bool
    ranks_of: str | None
    owner: str
    """The experiment whose recipe it is: steps of one owner and name are the same wherever they are used."""


@dataclass(frozen=True)
class Experiment:
    """``steps`` in order; every one but the first may build on those before it."""

    name: str
    title: str
    data: str
    network: str
    schedule: ScheduleName
    seeds: tuple[int, ...]
    steps: tuple[Step, ...]
    published: tuple[Published, ...]


def names() -> tuple[str, ...]:
    """The experiments there are."""
    folder = resources.files(__package__) / "configs"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def read(name: str) -> ExperimentConfig:
    """The configuration of an experiment. UsageError for an unknown name, InputError for a file that is none."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown experiment {name!r}{hint}; there are: {', '.join(names())}")
    text = (resources.files(__package__) / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    return parse(name, text)


def parse(name: str, text: str) -> ExperimentConfig:
    """The configuration in ``text``. InputError, of one line, where it is none."""
    try:
        return ExperimentConfig(**tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"experiment {name}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"experiment {name}: {where or 'file'}: {first['msg']}") from error


def experiment(name: str, schedule: ScheduleName = "short") -> Experiment:
    """The experiment ``name`` on a schedule, with every recipe it shares with others looked up."""
    config = read(name)
    steps = tuple(_step(name, config, step, schedule) for step in config.steps)
    seeds: tuple[int, ...] = getattr(config.seeds, schedule)
    return Experiment(name, config.title, config.data, config.network, schedule, seeds, steps, config.published)


def _step(owner: str, config: ExperimentConfig, step: StepConfig, schedule: ScheduleName) -> Step:
    if step.like is None:
        options = {**step.options, **getattr(step, schedule)}
        return Step(step.name, step.kind, step.of, step.file, options, step.recover, step.ranks_of, owner)
    if step.options or step.short or step.full:
        raise InputError(f"experiment {owner}: step {step.name!r} is like {step.like!r} and has options of its own")
    other = read(step.like)
    if (other.network, other.data) != (config.network, config.data):
        raise InputError(f"experiment {owner}: {step.like!r} is about another network or other data")
    found = next((s for s in other.steps if s.name == step.name and s.kind == step.kind), None)
    if found is None:
        raise InputError(f"experiment {owner}: {step.like!r} has no step {step.name!r} of kind {step.kind}")
    return _step(step.like, other, found, schedule)
