"""What rankc knows by name: passes, formats, solvers; targets are registered by ``codegen`` through the same class.

The built-in ones are listed here and need no installation. Other distributions add theirs through entry points:

    [project.entry-points."rankc.formats"]
    my_format = "my_package.my_format:MyFormat"

Nothing is imported before it is asked for. An entry point that cannot be loaded is reported and stops only the run that
asks for it by name.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from passes.core.factor import FactorFormat
from passes.errors import UsageError
from passes.graph import Note
from passes.manager import Pass
from passes.ranks.context import SearchingSolver
from passes.ranks.problem import RankSolver

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """Names and where they are found.

    ``noun`` says what is registered ("format"); ``group`` is the entry-point group; ``builtin`` maps names to
    "module:attribute". Where the attribute is a mapping, the name is looked up in it. With ``instantiate`` a class is
    called without arguments. ``members`` are attributes that everything registered must have, and of ``one_of`` one.
    """

    noun: str
    group: str
    builtin: Mapping[str, str]
    instantiate: bool = False
    members: tuple[str, ...] = ("name",)
    one_of: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """All names, the built-in ones first; loads nothing."""
        return (*self.builtin, *sorted(self._outside()))

    def load(self, name: str) -> T:
        """What stands under ``name``. Raises UsageError for an unknown name or a broken entry point."""
        if name in self.builtin:
            return self._finish(name, _resolve(self.builtin[name]))
        outside = self._outside()
        if name not in outside:
            close = difflib.get_close_matches(name, self.names(), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(f"unknown {self.noun} {name!r}{hint}; there are: {', '.join(self.names())}")
        return self._load_outside(outside[name])

    def load_all(self) -> tuple[dict[str, T], tuple[Note, ...]]:
        """Everything that can be loaded, and a note for each entry point that cannot or that hides a built-in."""
        found = {name: self.load(name) for name in self.builtin}
        notes = []
        for point in entry_points(group=self.group):
            if point.name in self.builtin:
                reason = f"{_origin(point)} offers a {self.noun} {point.name!r}; the built-in one is used"
                notes.append(Note(point.name, self.group, reason))
        for name, point in sorted(self._outside().items()):
            try:
                found[name] = self._load_outside(point)
            except UsageError as error:
                notes.append(Note(name, self.group, str(error)))
        return found, tuple(notes)

    def _outside(self) -> dict[str, EntryPoint]:
        return {p.name: p for p in entry_points(group=self.group) if p.name not in self.builtin}

    def _load_outside(self, point: EntryPoint) -> T:
        where = f"{self.noun} {point.name!r} of {_origin(point)}"
        try:
            return self._finish(point.name, point.load())
        except Exception as error:  # whatever foreign code raises at import, it is told and not swallowed
            raise UsageError(f"{where} cannot be loaded from {point.value}: {type(error).__name__}: {error}") from error

    def _finish(self, name: str, loaded: Any) -> T:
        if isinstance(loaded, Mapping):
            loaded = loaded[name]
        if self.instantiate and isinstance(loaded, type):
            loaded = loaded()
        missing = [member for member in self.members if not hasattr(loaded, member)]
        if missing:
            raise TypeError(f"{name!r} is no {self.noun}: it has no {', '.join(missing)}")
        if self.one_of and not any(hasattr(loaded, member) for member in self.one_of):
            raise TypeError(f"{name!r} is no {self.noun}: it has neither {' nor '.join(self.one_of)}")
        if loaded.name != name:  # plans and reports go by that name
            raise TypeError(f"it calls itself {loaded.name!r}")
        result: T = loaded
        return result


def _resolve(address: str) -> Any:
    module, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _origin(point: EntryPoint) -> str:
    return "an unknown distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"


PASSES: Registry[type[Pass]] = Registry(
    "pass",
    "rankc.passes",
    {
        "fold-batchnorm": "passes.fold_batchnorm:FoldBatchNorm",
        "drop-identities": "passes.drop_identities:DropIdentities",
        "drop-dead-code": "passes.drop_dead_code:DropDeadCode",
        "fuse-pointwise": "passes.fuse_pointwise:FusePointwise",
        "factorize": "passes.factorize:Factorize",
    },
    members=("name", "run"),
)
"""Classes; their fields are options, so they are not instantiated here."""

FORMATS: Registry[FactorFormat] = Registry(
    "format",
    "rankc.formats",
    {
        "svd": "passes.core.formats:FORMATS",
        "channel_svd_out": "passes.core.formats:FORMATS",
        "channel_svd_in": "passes.core.formats:FORMATS",
        "spatial_svd_vh": "passes.core.formats:FORMATS",
        "spatial_svd_hv": "passes.core.formats:FORMATS",
        "tucker2": "passes.core.formats:FORMATS",
    },
    instantiate=True,
    members=("name", "full_rank", "geometries", "widths", "decompose"),
)

SOLVERS: Registry[RankSolver | SearchingSolver] = Registry(
    "solver",
    "rankc.solvers",
    {
        "milp": "passes.ranks.milp:MilpSolver",
        "uniform": "passes.ranks.uniform:UniformSolver",
        "haloc": "passes.training.haloc:HalocSolver",
    },
    instantiate=True,
    one_of=("solve", "search"),
)
"""Pure ones have ``solve``, those that look at the network ``search``."""
