"""Writes a chain into an ONNX network in place of a site.

    Conv/ConvTranspose       one Conv or ConvTranspose per stage
    Gemm                     Gemm with transB=1 (constant right) or with the constant as A (left)
    MatMul                   MatMul with the constant on its side, and an Add where the stage has a bias

Nodes are named ``<site>/<format>_<i>``; values are stored in the type that the site's weight was stored in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import NodeProto, helper

from passes.core.site import Array, Chain, Stage
from passes.onnx_sites import Reading
from passes.onnx_surgery import Scope, Surgery


def emit(surgery: Surgery, spot: Reading, chain: Chain, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Replaces the nodes of ``spot`` by ``chain`` and drops weights that nothing else reads; returns the new labels.

    ``names``: labels of the stages, if not ``<site>/<format>_<i>``.
    """
    original = surgery.messages[spot.nodes[0].name]
    old_inputs = [t for node in spot.nodes for t in node.inputs if t is not spot.source]
    inner = [t for node in spot.nodes for t in node.outputs if t is not spot.target]
    at = surgery.position(spot.nodes[0])
    for node in spot.nodes:
        surgery.remove(node)
    # The last stage stands where the site's last node stood at the earliest; all readers come after it.
    x, labels = spot.source, []
    for index, stage in enumerate(chain.stages):
        last = index == len(chain) - 1
        name = names[index] if names else f"{spot.site.name}/{chain.format}_{index}"
        writer = _Writer(surgery, spot, at, name, stage, first=index == 0)
        y = spot.target if last else writer.between()
        nodes = writer.write(x, y)
        if last:
            _carry(surgery, original, nodes[-1])
        labels.append(nodes[0].name)
        at += len(nodes)
        x = y
    surgery.prune([t for t in (*old_inputs, *inner) if not (t.is_empty() or t is spot.source)])
    return tuple(labels)


def _carry(surgery: Surgery, original: NodeProto, node: gs.Node) -> None:
    """What the replaced node had to say (doc string, metadata, placement) moves to the node that writes its output."""
    message = surgery.messages[node.name]
    if original.HasField("doc_string"):
        message.doc_string = original.doc_string
    message.metadata_props.extend(original.metadata_props)
    message.device_configurations.extend(original.device_configurations)


class _Writer:
    """One stage at one place: ``at`` is the position of its first node, ``first`` whether it reads the site's input."""

    def __init__(self, surgery: Surgery, spot: Reading, at: int, name: str, stage: Stage, first: bool) -> None:
        self.surgery, self.spot, self.at, self.name, self.stage, self.first = surgery, spot, at, name, stage, first
        self.scope: Scope = spot.scope
        self.batch_shape = spot.site.input_shape

    def between(self) -> gs.Variable:
        """A new tensor for the stage's output."""
        return gs.Variable(self.surgery.fresh_name(f"{self.name}/output"), dtype=self.spot.dtype)

    def write(self, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
        if self.stage.geometry.ndim:
            nodes = self._conv(x, y)
        elif self.spot.site.op == "Gemm":
            nodes = self._gemm(x, y)
        else:
            nodes = self._matmul(x, y)
        y.shape = self._output_shape(x)
        return nodes

    def _output_shape(self, x: gs.Tensor) -> tuple[int, ...]:
        stage, shape = self.stage, list(x.shape)
        if stage.geometry.ndim:
            return (shape[0], stage.out_channels, *stage.geometry.output_spatial(tuple(shape[2:])))
        if self.spot.turned and self.first:
            shape = shape[::-1]
        shape[self.spot.out_axis] = stage.out_channels
        return tuple(shape)

    def _conv(self, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
        g = self.stage.geometry
        op = "ConvTranspose" if g.transposed else "Conv"
        message = helper.make_node(
            op,
            [],
            [],
            self.name,
            kernel_shape=g.kernel,
            strides=g.strides,
            dilations=g.dilations,
            pads=g.pads,
            group=g.groups,
        )
        if any(g.output_padding):
            message.attribute.append(helper.make_attribute("output_padding", g.output_padding))
        weight = self.stage.weight
        if g.transposed:
            weight = self.stage.grouped_weight().swapaxes(1, 2)
            weight = weight.reshape(self.stage.in_channels, -1, *g.kernel)
        inputs = [x, self._constant("weight", weight)]
        if self.stage.bias is not None:
            inputs.append(self._constant("bias", self.stage.bias))
        return [self.surgery.insert(self.scope, self.at, message, inputs, [y])]

    def _gemm(self, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
        turned = int(self.spot.turned and self.first)
        weight = self._constant("weight", _dense(self.stage))
        bias = self.stage.bias
        if bias is None and self.surgery.opset < 11:  # C became optional in opset 11
            bias = np.zeros(self.stage.out_channels, self.stage.weight.dtype)
        if self.spot.left:
            message = helper.make_node("Gemm", [], [], self.name, transA=0, transB=turned)
            inputs, wide = [weight, x], [-1, 1]
        else:
            message = helper.make_node("Gemm", [], [], self.name, transA=turned, transB=1)
            inputs, wide = [x, weight], [-1]
        if bias is not None:
            inputs.append(self._constant("bias", bias.reshape(wide)))
        return [self.surgery.insert(self.scope, self.at, message, inputs, [y])]

    def _matmul(self, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
        message = helper.make_node("MatMul", [], [], self.name)
        dense = _dense(self.stage)
        weight = self._constant("weight", dense if self.spot.left else dense.T)
        inputs = [weight, x] if self.spot.left else [x, weight]
        if self.stage.bias is None:
            return [self.surgery.insert(self.scope, self.at, message, inputs, [y])]
        product = gs.Variable(self.surgery.fresh_name(f"{self.name}/product"), self.spot.dtype, self._output_shape(x))
        matmul = self.surgery.insert(self.scope, self.at, message, inputs, [product])
        bias = self._constant("bias", self.stage.bias.reshape((-1, 1) if self.spot.left else (-1,)))
        message = helper.make_node("Add", [], [], f"{self.name}/bias_add")
        return [matmul, self.surgery.insert(self.scope, self.at + 1, message, [product, bias], [y])]

    def _constant(self, what: str, value: Array) -> gs.Constant:
        stored = np.ascontiguousarray(value, dtype=self.spot.dtype)
        return self.surgery.add_weight(self.scope, f"{self.name}/{what}", stored)


def _dense(stage: Stage) -> Array:
    """The (O, I) matrix of a linear stage; block-diagonal where it has groups."""
    groups = stage.geometry.groups
    if groups == 1:
        return stage.weight
    out = np.zeros((stage.out_channels, stage.in_channels), stage.weight.dtype)
    rows, columns = stage.out_channels // groups, stage.in_channels // groups
    for g, block in enumerate(stage.grouped_weight()):
        out[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = block
    return out
