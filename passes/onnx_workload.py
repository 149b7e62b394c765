"""The work of every node of an ONNX network, with concrete shapes: what a target prices.

Nodes that depend on constants alone are left out, for every runtime computes them once; what they store counts with
the node that reads them. A constant counts once, with its first reader.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import onnx_graphsurgeon as gs

from passes.core.cost import OpWork, StageWork
from passes.core.site import Geometry, Site
from passes.onnx_constants import Refusal, is_constant
from passes.onnx_sites import KIN, Reading, resolved_pads
from passes.onnx_surgery import Surgery


class Workload:
    """One walk over the network. ``readings``: sites by label."""

    def __init__(self, surgery: Surgery, readings: dict[str, Reading]) -> None:
        self.surgery, self.readings = surgery, readings
        self._constant: dict[str, bool] = {}
        self._counted: set[int] = set()

    def ops(self) -> tuple[OpWork, ...]:
        works = []
        for _, node in self.surgery.nodes():
            if not self._is_constant(node):
                works.append(self._work(node, self.readings.get(node.name)))
        return tuple(works)

    def _is_constant(self, node: gs.Node) -> bool:
        out = next((t for t in node.outputs if not t.is_empty()), None)
        return out is not None and is_constant(self.surgery, out, self._constant)

    def _work(self, node: gs.Node, spot: Reading | None) -> OpWork:
        reads = [t for t in node.inputs if not t.is_empty()]
        stored = [t for t in (*reads, *self._returned(node)) if is_constant(self.surgery, t, self._constant)]
        live = [t for t in reads if not is_constant(self.surgery, t, self._constant)]
        writes = [t for t in node.outputs if not t.is_empty()]
        params, size_bytes = self._stored(stored)
        return OpWork(
            node.name,
            node.op,
            site_work(spot.site) if spot is not None else self._stage(node),
            tuple(tuple(t.shape) if t.shape is not None else () for t in live),
            tuple(tuple(t.shape) if t.shape is not None else () for t in writes),
            tuple(t.name for t in live),
            tuple(t.name for t in writes),
            params,
            size_bytes,
        )

    def _returned(self, node: gs.Node) -> list[gs.Tensor]:
        """Constants that a body of the node returns as they are: no node in the body reads them."""
        bodies = (self.surgery.scopes[f"{node.name}/{name}"] for name in node.attrs)
        return [t for scope in bodies for t in scope.graph.outputs]

    def _stored(self, tensors: list[gs.Tensor]) -> tuple[int, int]:
        """Numbers and bytes of the constants behind ``tensors`` that were not counted yet."""
        params = size_bytes = 0
        todo = list(tensors)
        while todo:
            tensor = todo.pop()
            if id(tensor) in self._counted or tensor.is_empty():
                continue
            self._counted.add(id(tensor))
            if isinstance(tensor, gs.Constant):
                weight = self.surgery.weight_of(tensor)
                params, size_bytes = params + weight.params, size_bytes + weight.size_bytes
            elif tensor.inputs:
                node = tensor.inputs[0]
                if node.op == "Constant":
                    count, size = self._constant_node(node)
                    params, size_bytes = params + count, size_bytes + size
                todo.extend(node.inputs)
        return params, size_bytes

    def _constant_node(self, node: gs.Node) -> tuple[int, int]:
        attributes = self.surgery.attributes(node)
        tensor = attributes.get("value")
        if tensor is None:
            count = sum(len(v) if isinstance(v, list) else 1 for v in attributes.values())
            return count, 8 * count if any("int" in name for name in attributes) else 4 * count
        count = prod(tensor.dims)
        widths = {1: 4, 10: 2, 11: 8, 7: 8, 6: 4, 13: 8, 12: 4, 16: 2, 5: 2, 4: 2}
        return count, count * widths.get(tensor.data_type, 1)

    def _stage(self, node: gs.Node) -> StageWork | None:
        """The work of a conv or linear node that is no site: one stage with the same multiply-adds."""
        if node.op not in KIN:
            return None
        shapes = [None if t.is_empty() or t.shape is None else tuple(t.shape) for t in node.inputs]
        out = node.outputs[0].shape
        if out is None:
            return None
        if node.op in ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv"):
            return self._conv_stage(node, shapes, tuple(out))
        if node.op in ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "FusedMatMul"):
            return self._matmul_stage(node, shapes, tuple(out))
        if node.op in _GATES and len(shapes) > 2 and all(len(s or ()) == 3 for s in shapes[:3]):
            steps, batch, inputs = shapes[0] or ()
            directions, rows, hidden = shapes[2] or ()
            return StageWork(Geometry(), inputs + hidden, directions * rows, (), steps * batch, len(shapes) > 3)
        return None

    def _conv_stage(
        self, node: gs.Node, shapes: list[tuple[int, ...] | None], out: tuple[int, ...]
    ) -> StageWork | None:
        x, w = shapes[0], shapes[3 if node.op == "QLinearConv" else 1]
        if x is None or w is None or len(w) != len(x):
            return None
        attributes = self.surgery.attributes(node)
        transposed = node.op == "ConvTranspose"
        try:
            geometry = Geometry(
                w[2:],
                tuple(attributes.get("strides", ())),
                tuple(attributes.get("dilations", ())),
                groups=attributes.get("group", 1),
                transposed=transposed,
                output_padding=tuple(attributes.get("output_padding", ())) if transposed else (),
            )
            geometry = replace(geometry, pads=resolved_pads(geometry, attributes, x[2:], fixed=True))
        except (ValueError, ArithmeticError, LookupError, TypeError, Refusal):
            return None  # a node that nobody can run: the reader keeps it with its reason
        if geometry.output_spatial(x[2:]) != out[2:]:
            return None
        return StageWork(geometry, x[1], out[1], x[2:], x[0], len(shapes) > 2)

    def _matmul_stage(
        self, node: gs.Node, shapes: list[tuple[int, ...] | None], out: tuple[int, ...]
    ) -> StageWork | None:
        a = shapes[0]
        if not a or not out:
            return None
        inner = a[-2] if node.op == "Gemm" and self.surgery.attributes(node).get("transA", 0) else a[-1]
        return StageWork(Geometry(), inner, out[-1], (), prod(out[:-1]), node.op == "Gemm" and len(shapes) > 2)


_GATES = ("LSTM", "GRU", "RNN")


def site_work(site: Site) -> StageWork:
    """A site as it stands, as work."""
    stage = site.stage
    return StageWork(
        stage.geometry, stage.in_channels, stage.out_channels, site.spatial, site.batch, stage.bias is not None
    )
