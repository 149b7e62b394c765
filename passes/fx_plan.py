"""From the layers of a plan to the sites of a torch network: a plan made on an ONNX file, used on the module behind it.

    layer of the plan                  site
    layer1.0.conv1                     layer1.0.conv1     the same name
    /layer1/layer1.0/conv1/Conv        layer1.0.conv1     the path that torch.onnx.export wrote into the name
    node_conv2d_3                      layer1.0.conv1     the fourth layer is the fourth site, and of the same geometry

One of these has to hold for all layers of a plan: half of a match is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from passes.core.factor import FactorFormat
from passes.core.site import Site
from passes.errors import InputError

Choices = Mapping[str, tuple[str, tuple[int, ...]]]
"""Format and rank by layer, in the order of the plan; the format is "dense" for a layer that stays."""


def matched(layers: Sequence[str], sites: Sequence[Site], sources: Sequence[Site] | None = None) -> dict[str, str]:
    """The name of the site for each layer of a plan, by name, by path, or by execution order.

    ``sources``: the sites that the plan was made on, where they are at hand; layers and sites are then held to have
    equal geometry and weights of equal shape. Raises InputError where the plan does not fit the network.
    """
    names = [site.name for site in sites]
    ways: tuple[Callable[[str], str | None], ...] = (
        lambda layer: layer if layer in names else None,
        lambda layer: next((path for path in _paths(layer) if path in names), None),
        lambda layer: _contained(layer, names),
    )
    for way in ways:
        found = {layer: name for layer in layers if (name := way(layer)) is not None}
        if len(found) == len(layers) and len(set(found.values())) == len(layers):
            _check(found, sites, sources)
            return found
    if len(layers) != len(sites):
        stray = next((layer for layer in layers if ways[1](layer) is None), layers[0] if layers else "")
        raise InputError(
            f"the plan has {len(layers)} layers, the network {len(sites)} rewritable ones, and none of those belongs "
            f"to the plan's '{stray}'; the plan is of another network"
        )
    found = dict(zip(layers, names, strict=True))
    _check(found, sites, sources)
    return found


def replayed(
    plan: Choices, sites: Sequence[Site], formats: Mapping[str, FactorFormat], sources: Sequence[Site] | None = None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Format and rank by site name, as the plan has them by layer.

    ``formats``: those that the plan may name. Raises InputError where the plan does not fit the network.
    """
    by_name = {site.name: site for site in sites}
    found = {}
    for layer, name in matched(list(plan), sites, sources).items():
        choice, rank = plan[layer]
        if choice != "dense":
            format = formats.get(choice)
            if format is None:
                raise InputError(f"the plan has '{layer}' as {choice}; known formats are {', '.join(sorted(formats))}")
            full = format.full_rank(by_name[name].stage)
            fits = full is not None and len(rank) == len(full)
            if full is None or not fits or not all(1 <= r <= f for r, f in zip(rank, full, strict=True)):
                raise InputError(f"the plan has '{layer}' as {choice} of rank {rank}, which '{name}' cannot be")
        found[name] = choice, rank
    return found


def _paths(layer: str) -> list[str]:
    """Module paths that a node's name of torch.onnx.export may stand for, the likeliest first.

    The exporter writes the names of the modules from the outside in, with a numbered child of a sequence after the
    sequence itself ("/features/features.0/features.0.1/Conv"), then the operator.
    """
    parts = [part for part in layer.split("/") if part]
    found = []
    for scope in (parts[:-1], parts):
        path: list[str] = []
        for part in scope:
            if path and part.startswith(f"{path[-1]}."):
                path[-1] = part
            else:
                path.append(part)
        if path:
            found.append(".".join(path))
    return found


def _contained(layer: str, names: Sequence[str]) -> str | None:
    """The longest name that stands in the layer's, from one separator to another; None where two are as long."""
    text = _words(layer)
    found = sorted((name for name in names if f" {_words(name)} " in f" {text} "), key=len, reverse=True)
    if not found or (len(found) > 1 and len(found[0]) == len(found[1])):
        return None
    return found[0]


def _words(name: str) -> str:
    return " ".join(re.split(r"[./:_]+", name.strip("./:_")))


def _check(found: Mapping[str, str], sites: Sequence[Site], sources: Sequence[Site] | None) -> None:
    """Raises InputError where a layer and its site are not of the same shape."""
    if sources is None:
        return
    mine, theirs = {site.name: site for site in sites}, {site.name: site for site in sources}
    for layer, name in found.items():
        if layer not in theirs:
            raise InputError(f"the plan has a layer '{layer}', which is not in the network that it was made on")
        one, other = theirs[layer].stage, mine[name].stage
        if one.geometry != other.geometry or one.weight.shape != other.weight.shape:
            raise InputError(
                f"the plan's '{layer}' is {_outline(theirs[layer])}, the network's '{name}' is {_outline(mine[name])}; "
                "the plan is of another network"
            )


def _outline(site: Site) -> str:
    g = site.stage.geometry
    kernel = "x".join(map(str, g.kernel))
    what = f"a convolution {kernel}, strides {list(g.strides)}, pads {list(g.pads)}" if g.ndim else "linear"
    return f"{what}, {site.stage.in_channels} to {site.stage.out_channels} channels in {g.groups} groups"
