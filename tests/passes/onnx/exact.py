"""Chains that equal a layer exactly, built with plain NumPy: what surgery is tested with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from passes.core.site import Chain, Geometry, Stage

MODELS = Path(__file__).parents[3].parent / "shared" / "models"


def dense(stage: Stage) -> Chain:
    return Chain((stage,))


def outer(stage: Stage) -> Chain:
    """The layer to r channels, then a pointwise one to the outputs: an SVD per group, at full rank."""
    weight = stage.grouped_weight().astype(np.float64)
    groups, out, *rest = weight.shape
    u, s, vt = np.linalg.svd(weight.reshape(groups, out, -1), full_matrices=False)
    rank = s.shape[1]
    first = (s[:, :, None] * vt).reshape(groups * rank, *rest)
    second = u.reshape(groups * out, rank, *(1,) * stage.geometry.ndim)
    dtype = stage.weight.dtype
    point = Geometry.pointwise(stage.geometry.ndim, stage.geometry.groups)
    stages = Stage(first.astype(dtype), None, stage.geometry), Stage(second.astype(dtype), stage.bias, point)
    return Chain(stages, "outer", (rank,))


def inner(stage: Stage) -> Chain:
    """A pointwise layer to r channels, then the layer from these: the SVD over input channels, at full rank."""
    weight = stage.grouped_weight().astype(np.float64)
    groups, out, channels, *kernel = weight.shape
    columns = np.moveaxis(weight, 2, -1).reshape(groups, -1, channels)
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    rank = s.shape[1]
    second = np.moveaxis((u * s[:, None, :]).reshape(groups, out, *kernel, rank), -1, 2)
    dtype = stage.weight.dtype
    point = Geometry.pointwise(stage.geometry.ndim, groups)
    first = vt.reshape(groups * rank, channels, *(1,) * stage.geometry.ndim).astype(dtype)
    last = second.reshape(groups * out, rank, *kernel).astype(dtype)
    return Chain((Stage(first, None, point), replace(stage, weight=last)), "inner", (rank,))


def run(model: ModelProto, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The reference: onnxruntime without optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def model_of(
    nodes: list[Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, NDArray[Any]],
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    **fields: Any,
) -> ModelProto:
    """A model from nodes, shapes of inputs and outputs by name (None: open) and initializers."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    fields.setdefault("ir_version", 8)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], **fields)
