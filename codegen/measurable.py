"""Price lists that learn: what a target offers whose prices are measured while ranks are being chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from codegen.events import Events
from passes.core.cost import LatencyModel, StageWork


@runtime_checkable
class MeasurablePrices(LatencyModel, Protocol):
    """A price list whose chains can be measured, one stage at a time."""

    def outline(self) -> LatencyModel:
        """The prices before anything was measured: the same, whatever was."""
        ...

    def spread(self, works: Sequence[tuple[StageWork, ...]]) -> list[float]:
        """The standard deviation of each chain's price, in the list's unit; 0 for what was measured."""
        ...

    def wanting(self, works: Sequence[StageWork]) -> list[StageWork]:
        """The stages that :meth:`measure` would make trials of."""
        ...

    def measure(
        self, works: Sequence[StageWork], events: Events, out_of_time: Callable[[], bool] = lambda: False
    ) -> bool:
        """Makes trials of those stages that want them, till ``out_of_time``; True where prices may have moved."""
        ...
