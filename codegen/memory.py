"""What a search keeps for ``--resume``: the scored candidates, and every plan that was carried out.

Both are rebuilt against the network at hand, so a checkpoint holds numbers and names, never objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from passes.core.factor import FactorFormat
from passes.core.metric import OutputMetric
from passes.core.site import Array, Chain, Site, Stage
from passes.correct import Choice
from passes.ranks.candidates import Candidate
from passes.sensitivity import ScoredSite

SCORES = "scores"


class Memory(Protocol):
    """Checkpoints by name; :class:`codegen.workspace.Workspace` is one."""

    def checkpoint(self, name: str, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None: ...

    def restore(self, name: str) -> tuple[dict[str, Array], dict[str, Any]] | None: ...


class Forgetful:
    """A memory that keeps nothing: for searches that are not resumed."""

    def checkpoint(self, name: str, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
        pass

    def restore(self, name: str) -> tuple[dict[str, Array], dict[str, Any]] | None:
        return None


Scores = tuple[dict[str, ScoredSite], dict[str, OutputMetric], dict[str, float]]
"""Scored sites, output metrics, sensitivities; each by site name."""


def save_scores(memory: Memory, scores: Scores) -> None:
    scored, metrics, weights = scores
    arrays = {f"root/{name}": metric.root for name, metric in metrics.items()}
    arrays |= {f"positions/{name}": metric.positions for name, metric in metrics.items()}
    arrays |= {f"relative/{name}": site.relative for name, site in scored.items()}
    kept = {name: [[c.name, list(c.rank)] for c in site.candidates] for name, site in scored.items()}
    memory.checkpoint(SCORES, arrays, {"candidates": kept, "weights": weights})


def load_scores(memory: Memory, sites: Sequence[Site], found: Mapping[str, tuple[Candidate, ...]]) -> Scores | None:
    """The scores of an earlier run over the same sites and candidates, or None."""
    stored = memory.restore(SCORES)
    if stored is None:
        return None
    arrays, meta = stored
    scored = {}
    for site in sites:
        priced = {(c.name, c.rank): c for c in found[site.name]}
        keys = [(name, tuple(rank)) for name, rank in meta["candidates"].get(site.name, [])]
        if not keys or any(key not in priced for key in keys):
            return None
        relative = arrays[f"relative/{site.name}"]
        scored[site.name] = ScoredSite(site, tuple(priced[key] for key in keys), relative, None)
    names = [key.removeprefix("root/") for key in arrays if key.startswith("root/")]
    metrics = {name: OutputMetric(arrays[f"root/{name}"], arrays[f"positions/{name}"]) for name in names}
    return scored, metrics, {name: float(value) for name, value in meta["weights"].items()}


def attempt_name(choices: Mapping[str, Choice], corrected: bool) -> str:
    """The checkpoint's name of a plan that is carried out."""
    plain = sorted((name, c.format.name if c.format else "", list(c.rank)) for name, c in choices.items())
    return "attempt-" + hashlib.sha256(json.dumps([corrected, plain]).encode()).hexdigest()[:16]


def save_chains(memory: Memory, name: str, chains: Mapping[str, Chain], numbers: Mapping[str, float]) -> None:
    arrays: dict[str, Array] = {}
    for site, chain in chains.items():
        for index, stage in enumerate(chain.stages):
            arrays[f"{index}/weight/{site}"] = stage.weight
            if stage.bias is not None:
                arrays[f"{index}/bias/{site}"] = stage.bias
    finite = {key: value if np.isfinite(value) else None for key, value in numbers.items()}
    memory.checkpoint(name, arrays, {"sites": sorted(chains), "numbers": finite})


def load_chains(
    memory: Memory, name: str, sites: Sequence[Site], choices: Mapping[str, Choice]
) -> tuple[dict[str, Chain], dict[str, float]] | None:
    """The chains and numbers of a plan that was carried out before, or None."""
    stored = memory.restore(name)
    if stored is None:
        return None
    arrays, meta = stored
    chains = {}
    for site in sites:
        if site.name in meta["sites"]:
            chains[site.name] = _chain(site, choices[site.name], arrays)
    return chains, {key: float("nan") if value is None else value for key, value in meta["numbers"].items()}


def _chain(site: Site, choice: Choice, arrays: Mapping[str, Array]) -> Chain:
    format: FactorFormat | None = choice.format
    geometry = site.stage.geometry
    geometries = (geometry,) if format is None else format.geometries(geometry)
    stages = tuple(
        Stage(arrays[f"{i}/weight/{site.name}"], arrays.get(f"{i}/bias/{site.name}"), part)
        for i, part in enumerate(geometries)
    )
    return Chain(stages, "dense" if format is None else format.name, choice.rank)
