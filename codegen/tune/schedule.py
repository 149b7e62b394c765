"""A schedule as a value: which template, with which parameters. What it does is up to :mod:`codegen.tvm_kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from codegen.tune.workload import Workload


@dataclass(frozen=True)
class Schedule:
    """``template``: its name. ``params``: name and value, sorted by name; a trace of MetaSchedule is one text."""

    template: str
    params: tuple[tuple[str, int | str], ...] = ()

    @classmethod
    def of(cls, template: str, **params: int | str) -> Self:
        return cls(template, tuple(sorted(params.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.params)[name]

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, "params": dict(self.params)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """KeyError, TypeError or ValueError where ``value`` is none."""
        params = value["params"]
        if not isinstance(value["template"], str) or not all(isinstance(v, int | str) for v in params.values()):
            raise ValueError("a schedule has a template's name and parameters that are numbers or texts")
        return cls.of(value["template"], **params)


ScheduleSource = Callable[[Workload], Schedule | None]
"""The schedule to build a workload with; None: the template's own, which needs no trial."""
