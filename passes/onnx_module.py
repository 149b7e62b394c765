"""An ONNX network as a trainable torch module, and the trained weights back in the ONNX network.

    Conv, Gemm, ... that is a site     a StageLayer of its own, called once
    BatchNormalization                 torch.nn.BatchNorm of the same axes, running statistics included
    Dropout                            torch.nn.Dropout of the node's ratio: it drops in training, whatever was exported
    any other operator                 a module without state; its constants are parameters or buffers of the root
    Shape and arithmetic on sizes      Python numbers, so that batches may have any size

Trained besides layers and BatchNorm: slopes, gains and shifts of normalisations, weights of layers that are no sites,
and per-channel constants of Add, Sub, Mul and Div that do not meet the network's input. Everything else, single
numbers and tables above all, is part of the formula and stays as it is. Computing is in float32, whatever the file
stores.

Refused, by node and reason: control flow, recurrent layers, quantized operators, operators of other domains, and
networks that cannot take a batch because the size of one is written into them.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from passes.core.site import Array, Chain, Site, Stage
from passes.errors import UnsupportedError, VerificationError
from passes.onnx_graph import OnnxGraph
from passes.onnx_module_builder import Builder
from passes.training.layers import ChainLayer, StageLayer
from passes.training.network import TrainableNetwork

Tensor = torch.Tensor

RELATIVE_L2 = 1e-3
"""torch against onnxruntime, float32 in both: beyond this one computes something else."""
HALF_RELATIVE_L2 = 2e-2
"""The same where onnxruntime computes in half precision."""
MAX_ABS = 1e-5
"""For outputs that are almost 0, of which a relative error says nothing."""


def to_trainable(graph: OnnxGraph) -> TrainableNetwork:
    """The network as a module that trains and takes batches of any size; verified against onnxruntime.

    Raises UnsupportedError that names the node, its operator and the reason where it cannot be trained,
    VerificationError where the module computes something else than onnxruntime.
    """
    builder = Builder(graph, [graph.random_feeds(seed) for seed in (0, 1)])
    network = builder.build()
    runs = [graph.run(feeds) for feeds in builder.feeds]
    limit = HALF_RELATIVE_L2 if builder.half else RELATIVE_L2
    for name, (one, two), *wanted in zip(network.outputs, builder.results, *runs, strict=True):
        _compare(name, one, wanted[0], limit)
        axis = next((i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b), None)
        both = wanted[0] if axis is None else np.concatenate(wanted, axis)
        depends = axis is None and bool(_differs(torch.from_numpy(wanted[1]), wanted[0], limit))
        if depends or both.shape != two.shape or _differs(two, both, limit):
            raise UnsupportedError(
                f"output '{name}' of two samples is not that of each by itself: the network mixes its samples, or the "
                "size of a batch is written into it; it cannot be trained on batches"
            )
    return network


def trained(graph: OnnxGraph, network: TrainableNetwork) -> OnnxGraph:
    """A copy of ``graph``, which ``network`` was made of, with the constants that the network has now.

    A layer whose structure is still the site's keeps its node and, where the file stores its weight plainly, the names
    of its initializers; any other is put in as :meth:`OnnxGraph.replace` does. Names, shapes and metadata of inputs
    and outputs stay. Raises TypeError for a layer that is neither StageLayer nor ChainLayer, VerificationError where
    onnxruntime on the result and the module disagree.
    """
    result = graph.clone()
    sites = {site.name: site for site in result.sites().sites}
    stages: dict[str, Stage] = {}
    chains: dict[str, Chain] = {}
    for name in network.sites:
        chain = _chain(name, network.layer(name))
        if len(chain) == 1 and same_structure(sites[name], chain.stages[0]):
            stages[name] = chain.stages[0]
        else:
            chains[name] = chain
    constants = {name: _array(network.module.get_parameter(path)) for path, name in network.constants.items()}
    norms = {name: _normed(network.module.get_submodule(path)) for path, name in network.norms.items()}
    result.renew(stages, constants, norms)
    for name, chain in chains.items():
        result.replace(sites[name], chain)
    _verify(result, network)
    return result


def same_structure(site: Site, stage: Stage) -> bool:
    """True if the stage differs from the site's in numbers alone."""
    one, two = site.stage, stage
    same = one.geometry == two.geometry and one.weight.shape == two.weight.shape
    return same and (one.bias is None) == (two.bias is None)


def _chain(name: str, layer: nn.Module) -> Chain:
    if isinstance(layer, StageLayer):
        return Chain((layer.stage(),))
    if isinstance(layer, ChainLayer):
        if len(layer.stages()) != len(layer):
            raise TypeError(f"the layer of '{name}' holds more than stages; fold that first")
        return layer.chain()
    raise TypeError(f"the layer of '{name}' is a {type(layer).__name__}, expected a StageLayer or a ChainLayer")


def _normed(norm: nn.Module) -> tuple[Array, Array, Array, Array]:
    """Scale, shift, mean and variance, in the order of the ONNX node's inputs."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    return _array(norm.weight), _array(norm.bias), _array(norm.running_mean), _array(norm.running_var)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().float().cpu().contiguous().numpy().copy()


def _verify(result: OnnxGraph, network: TrainableNetwork) -> None:
    result.check()
    half = any(spec.dtype == "float16" for spec in (*result.inputs, *result.outputs))
    module = copy.deepcopy(network.module).cpu().eval()
    for seed in (2, 3):
        feeds = result.random_feeds(seed)
        with torch.no_grad():
            found = module(*(torch.from_numpy(feeds[name]) for name in network.inputs))
        found = found if isinstance(found, tuple) else (found,)
        for name, one, wanted in zip(network.outputs, found, result.run(feeds), strict=True):
            _compare(name, one, wanted, HALF_RELATIVE_L2 if half else RELATIVE_L2)


def _compare(name: str, found: Tensor, wanted: Array, limit: float) -> None:
    if found.shape != wanted.shape:
        raise VerificationError(
            f"output '{name}' has shape {tuple(found.shape)} in torch and {wanted.shape} in onnxruntime"
        )
    error = _differs(found, wanted, limit)
    if error:
        raise VerificationError(
            f"output '{name}' in torch differs from onnxruntime's by {error:.2g} (relative L2), at most {limit:g} was "
            "expected"
        )


def _differs(found: Tensor, wanted: Array, limit: float) -> float:
    """The relative L2 error where it is beyond the limit, else 0."""
    one, two = found.detach().double().numpy(), np.asarray(wanted, np.float64)
    gap = one - two
    if not gap.size or (np.isfinite(gap).all() and np.abs(gap).max() <= MAX_ABS):
        return 0.0
    error = float(np.linalg.norm(gap)) / max(float(np.linalg.norm(two)), 1e-30)
    return 0.0 if error <= limit else error if np.isfinite(error) else np.inf
