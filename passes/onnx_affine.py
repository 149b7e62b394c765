"""Nodes behind a site that scale and shift its channels: what fold_batchnorm folds.

BatchNormalization (inference), Mul, Div, Add, Sub with one constant per channel
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.graph import Affine
from passes.onnx_constants import Refusal, constant
from passes.onnx_sites import Reading, along
from passes.onnx_surgery import Surgery

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def affine_after(surgery: Surgery, spot: Reading) -> Affine | None:
    """The affine node that is the only reader of the site's output, or None."""
    node = surgery.only_reader(spot.scope, spot.target)
    if node is None or node.domain:
        return None
    try:
        if node.op == "BatchNormalization":
            scale, shift = _batchnorm(surgery, spot, node)
        elif node.op in ("Mul", "Div", "Add", "Sub"):
            if spot.site.op == "MatMul" and node.op in ("Add", "Sub"):
                return None  # a MatMul has no bias to fold it into: it would be written as an Add again
            scale, shift = _elementwise(surgery, spot, node)
        else:
            return None
    except Refusal:
        return None  # not affine per channel: it is left where it stands
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return None
    return Affine(node.name, node.op, spot.site, scale, shift)


def _batchnorm(surgery: Surgery, spot: Reading, node: gs.Node) -> Pair:
    """gamma * (x - mean) / sqrt(var + eps) + beta. In training mode the statistics are not constant."""
    attributes = surgery.attributes(node)
    if attributes.get("training_mode", 0) or not attributes.get("spatial", 1):
        raise Refusal("BatchNormalization in training mode")
    if any(not out.is_empty() for out in node.outputs[1:]):
        raise Refusal("BatchNormalization with several outputs")
    if node.inputs[0] is not spot.target or spot.out_axis % len(spot.site.output_shape) != 1:
        raise Refusal("BatchNormalization works on another axis")
    gamma, beta, mean, var = (constant(surgery, t).value.astype(np.float64) for t in node.inputs[1:5])
    scale = gamma / np.sqrt(var + attributes.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def _elementwise(surgery: Surgery, spot: Reading, node: gs.Node) -> Pair:
    first = node.inputs[0] is spot.target
    value = constant(surgery, node.inputs[1] if first else node.inputs[0]).value
    c = along(value, spot.site.output_shape, spot.out_axis, "the operand").astype(np.float64)
    one, zero = np.ones_like(c), np.zeros_like(c)
    if node.op == "Mul":
        return c, zero
    if node.op == "Add":
        return one, c
    if node.op == "Sub":
        return (one, -c) if first else (-one, c)
    if not first or not c.all():
        raise Refusal("a division by the output, or by zero")
    return 1.0 / c, zero
