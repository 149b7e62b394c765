"""Folds per-channel affine nodes (BatchNorm and its like) into the conv or linear layer before them.

    conv(W, b) -> batchnorm(scale, shift)
    conv(W * scale, b * scale + shift)

Refuses an affine whose layer has other readers (the frontend does not offer those), and one that would make a weight
non-finite or overflow it. A row of affines is folded one after another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from passes.core.site import Stage
from passes.graph import Graph, Note
from passes.manager import Pass, PassResult


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Exact in real arithmetic; products are formed in float64 and rounded once."""

    name: ClassVar[str] = "fold-batchnorm"

    def run(self, graph: Graph) -> PassResult:
        notes: list[Note] = []
        refused: set[str] = set()
        modified = False
        while True:
            touched: set[str] = set()
            for affine in graph.affines():
                # folding changes the site, so a further affine on it waits for the next scan
                if affine.node in refused or affine.site.name in touched:
                    continue
                with np.errstate(over="ignore", invalid="ignore"):
                    stage = affine.site.stage.affine(affine.scale, affine.shift)
                if affine.site.stage.bias is None and not affine.shift.any():
                    stage = replace(stage, bias=None)  # a scale alone: zeros would cost an addition
                if not _finite(stage):
                    refused.add(affine.node)
                    notes.append(Note(affine.node, affine.op, f"kept: folded into {affine.site.name} it overflows"))
                    continue
                graph.fold(affine, stage)
                touched.add(affine.site.name)
                notes.append(Note(affine.node, affine.op, f"folded into {affine.site.name}"))
            if not touched:
                return PassResult(modified, tuple(notes))
            modified = True


def _finite(stage: Stage) -> bool:
    return bool(np.isfinite(stage.weight).all()) and (stage.bias is None or bool(np.isfinite(stage.bias).all()))
