"""Puts chains in the places of layers.

    conv3x3(64 -> 64)
    conv3x3(64 -> 20) -> conv1x1(20 -> 64)

Refuses, with a note, a chain for a site that is not there, and a chain that equals what stands there already. A chain
that does not fit its site (channels or spatial size) is an error: it belongs to another network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from passes.core.site import Array, Chain, Site, Stage
from passes.errors import InputError
from passes.graph import Graph, Note
from passes.manager import Pass, PassResult


@dataclass(frozen=True)
class Factorize(Pass):
    """Changes values unless the chains are of full rank. ``chains`` by site name."""

    name: ClassVar[str] = "factorize"

    chains: Mapping[str, Chain] = field(default_factory=dict)

    def run(self, graph: Graph) -> PassResult:
        """Raises InputError, before anything is changed, when a chain does not fit its site."""
        sites = {site.name: site for site in graph.sites().sites}
        todo = [(sites[name], chain) for name, chain in self.chains.items() if name in sites]
        notes = [
            Note(name, chain.format, "no such site in this network")
            for name, chain in self.chains.items()
            if name not in sites
        ]
        for site, chain in todo:
            _check_fit(site, chain)
        modified = False
        for site, chain in todo:
            if len(chain) == 1 and _same(chain.stages[0], site.stage):
                notes.append(Note(site.name, site.op, "kept: the chain is the layer itself"))
                continue
            graph.replace(site, chain)
            modified = True
            notes.append(Note(site.name, site.op, _describe(site, chain)))
        return PassResult(modified, tuple(notes))


def _check_fit(site: Site, chain: Chain) -> None:
    first, last = chain.stages[0], chain.stages[-1]
    if (first.in_channels, last.out_channels) != (site.stage.in_channels, site.stage.out_channels):
        raise InputError(
            f"the chain for {site.name} maps {first.in_channels} to {last.out_channels} channels, "
            f"the layer {site.stage.in_channels} to {site.stage.out_channels}"
        )
    wanted = site.stage.geometry.output_spatial(site.spatial)
    found = chain.shapes(site.spatial)[-1]
    if found != wanted:
        raise InputError(f"the chain for {site.name} gives a spatial size of {found}, the layer {wanted}")


def _same(one: Stage, other: Stage) -> bool:
    return (
        one.geometry == other.geometry
        and np.array_equal(one.weight, other.weight)
        and np.array_equal(_bias(one), _bias(other))
    )


def _bias(stage: Stage) -> Array:
    return np.zeros(stage.out_channels) if stage.bias is None else stage.bias


def _describe(site: Site, chain: Chain) -> str:
    rank = " x ".join(str(r) for r in chain.rank)
    what = f"{chain.format} of rank {rank}" if rank else chain.format
    stages = "1 stage" if len(chain) == 1 else f"{len(chain)} stages"
    return f"{what}: {stages}, {site.stage.params} parameters became {chain.params}"
