"""The work of every node of a torch.fx network, with concrete shapes: what a target prices.

Operators have ONNX's names, since those are what price lists know. Nodes that depend on stored values alone are left
out, for a deployed network computes them once; what they store counts with the node that reads them, once. Left out as
well are nodes that compute shapes and not tensors, and the taking of one result out of several.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import fx, nn

from passes.core.cost import OpWork, StageWork
from passes.core.site import Geometry
from passes.fx_network import Network, forms, is_item, label, tensors_of
from passes.fx_operators import CONVOLUTIONS, bound, is_assertion, onnx_name, torch_name
from passes.fx_sites import Spot, is_kin


class Workload:
    """One walk over the network. ``spots``: sites by node."""

    def __init__(self, net: Network, spots: dict[fx.Node, Spot]) -> None:
        self.net, self.spots = net, spots
        self._counted: set[int] = set()

    def ops(self) -> tuple[OpWork, ...]:
        works = []
        for node in self.net.nodes():
            if forms(node) and not is_item(node) and not is_assertion(self.net, node) and not self.net.is_stored(node):
                works.append(self._work(node))
        return tuple(works)

    def _work(self, node: fx.Node) -> OpWork:
        reads = [r for r in dict.fromkeys(node.all_input_nodes) if forms(r)]
        live = [r for r in reads if not self.net.is_stored(r)]
        params, size_bytes = self._stored(node, [r for r in reads if self.net.is_stored(r)])
        spot = self.spots.get(node)
        inputs = [(name, form.shape) for r in live for name, form in zip(tensors_of(r), forms(r), strict=True)]
        return OpWork(
            label(node),
            onnx_name(self.net, node) if spot is None else spot.site.op,
            _site_work(spot) if spot is not None else self._stage(node, live),
            tuple(shape for _, shape in inputs),
            tuple(form.shape for form in forms(node)),
            tuple(name for name, _ in inputs),
            tensors_of(node),
            params,
            size_bytes,
        )

    def _stored(self, node: fx.Node, constants: list[fx.Node]) -> tuple[int, int]:
        """Numbers and bytes of what the node stores, or reads of what is stored, that were not counted yet."""
        found: list[torch.Tensor] = []
        if node.op == "call_module":
            module = self.net.called(node)
            # a counter of training steps is no weight
            names = {name for name, _ in module.named_buffers() if name.endswith("num_batches_tracked")}
            found += [*module.parameters(), *(b for name, b in module.named_buffers() if name not in names)]
        todo = list(constants)
        while todo:
            read = todo.pop()
            if read.op == "get_attr":
                found.append(self.net.attribute(str(read.target)))
            todo.extend(read.all_input_nodes)
        params = size_bytes = 0
        for tensor in found:
            if id(tensor) not in self._counted:
                self._counted.add(id(tensor))
                params, size_bytes = params + tensor.numel(), size_bytes + tensor.numel() * tensor.itemsize
        return params, size_bytes

    def _stage(self, node: fx.Node, live: list[fx.Node]) -> StageWork | None:
        """The work of a conv or linear node that is no site: one stage with the same multiply-adds."""
        if not is_kin(self.net, node) or not live or not forms(live[0]):
            return None
        x, y = forms(live[0])[0].shape, forms(node)[0].shape
        name = torch_name(self.net, node)
        module = self.net.called(node) if node.op == "call_module" else None
        if isinstance(module, nn.RNNBase):
            steps = prod(x[:-1])
            rows = sum(w.shape[0] for n, w in module.named_parameters() if n.startswith("weight_ih"))
            return StageWork(Geometry(), x[-1] + module.hidden_size, rows, (), steps, module.bias)
        if isinstance(module, nn.modules.conv._ConvNd):
            weight, bias = module.weight, module.bias is not None
            numbers = module.stride, module.dilation, module.groups
        elif name in CONVOLUTIONS and module is None:
            return self._convolution(node, name, x, y)
        elif isinstance(module, nn.Linear) or (name in ("linear", "matmul", "mm", "addmm") and x and y):
            return StageWork(Geometry(), x[-1], y[-1], (), prod(y[:-1]), name in ("linear", "addmm"))
        else:
            return None
        if len(x) != weight.ndim:
            return None
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        return _fitted(tuple(weight.shape[2:]), *numbers, transposed, x, y, bias)

    def _convolution(self, node: fx.Node, name: str, x: tuple[int, ...], y: tuple[int, ...]) -> StageWork | None:
        order = ("input", "weight", "bias", "stride", "padding")
        rest = ("output_padding", "groups", "dilation") if name == "convtranspose" else ("dilation", "groups")
        given = bound(node, (*order, *rest))
        weight = given.get("weight")
        if name == "convolution" or not isinstance(weight, fx.Node) or len(forms(weight)) != 1:
            return None
        shape = forms(weight)[0].shape
        numbers = given.get("stride", 1), given.get("dilation", 1), given.get("groups", 1)
        if len(shape) != len(x) or not isinstance(numbers[2], int):
            return None
        return _fitted(shape[2:], *numbers, name == "convtranspose", x, y, given.get("bias") is not None)


def _fitted(
    kernel: tuple[int, ...],
    strides: object,
    dilations: object,
    groups: int,
    transposed: bool,
    x: tuple[int, ...],
    y: tuple[int, ...],
    bias: bool,
) -> StageWork | None:
    """A stage that gives ``y`` for ``x``, whatever its padding does; None where none does."""
    n = len(kernel)

    def each(value: object) -> tuple[int, ...]:
        parts = tuple(value) if isinstance(value, tuple | list) else (value,) * n
        return tuple(part if isinstance(part, int) else 1 for part in parts)

    geometry = Geometry(kernel, each(strides), each(dilations), groups=groups, transposed=transposed)
    bare = geometry.output_spatial(x[2:])
    if transposed:
        pads = tuple(max(have - want, 0) for have, want in zip(bare, y[2:], strict=True))
        outer = tuple(max(want - have, 0) for have, want in zip(bare, y[2:], strict=True))
    else:
        pads = tuple((want - have) * s for have, want, s in zip(bare, y[2:], geometry.strides, strict=True))
        outer = ()
    geometry = replace(geometry, pads=(*(0,) * n, *pads), output_padding=outer)
    if min(pads) < 0 or geometry.output_spatial(x[2:]) != y[2:]:
        return None
    return StageWork(geometry, x[1], y[1], x[2:], x[0], bias)


def _site_work(spot: Spot) -> StageWork:
    site, stage = spot.site, spot.site.stage
    return StageWork(
        stage.geometry, stage.in_channels, stage.out_channels, site.spatial, site.batch, stage.bias is not None
    )
