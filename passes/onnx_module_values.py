"""Sizes and the arithmetic on them, as Python numbers: what an exporter writes between a Shape and a Reshape.

A network under training sees batches of any size, so such arithmetic is done anew in each call. It stays out of
tensors, because a tensor would have to be brought back from the device, and because a compiler can follow numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from passes.onnx_attributes import Attributes

Number = Any
"""An int, a float or a bool; under torch.compile a symbolic one."""

LIMIT = 64
"""A constant of more numbers than this is no list of sizes."""


class Values:
    """A scalar or a list of numbers; ``tolist`` and ``numel`` are those of the tensor that it stands for."""

    def __init__(self, held: Number | list[Number]) -> None:
        self.held = held

    def tolist(self) -> Any:
        return self.held

    def numel(self) -> int:
        return len(self.held) if isinstance(self.held, list) else 1

    def __iter__(self) -> Iterator[Number]:
        return iter(self.held)

    def __float__(self) -> float:
        return float(self.held[0] if isinstance(self.held, list) else self.held)

    def tensor(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.held, device=device)


def values_of(array: NDArray[Any]) -> Values | None:
    """A small constant of at most one axis as numbers; None for any other."""
    if array.ndim > 1 or array.size > LIMIT:
        return None
    return Values(array.tolist())


def shape_of(x: torch.Tensor, attributes: Attributes) -> Values:
    """The operator Shape, with the start and end of opset 15."""
    return Values(list(x.shape[attributes.get("start", 0) : attributes.get("end", None)]))


Rule = Callable[[Attributes, Sequence[Any]], Values | None]
"""Attributes and inputs (:class:`Values`, None where left out) to the result; None where it is no list of numbers."""


def _each(function: Callable[..., Number]) -> Rule:
    """Element by element, single numbers meeting every element of a list."""

    def rule(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
        held = [v.held for v in inputs if v is not None]
        lengths = {len(h) for h in held if isinstance(h, list)} - {1}
        if not any(isinstance(h, list) for h in held):
            return Values(function(*held))
        if len(lengths) > 1:
            return None
        size = lengths.pop() if lengths else 1
        wide = [(h if len(h) == size else h * size) if isinstance(h, list) else [h] * size for h in held]
        return Values([function(*row) for row in zip(*wide, strict=True)])

    return rule


def _divide(a: Number, b: Number) -> Number:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return a // b if (a < 0) == (b < 0) else -(-a // b)


def _product(*numbers: Number) -> Number:
    return math.prod(numbers)


def _gather(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
    x, index = inputs[0].held, inputs[1].held
    if not isinstance(x, list):
        return None
    return Values([x[i] for i in index] if isinstance(index, list) else x[index])


def _concat(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
    if not all(isinstance(v.held, list) for v in inputs):
        return None
    return Values([number for v in inputs for number in v.held])


def _unsqueeze(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
    return None if isinstance(inputs[0].held, list) else Values([inputs[0].held])


def _squeeze(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
    held = inputs[0].held
    return Values(held[0]) if isinstance(held, list) and len(held) == 1 else None


def _slice(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
    held, *rest = [None if v is None else v.held for v in inputs]
    if not isinstance(held, list):
        return None
    if rest:
        if not (isinstance(rest[0], list) and isinstance(rest[1], list)):
            return None
        (start,), (end,), step = rest[0], rest[1], rest[3][0] if len(rest) > 3 and rest[3] else 1
    else:
        (start,), (end,), step = attributes.get("starts", []), attributes.get("ends", []), 1
    if step < 0 and end < -len(held):
        end = None
    return Values(held[start:end:step])


def _cast(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
    to = attributes.get("to", 0)
    if to == TensorProto.BOOL:
        return _each(bool)(attributes, inputs)
    if to in (TensorProto.INT64, TensorProto.INT32):
        return _each(lambda a: a if isinstance(a, int | torch.SymInt) else int(a))(attributes, inputs)
    if to in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return _each(float)(attributes, inputs)
    return None


def _reduced(function: Callable[..., Number]) -> Rule:
    def rule(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
        held = inputs[0].held
        result = function(*held) if isinstance(held, list) else held
        return Values([result] if attributes.get("keepdims", 1) and isinstance(held, list) else result)

    return rule


def _range(attributes: Attributes, inputs: Sequence[Any]) -> Values | None:
    start, limit, delta = (v.held for v in inputs)
    if isinstance(start, float) or isinstance(delta, float):
        return Values(np.arange(start, limit, delta).tolist())
    return Values(list(range(start, limit, delta)))


RULES: dict[str, Rule] = {
    "Gather": _gather,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Cast": _cast,
    "Identity": lambda attributes, inputs: inputs[0],
    "Add": _each(lambda a, b: a + b),
    "Sub": _each(lambda a, b: a - b),
    "Mul": _each(lambda a, b: a * b),
    "Div": _each(_divide),
    "Mod": _each(lambda a, b: a % b),
    "Neg": _each(lambda a: -a),
    "Max": _each(max),
    "Min": _each(min),
    "Floor": _each(lambda a: float(math.floor(a))),
    "Ceil": _each(lambda a: float(math.ceil(a))),
    "Equal": _each(lambda a, b: a == b),
    "Where": _each(lambda c, a, b: a if c else b),
    "ReduceProd": _reduced(_product),
    "ReduceMax": _reduced(lambda *numbers: max(numbers)),
    "ReduceSum": _reduced(lambda *numbers: sum(numbers)),
    "Range": _range,
}
