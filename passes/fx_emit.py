"""Writes a chain into a torch.fx network in place of a site.

    convolution, symmetric pads      nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d
    linear, channels last            nn.Linear
    everything else                  passes.training.layers.StageLayer

Each stage is a module of its own and is called by a node of its own. Values are stored in the type that the site's
weight was stored in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from passes.core.site import Array, Chain, Geometry, Stage
from passes.fx_network import Form, Network, tensors_of
from passes.fx_sites import Spot
from passes.training.layers import StageLayer


def emit(net: Network, spot: Spot, chain: Chain, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Replaces the nodes of ``spot`` by ``chain``; returns the labels of the new ones.

    ``names``: labels of the stages, if not ``<site>.<format>_<i>``. The modules lie at the paths of that name, or at
    numbered ones where those are taken.
    """
    anchor = spot.nodes[0]
    labels = list(names) if names else [f"{spot.site.name}.{chain.format}_{i}" for i in range(len(chain))]
    tensor = tensors_of(spot.target)[0]
    with net.graph.inserting_before(anchor):
        # holds the place while the old nodes go, so that their modules' paths are free for the new ones
        here = net.graph.call_function(_placeholder_of_a_chain, (spot.source,))
    spot.target.replace_all_uses_with(here)
    net.erase(spot.nodes)
    source = spot.source
    for index, (stage, form) in enumerate(zip(chain.stages, _forms(spot, chain), strict=True)):
        path = net.fresh_path(labels[index].partition("+")[0])
        net.put(path, layer_of(stage, spot.site.channel_axis, spot.dtype))
        last = index == len(chain) - 1
        source = net.call(here, path, source, labels[index], form, tensor if last else "")
    here.replace_all_uses_with(source)
    net.graph.erase_node(here)
    return tuple(labels)


def _placeholder_of_a_chain(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("is never run")


def _forms(spot: Spot, chain: Chain) -> list[Form]:
    """What each stage gives."""
    shape, found = spot.site.input_shape, []
    for stage, (_, spatial) in zip(chain.stages, pairwise(chain.shapes(spot.site.spatial)), strict=True):
        if stage.geometry.ndim:
            shape = (shape[0], stage.out_channels, *spatial)
        else:
            axis = spot.site.channel_axis % len(shape)
            shape = (*shape[:axis], stage.out_channels, *shape[axis + 1 :])
        found.append(Form(shape, spot.dtype))
    return found


def layer_of(stage: Stage, channel_axis: int, dtype: torch.dtype) -> nn.Module:
    """The stage as a module in inference mode: torch's own where it has one of that geometry, else a StageLayer."""
    g = stage.geometry
    make: Any = None
    options: tuple[Any, ...] = (g.kernel, g.strides, g.pads[: g.ndim])
    bias = stage.bias is not None
    if g.ndim == 0 and g.groups == 1 and channel_axis == -1:
        make, options = nn.Linear, (bias,)
    elif 0 < g.ndim < 4 and _is_symmetric(g) and not g.transposed:
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[g.ndim - 1]
        options = (*options, g.dilations, g.groups, bias)
    elif 0 < g.ndim < 4 and _is_symmetric(g) and _pads_outside(g):
        make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[g.ndim - 1]
        options = (*options, g.output_padding, g.groups, bias, g.dilations)
    if make is None:
        return StageLayer(stage, channel_axis).to(dtype).eval()
    module: nn.Module = make(stage.in_channels, stage.out_channels, *options, device="meta")  # values follow
    module.weight = nn.Parameter(_tensor(_as_torch_stores(stage), dtype))
    if stage.bias is not None:
        module.bias = nn.Parameter(_tensor(stage.bias, dtype))
    return module.eval()


def _is_symmetric(g: Geometry) -> bool:
    return g.pads[: g.ndim] == g.pads[g.ndim :] and all(pad >= 0 for pad in g.pads)


def _pads_outside(g: Geometry) -> bool:
    """True for an output padding that torch takes."""
    return all(p < max(s, d) for p, s, d in zip(g.output_padding, g.strides, g.dilations, strict=True))


def _as_torch_stores(stage: Stage) -> Array:
    if not stage.geometry.transposed:
        return stage.weight
    weight: Array = stage.grouped_weight().swapaxes(1, 2)
    return weight.reshape(stage.in_channels, -1, *stage.geometry.kernel)


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(array, dtype=dtype)
