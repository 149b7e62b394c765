"""Nodes of an ONNX network as modules: on tensors, on sizes, and torch's own for BatchNorm and Dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from onnx import NodeProto
from torch import nn

from passes.core.site import Array
from passes.onnx_attributes import Attributes
from passes.onnx_module_ops import MODULE_OPS
from passes.onnx_module_values import RULES, Values, shape_of, values_of

Tensor = torch.Tensor
Value = Tensor | Values

NUMBERS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Split", "Expand", "Tile", "Upsample", "Pow"), (1,)),
    **dict.fromkeys((op for op in MODULE_OPS if op.startswith("Reduce")), (1,)),
    **dict.fromkeys(("Clip", "Dropout"), (1, 2)),
    **dict.fromkeys(("Pad", "Resize"), (1, 2, 3)),
    "Slice": (1, 2, 3, 4),
    "ConstantOfShape": (0,),
}
"""Inputs that are numbers of the formula: sizes, axes, bounds, exponents."""


class Refused(Exception):
    """Why a node cannot be trained; a sentence for a person."""


class Operator(nn.Module):
    """A node without state. ``fixed``: its inputs in order, None where a call brings them or where they are left out.

    ``slots``: the positions that a call's arguments go to. Gives one result, or a tuple where the node has several.
    """

    here: Tensor

    def __init__(self, node: NodeProto, opset: int, fixed: Sequence[Values | None], slots: Sequence[int]) -> None:
        super().__init__()
        self.op = node.op_type
        self.attributes = Attributes(node)
        self.opset = opset
        self.fixed = tuple(fixed)
        self.slots = tuple(slots)
        self.single = len(node.output) == 1
        self.register_buffer("here", torch.empty(0), persistent=False)  # knows the device, without any input

    def extra_repr(self) -> str:
        return self.op

    def inputs(self, given: Sequence[Value]) -> list[Any]:
        inputs: list[Any] = list(self.fixed)
        for slot, value in zip(self.slots, given, strict=True):
            inputs[slot] = value
        return inputs


class OnSizes(Operator):
    """A node that tells or computes sizes: :class:`Values` come out."""

    def forward(self, *given: Value) -> Values:
        if self.op == "Shape":
            assert isinstance(given[0], Tensor)
            return shape_of(given[0], self.attributes)
        if self.op == "Size":
            assert isinstance(given[0], Tensor)
            return Values(prod(given[0].shape))
        found = RULES[self.op](self.attributes, self.inputs(given))
        if found is None:
            raise Refused("its arithmetic on sizes is not covered")
        return found


class OnTensors(Operator):
    """A node on tensors, by :data:`MODULE_OPS`."""

    def forward(self, *given: Value) -> Tensor | tuple[Tensor, ...]:
        inputs = self.inputs(given)
        numbers = NUMBERS.get(self.op, ())
        for slot, value in enumerate(inputs):
            if isinstance(value, Values) and slot not in numbers:
                inputs[slot] = value.tensor(self.here.device)
        found = MODULE_OPS[self.op](self.attributes, inputs, self.opset)
        if found is None:
            raise Refused("its attributes or types are not covered")
        if self.op == "ConstantOfShape":
            found = [found[0].to(self.here.device)]
        return found[0] if self.single else tuple(found)


@dataclass(frozen=True)
class Batch:
    """The batch lies on ``axis`` of an input, which had ``size`` in the file, and goes to ``onto`` of the output."""

    axis: int
    size: int
    onto: int


class BatchedReshape(OnTensors):
    """A Reshape to sizes that were written down for one size of batch."""

    def __init__(
        self, node: NodeProto, opset: int, fixed: Sequence[Values | None], slots: Sequence[int], batch: Batch
    ) -> None:
        super().__init__(node, opset, fixed, slots)
        self.axis, self.size, self.onto = batch.axis, batch.size, batch.onto

    def forward(self, *given: Value) -> Tensor:
        x = given[0]
        assert isinstance(x, Tensor) and isinstance(self.fixed[1], Values)
        wanted = [x.shape[i] if s == 0 else s for i, s in enumerate(self.fixed[1].tolist())]
        if -1 in wanted:
            wanted[self.onto] = wanted[self.onto] * x.shape[self.axis] // self.size
        else:
            wanted[self.onto] = -1
        return x.reshape(wanted)


def batch_of(node: NodeProto, shape: Values | None, one: Sequence[int], two: Sequence[int]) -> Batch | None:
    """How a Reshape to ``shape`` has to follow the batch; None where it needs no help, or is no such Reshape.

    ``one`` and ``two`` are its input's shapes with a batch and with two. Elements keep their order, so what comes
    before the batch axis in the input also comes before it in the output.
    """
    changed = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if node.op_type != "Reshape" or shape is None or len(changed) != 1:
        return None
    (axis,) = changed
    asked, copies = list(shape), not Attributes(node).get("allowzero", 0)
    wanted = [one[i] if s == 0 and copies else s for i, s in enumerate(asked)]
    if -1 in wanted:
        wanted[wanted.index(-1)] = prod(one) // -prod(wanted)
    onto = next((i for i in range(len(wanted)) if prod(wanted[:i]) == prod(one[:axis])), None)
    if onto is None or asked[onto] == -1 or (asked[onto] == 0 and onto == axis):
        return None
    return Batch(axis, one[axis], onto)


def fixed_numbers(op: str, slot: int, array: Array) -> Values | None:
    """A constant as numbers of the formula; None where the operator takes it as a tensor."""
    if slot not in NUMBERS.get(op, ()):
        return None
    found = values_of(array)
    return None if found is None or (op == "Pow" and found.numel() != 1) else found


def batch_norm(node: NodeProto, ndim: int, arrays: Sequence[Array | None]) -> nn.Module:
    """The node as ``torch.nn.BatchNorm``; ``arrays``: scale, shift, mean and variance, None where computed."""
    attributes = Attributes(node)
    kinds: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
        2: nn.BatchNorm1d,
        3: nn.BatchNorm1d,
        4: nn.BatchNorm2d,
        5: nn.BatchNorm3d,
    }
    if ndim not in kinds:
        raise Refused(f"its input has {ndim} dimensions")
    if attributes.get("training_mode", 0) or any(node.output[1:]):
        raise Refused("it was exported for training; export the network for inference")
    if not attributes.get("spatial", 1):
        raise Refused("it normalises each position apart")
    if any(array is None for array in arrays):
        raise Refused("its scale, shift, mean or variance is computed")
    scale, shift, mean, var = (torch.tensor(np.asarray(array), dtype=torch.float32) for array in arrays)
    norm = kinds[ndim](len(scale), attributes.get("epsilon", 1e-5), 1 - attributes.get("momentum", 0.9))
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        for held, value in ((norm.weight, scale), (norm.bias, shift), (norm.running_mean, mean)):
            held.copy_(value)
        norm.running_var.copy_(var)
    return norm


def dropout(node: NodeProto, ratio: Array | None) -> nn.Module:
    """The node as ``torch.nn.Dropout``."""
    if any(node.output[1:]):
        raise Refused("its mask is used")
    return nn.Dropout(float(Attributes(node).get("ratio", 0.5) if ratio is None else ratio))
