"""Budgets as people write them: ``60%``, ``2.5ms``, ``120000cycles``, ``1.5mJ``, ``40M``, ``1.2MiB``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from passes.core.cost import METRICS, Cost
from passes.errors import UsageError

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*")
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

UNITS: dict[str, dict[str, tuple[float, str]]] = {
    "latency": {
        "s": (1.0, "s"),
        "ms": (1e-3, "s"),
        "us": (1e-6, "s"),
        "µs": (1e-6, "s"),
        "μs": (1e-6, "s"),
        "ns": (1e-9, "s"),
        "cycles": (1.0, "cycles"),
        "kcycles": (1e3, "cycles"),
        "Mcycles": (1e6, "cycles"),
    },
    "energy": {
        "J": (1e12, "pJ"),
        "mJ": (1e9, "pJ"),
        "uJ": (1e6, "pJ"),
        "µJ": (1e6, "pJ"),
        "nJ": (1e3, "pJ"),
        "pJ": (1, "pJ"),
    },
    "macs": {prefix: (scale, "MACs") for prefix, scale in _COUNTS.items()},
    "params": {prefix: (scale, "params") for prefix, scale in _COUNTS.items()},
    "size": {
        "B": (1.0, "B"),
        "kB": (1e3, "B"),
        "MB": (1e6, "B"),
        "GB": (1e9, "B"),
        "KiB": (1024.0, "B"),
        "MiB": (1024.0**2, "B"),
        "GiB": (1024.0**3, "B"),
    },
}
"""Per metric: suffix -> (factor, canonical unit)."""

_EXAMPLES = {
    "latency": "60%, 2.5ms, 300us or 120000cycles",
    "energy": "60%, 1.5mJ or 300uJ",
    "macs": "60%, 40M or 1.2G",
    "params": "60%, 200k or 1.5M",
    "size": "60%, 800KiB or 1.2MiB",
}


@dataclass(frozen=True)
class Budget:
    """An upper limit on one metric.

    ``relative``: ``value`` is a fraction of the baseline and ``unit`` is "". Otherwise ``value`` is in the metric's
    canonical ``unit``: "s" or "cycles", "pJ", "MACs", "params", "B".
    """

    metric: str
    value: float
    unit: str
    relative: bool

    @classmethod
    def parse(cls, metric: str, text: str) -> Budget:
        """Reads one budget; UsageError says which forms the metric takes."""
        if metric not in METRICS:
            raise UsageError(f"there is no budget on {metric!r}; budgets: {', '.join(METRICS)}")
        match = _NUMBER.fullmatch(text)
        if match is None:
            raise UsageError(f"--{metric} {text!r} is no budget; write {_EXAMPLES[metric]}")
        number, suffix = float(match[1]), match[2]
        if not (math.isfinite(number) and number > 0):
            raise UsageError(f"--{metric} {text!r}: a budget is a finite number above zero")
        if suffix == "%":
            return cls(metric, number / 100, "", relative=True)
        if suffix not in UNITS[metric]:
            problem = f"has the unknown unit {suffix!r}" if suffix else "has no unit"
            raise UsageError(f"--{metric} {text!r} {problem}; write {_EXAMPLES[metric]}")
        factor, unit = UNITS[metric][suffix]
        return cls(metric, number * factor, unit, relative=False)

    def limit(self, baseline: Cost, clock_hz: float | None = None) -> float:
        """The absolute limit in the unit of ``baseline.metric(self.metric)``: cycles or s, pJ, MACs, params, bytes.

        ``clock_hz`` converts between seconds and cycles; UsageError where a conversion is needed and the target has
        no clock.
        """
        if self.relative:
            return self.value * baseline.metric(self.metric)
        if self.metric != "latency" or self.unit == baseline.unit:
            return self.value
        if clock_hz is None:
            raise UsageError(
                f"--latency is given in {self.unit}, but the target counts {baseline.unit} and has no clock"
            )
        return self.value * clock_hz if baseline.unit == "cycles" else self.value / clock_hz

    def __str__(self) -> str:
        return f"{self.value * 100:g}%" if self.relative else f"{self.value:g} {self.unit}"
