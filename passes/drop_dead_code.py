"""Drops nodes and constants that no output depends on.

    conv -> relu -> output      conv -> exp (read by nobody)      constant (read by nobody)
    conv -> relu -> output

Refuses network inputs: they stay, read or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from passes.graph import Graph
from passes.manager import Pass, PassResult


@dataclass(frozen=True)
class DropDeadCode(Pass):
    """Exact."""

    name: ClassVar[str] = "drop-dead-code"

    def run(self, graph: Graph) -> PassResult:
        notes = graph.drop_dead_code()
        return PassResult(bool(notes), notes)
