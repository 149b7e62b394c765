"""Sweeps: the same network on one machine of which one or two keys take several values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from passes.errors import UsageError

_MOST_POINTS = 400


@dataclass(frozen=True)
class Axis:
    """``keys`` of the machine take each of ``values``, all the same one: ``rows+columns=8,16`` has two keys."""

    keys: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        return "+".join(self.keys)

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The values as numbers above zero, None where they are none."""
        try:
            found = tuple(float(value) for value in self.values)
        except ValueError:
            return None
        return found if all(0 < number < float("inf") for number in found) else None


def parse_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """``rows=4,8,16``, ``rows+columns=8,16``: one axis or two. Raises UsageError."""
    axes = []
    for text in texts:
        name, _, tail = text.partition("=")
        keys = tuple(key.strip() for key in name.split("+"))
        values = tuple(value.strip() for value in tail.split(","))
        if not all(keys) or not all(values):
            raise UsageError(f"--sweep {text!r}: write KEY=VALUE,VALUE,... such as rows=4,8,16 or rows+columns=8,16")
        if len(set(values)) < len(values):
            raise UsageError(f"--sweep {text!r}: {max(values, key=values.count)} is given twice")
        axes.append(Axis(keys, values))
    every = [key for axis in axes for key in axis.keys]
    if len(set(every)) < len(every):
        raise UsageError(f"--sweep: {max(every, key=every.count)} is swept twice")
    if len(axes) > 2:
        raise UsageError("--sweep can be given at most twice: a grid of two keys")
    count = len(points(axes))
    if count > _MOST_POINTS:
        raise UsageError(f"--sweep: {count} machines; at most {_MOST_POINTS}")
    return tuple(axes)


def points(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """What each point changes: key -> value; the last axis runs fastest."""
    return [
        {key: value for axis, value in zip(axes, values, strict=True) for key in axis.keys}
        for values in product(*(axis.values for axis in axes))
    ]
