"""Layers of a plan and sites of a torch network: equal names, paths in names, execution order, or an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from passes.core.formats.svd import Svd
from passes.core.site import Site
from passes.errors import InputError
from passes.fx_graph import FxGraph
from passes.fx_plan import matched, replayed


def sites() -> tuple[Site, ...]:
    blocks = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)), nn.Conv2d(6, 6, 1))
    net = nn.Sequential()
    net.add_module("blocks", blocks)
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(6, 5))
    return FxGraph.trace(net, torch.zeros(1, 3, 5, 5)).sites().sites


NAMES = ["blocks.0.0", "blocks.0.1", "blocks.1", "head"]


@pytest.mark.parametrize(
    "layers",
    [
        NAMES,
        ["/blocks/blocks.0/blocks.0.0/Conv", "/blocks/blocks.0/blocks.0.1/Conv", "/blocks/blocks.1/Conv", "/head/Gemm"],
        ["net/blocks.0.0/conv", "net/blocks.0.1/conv", "net/blocks.1/conv", "net/head/gemm"],
        ["node_conv2d", "node_conv2d_1", "node_conv2d_2", "node_linear"],
        ["/blocks/blocks.0/blocks.0.0/Conv", "/blocks/blocks.0/blocks.0.1/Conv", "/blocks/blocks.1/Conv", "/fc/Gemm"],
    ],
    ids=["equal", "paths", "contained", "order", "order for all where one is missing"],
)
def test_layers_find_their_sites(layers: list[str]) -> None:
    assert matched(layers, sites()) == dict(zip(layers, NAMES, strict=True))


def test_names_count_and_not_the_order() -> None:
    assert matched(["/head/Gemm", "/blocks/blocks.1/Conv"], sites()) == {
        "/head/Gemm": "head",
        "/blocks/blocks.1/Conv": "blocks.1",
    }


def test_plans_of_other_networks_are_refused() -> None:
    found = sites()
    with pytest.raises(InputError, match=r"the plan has 2 layers, the network 4 .* 'other'"):
        matched(["head", "other"], found)
    sources = [replace(site, name=f"node_{i}") for i, site in enumerate(found)]
    layers = [site.name for site in sources]
    assert matched(layers, found, sources) == dict(zip(layers, NAMES, strict=True))
    turned = [replace(site, name=f"node_{i}") for i, site in enumerate(reversed(found))]
    with pytest.raises(InputError, match=r"'node_0' is linear, 6 to 5 channels in 1 groups, the network's 'blocks"):
        matched(layers, found, turned)


def test_choices_are_held_to_what_the_layer_can_be() -> None:
    found, formats = sites(), {"svd": Svd()}
    plan = {"/blocks/blocks.1/Conv": ("svd", (3,)), "/head/Gemm": ("dense", ())}
    assert replayed(plan, found, formats) == {"blocks.1": ("svd", (3,)), "head": ("dense", ())}
    for choice, reason in (
        (("svd", (7,)), "which 'head' cannot be"),
        (("svd", (2, 2)), "which 'head' cannot be"),
        (("cp", (2,)), "known formats are svd"),
    ):
        with pytest.raises(InputError, match=reason):
            replayed({"head": choice}, found, formats)
