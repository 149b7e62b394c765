"""A torch module as an ONNX network in which everything can be found again by its path in the module.

    nn.Conv2d at layer1.0.conv1     node layer1.0.conv1, initializers layer1.0.conv1.weight and layer1.0.conv1.bias
    a second call of it             node layer1.0.conv1_1, as in :mod:`passes.fx_trace`
    any other parameter             an initializer of its own, by its path

Exported by torch.onnx from a TorchScript trace: that keeps BatchNorm nodes and parameters as they are, without folding
and without a further package.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import GraphProto, ModelProto, NodeProto
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.errors import UnsupportedError, VerificationError, first_line
from passes.fx_emit import layer_of
from passes.fx_trace import baked, distinct
from passes.torch_apply import pads_of
from passes.training.layers import StageLayer

Tensor = torch.Tensor

OPSET = 17
RELATIVE_L2 = 1e-4
"""onnxruntime on the exported network against torch on the module, both in float32."""
MAX_ABS = 1e-5
"""For outputs that are almost 0, of which a relative error says nothing."""

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_UNPACK = frozenset({"Transpose", "Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze"})


def to_onnx(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_batch: bool = True,
) -> ModelProto:
    """The network that ``module`` computes in inference mode, verified in onnxruntime on ``inputs``.

    ``dynamic_batch``: the first dimension of every input and output is symbolic, called batch. The module itself stays
    as it is. Raises UnsupportedError where torch cannot export it, VerificationError where onnxruntime computes
    something else than torch.
    """
    own = _plain(baked(copy.deepcopy(module).cpu().eval()))
    given = tuple(x.detach().cpu() for x in inputs)
    named = [name for name, x in zip(input_names, given, strict=True) if x.ndim]
    axes = {name: {0: "batch"} for name in (*named, *output_names)} if dynamic_batch else None
    file = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            expected = own(*given)
            torch.onnx.export(
                own,
                given,
                file,  # type: ignore[arg-type]  # the exporter without dynamo writes to anything that is open
                dynamo=False,
                opset_version=OPSET,
                # PRESERVE, because the exporter folds BatchNorm into convolutions in EVAL mode
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_axes=axes,
            )
        model = onnx.load_model_from_string(file.getvalue())
        _own_initializers(model.graph)
        _name_layers(model.graph)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the exporter lets through whatever it meets
        reason = first_line(error)
        raise UnsupportedError(f"{type(module).__name__} cannot be exported to ONNX: {reason}") from error
    leaves = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    _verify(model, dict(zip(input_names, given, strict=True)), leaves)
    return model


def _plain(module: nn.Module) -> nn.Module:
    """Spelled so that a trace follows it: torch's own layers instead of StageLayers, and methods that take sizes."""
    if isinstance(module, fx.GraphModule):
        for node in list(module.graph.nodes):
            method = _METHODS.get(node.target) if node.op == "call_function" else None
            if method is not None:
                _call_method(module.graph, node, method)
        module.recompile()
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding == "same":
            _pad_by_numbers(layer)
        if isinstance(layer, StageLayer) and path:
            plain = layer_of(layer.stage(), layer.channel_axis, layer.weight.dtype)
            if not isinstance(plain, StageLayer):
                module.set_submodule(path, plain, strict=True)
    return module


def _pad_by_numbers(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Spells "same" out where both sides get as much: the exporter refuses it for dilated kernels."""
    pads = pads_of(layer.padding, layer.kernel_size, layer.dilation)
    begins, ends = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    if begins == ends:
        layer.padding = begins


_ATEN = torch.ops.aten
_METHODS: dict[Any, str] = {
    _ATEN.sym_size.int: "size",
    **dict.fromkeys((_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default), "reshape"),
    _ATEN.expand.default: "expand",
    _ATEN.repeat.default: "repeat",
}
"""Operators of torch.export that give or take sizes. As operators they deal in numbers, which a trace takes for
constants; as methods they are followed."""


def _call_method(graph: fx.Graph, node: fx.Node, method: str) -> None:
    x, sizes = node.args[0], node.args[1]
    arguments = sizes if isinstance(sizes, list | tuple) else (sizes,)
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.call_method(method, (x, *arguments)))
    graph.erase_node(node)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself: it is deprecated, and it warns of every number that it traces."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _own_initializers(graph: GraphProto) -> None:
    """Undoes the exporter's sharing of equal initializers: each parameter has its own again, under its own name."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {info.name for info in graph.output}
    for node in list(graph.node):
        if node.op_type == "Identity" and node.input[0] in stored and node.output[0] not in outputs:
            own = graph.initializer.add()
            own.CopyFrom(stored[node.input[0]])
            own.name = node.output[0]
            graph.node.remove(node)


def _name_layers(graph: GraphProto) -> None:
    """Names every layer after the module whose weight it reads."""
    stored = {tensor.name for tensor in graph.initializer}
    writers = {name: node for node in graph.node for name in node.output}
    paths = [(node, _module_path(node, stored, writers)) for node in graph.node if node.op_type in _LAYERS]
    layers = [(node, path) for node, path in paths if path is not None]
    for (node, _), name in zip(layers, distinct([path for _, path in layers]), strict=True):
        node.name = name


def _module_path(node: NodeProto, stored: set[str], writers: dict[str, NodeProto]) -> str | None:
    for name in node.input[:2]:
        while name not in stored and name in writers and writers[name].op_type in _UNPACK:
            name = writers[name].input[0]
        if name in stored:
            return name.removesuffix(".weight") if name.endswith(".weight") else None
    return None


def _verify(model: ModelProto, feeds: dict[str, Tensor], expected: Sequence[Tensor]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        found = session.run(None, {i.name: feeds[i.name].numpy() for i in session.get_inputs()})
    except Exception as error:  # onnxruntime has an exception for each state
        reason = first_line(error)
        raise UnsupportedError(f"onnxruntime cannot run the exported network: {reason}") from error
    for info, one, two in zip(model.graph.output, found, expected, strict=True):
        gap = np.asarray(one, np.float64) - two.double().numpy()
        error_l2 = float(np.linalg.norm(gap)) / max(float(two.double().norm()), 1e-30)
        if gap.size and not (error_l2 <= RELATIVE_L2 or np.abs(gap).max() <= MAX_ABS):
            raise VerificationError(
                f"exported to ONNX, output '{info.name}' differs from torch's by {error_l2:.2g} (relative L2), at most "
                f"{RELATIVE_L2:g} was expected"
            )
