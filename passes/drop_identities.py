"""Drops nodes that pass their input on unchanged.

    conv -> identity -> dropout -> relu
    conv -> relu

Refuses whatever the frontend cannot prove to be a no-op (a Dropout in training mode, a Cast that rounds), and a node
between a network input and a network output, because both names stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from passes.graph import Graph
from passes.manager import Pass, PassResult


@dataclass(frozen=True)
class DropIdentities(Pass):
    """Exact."""

    name: ClassVar[str] = "drop-identities"

    def run(self, graph: Graph) -> PassResult:
        notes = graph.drop_identities()
        return PassResult(bool(notes), notes)
