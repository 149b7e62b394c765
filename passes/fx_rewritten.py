"""The torch module of a network that was rewritten as ONNX: the same chains and numbers, in the module they came from.

A network that was exported by :mod:`passes.fx_export` and lowered comes back into its own module, layer by layer and by
name:

    site a, layer1.0.conv1             nodes a/tucker2_0, a/tucker2_1 of the ONNX network: a chain in the site's place
    a site with other numbers          the layer keeps its name and gets them
    any other parameter or buffer      the initializer of its path

Where that does not give what onnxruntime computes, the module is made of the ONNX network instead, node by node.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from torch import fx
from torch.utils import _pytree as pytree

from passes.core.site import Array, Chain, Site, Stage
from passes.errors import RankcError, VerificationError, first_line
from passes.fx_graph import FxGraph
from passes.onnx_graph import OnnxGraph
from passes.onnx_module import same_structure, to_trainable

Tensor = torch.Tensor

RELATIVE_L2 = 1e-4
"""The module against onnxruntime on the ONNX network: the same numbers, so only the order of sums may differ."""
MAX_ABS = 1e-5
"""For outputs that are almost 0, of which a relative error says nothing."""


class _Other(Exception):
    """The ONNX network is not the module's, layer by layer; the message says where."""


def rewritten(source: FxGraph, network: OnnxGraph) -> fx.GraphModule:
    """A module of its own that computes what ``network`` computes, made of ``source``, which that was exported from.

    Takes inputs in their order, as the source does. Raises VerificationError where no way gives the outputs of
    onnxruntime.
    """
    feeds = [network.random_feeds(seed) for seed in (0, 1)]
    wanted = [network.run(one) for one in feeds]
    try:
        graph = source.clone()
        _fill(graph, network)
        module = copy.deepcopy(graph.module)
        _check(module, source, feeds, wanted)
        return _owned(module)
    except (_Other, RankcError) as error:
        reason = str(error)
    try:
        module = _called_like(source, to_trainable(network).module, [spec.name for spec in network.inputs])
        _check(module, source, feeds, wanted)
    except RankcError as error:
        raise VerificationError(
            f"the rewritten network cannot be brought back into torch: {reason}; by its nodes: {error}"
        ) from error
    return _owned(module)


