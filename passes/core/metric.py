"""How the result of a network reacts to a site: which errors of its outputs are seen, and where."""

from __future__ import annotations

from dataclasses import dataclass

from passes.core.site import Array


@dataclass(frozen=True, eq=False)
class OutputMetric:
    """``root``: (g, O, O), the symmetric square root of the metric between a group's output channels.

    ``positions``: (*output spatial), what an error at each position counts, 1 on average; () for a linear layer.
    """

    root: Array
    positions: Array