def _called_like(source: FxGraph, module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """``module``, whose inputs are called ``names``, with the inputs of ``source`` and the structure of its result.

    What exporting lost: inputs that nothing reads, dictionaries, values that are no tensors.
    """
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    given = dict(zip(names, module.graph.find_nodes(op="placeholder"), strict=True))
    for spec, node in zip(source.inputs, source.module.graph.find_nodes(op="placeholder"), strict=True):
        made[given.get(spec.name, node)] = graph.placeholder(str(node.target))
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            made[node] = graph.node_copy(node, made.__getitem__)
    old, new = source.module.graph.output_node(), module.graph.output_node()
    results = iter([made[leaf] for leaf in pytree.tree_leaves(new.args[0]) if isinstance(leaf, fx.Node)])
    graph.output(fx.node.map_arg(old.args[0], lambda node: next(results)))
    return fx.GraphModule(module, graph)


def _owned(module: fx.GraphModule) -> fx.GraphModule:
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module.eval()


def _fill(graph: FxGraph, network: OnnxGraph) -> None:
    """Puts chains and numbers of ``network`` into ``graph``. Raises _Other where names or shapes differ."""
    stored = _constants(network)
    graph.drop_identities()
    _fold(graph, stored)
    graph.drop_dead_code()
    _copy_constants(graph.module, stored)
    sites = {site.name: site for site in graph.sites().sites}
    found = network.sites().sites
    stages = _by_site(found, list(sites))
    for name, site in reversed(sites.items()):
        parts = stages[name]
        layers = [_biased(part.stage, stored.get(f"{part.name}/bias")) if _bare(part) else part.stage for part in parts]
        if site.stage.bias is not None and _bare(parts[-1]):
            layers[-1] = _biased(layers[-1], stored.get(f"{name}.bias", site.stage.bias))
        chain = Chain(tuple(layers), _format(name, parts[0].name))
        one = chain.stages[0]
        if len(chain) == 1 and same_structure(site, one):
            if not _equal(site.stage, one):
                graph.renew(site, one)
        else:
            graph.replace(site, chain)


def _fold(graph: FxGraph, stored: Mapping[str, Array]) -> None:
    """Folds what was folded in the ONNX network: of that, no constant is left there."""
    folded = True
    while folded:
        folded = False
        for affine in graph.affines():
            if not stored.keys() & graph.constants_of(affine.node):
                graph.fold(affine, affine.site.stage.affine(affine.scale, affine.shift))
                folded = True
                break


def _by_site(found: Sequence[Site], names: Sequence[str]) -> dict[str, list[Site]]:
    """The layers of the ONNX network by the site that they stand for, each site's in order.

    A layer that was fused from those of two sites goes to the first of them, or to the second where that has no other.
    """
    bases = [[_base(part, names) for part in layer.name.split("+")] for layer in found]
    alone = {base[0] for base in bases if len(set(base)) == 1}
    stages: dict[str, list[Site]] = {name: [] for name in names}
    for layer, base in zip(found, bases, strict=True):
        takes = base[0] if base[-1] in alone or base[0] not in alone else base[-1]
        stages[takes].append(layer)
    for name, layers in stages.items():
        if not layers:
            raise _Other(f"no layer stands for '{name}'")
    return stages


def _base(part: str, names: Sequence[str]) -> str:
    fitting = [name for name in names if part == name or part.startswith(f"{name}/")]
    if not fitting:
        raise _Other(f"'{part}' is of no layer of the module")
    return max(fitting, key=len)


def _format(name: str, label: str) -> str:
    """``tucker2`` of ``<site>/tucker2_0``."""
    return label.partition("+")[0].removeprefix(name).strip("/").rpartition("_")[0] or "dense"


def _bare(layer: Site) -> bool:
    """True for a layer whose bias, if it has one, is added by a node of its own."""
    return layer.op == "MatMul"


def _biased(stage: Stage, bias: Array | None) -> Stage:
    """The stage with what the ONNX network adds behind it."""
    if bias is None:
        return stage
    if bias.size != stage.out_channels:
        raise _Other(f"a bias of {bias.size} numbers stands behind a layer of {stage.out_channels} channels")
    bias = bias.reshape(-1).astype(stage.weight.dtype)
    return replace(stage, bias=bias if stage.bias is None else stage.bias + bias)


def _equal(one: Stage, other: Stage) -> bool:
    same = np.array_equal(one.weight, other.weight)
    if one.bias is None or other.bias is None:
        return same and one.bias is other.bias
    return same and np.array_equal(one.bias, other.bias)


def _constants(network: OnnxGraph) -> dict[str, Array]:
    model, outside = network.skeleton()
    held = {t.name: outside[t.name] for t in model.graph.initializer if t.name in outside}
    return held | {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name not in outside}


def _copy_constants(module: fx.GraphModule, stored: Mapping[str, Array]) -> None:
    """Parameters and buffers that kept their name, by their path; new tensors, since clones share the old ones."""
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        value = stored.get(path)
        if value is None or value.shape != tuple(tensor.shape) or not tensor.is_floating_point():
            continue
        if np.array_equal(value, tensor.detach().numpy()):
            continue
        owner, _, name = path.rpartition(".")
        holder = module.get_submodule(owner)
        fresh = torch.tensor(value, dtype=tensor.dtype)
        setattr(holder, name, torch.nn.Parameter(fresh) if isinstance(tensor, torch.nn.Parameter) else fresh)


def _check(
    module: fx.GraphModule, source: FxGraph, feeds: Sequence[Mapping[str, Any]], wanted: Sequence[Sequence[Array]]
) -> None:
    drawn = source.random_feeds(0)  # for inputs that the export left out, since nothing reads them
    for one, outputs in zip(feeds, wanted, strict=True):
        inputs = [torch.from_numpy(np.asarray(one.get(spec.name, drawn[spec.name]))) for spec in source.inputs]
        try:
            with torch.no_grad():
                result = module(*inputs)
        except Exception as error:  # layers that do not fit together
            raise _Other(first_line(error)) from error
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        for spec, found, want in zip(source.outputs, leaves, outputs, strict=True):
            gap = found.double().numpy() - np.asarray(want, np.float64)
            error_l2 = float(np.linalg.norm(gap)) / max(float(np.linalg.norm(want)), 1e-30)
            if gap.size and not (error_l2 <= RELATIVE_L2 or np.abs(gap).max() <= MAX_ABS):
                raise _Other(f"output '{spec.name}' differs from onnxruntime's by {error_l2:.2g} (relative L2)")
