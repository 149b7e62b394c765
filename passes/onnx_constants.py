"""The value of a tensor that is constant, however the exporter wrote it down.

    initializer | Constant  ->  Transpose, Identity, Cast, Reshape, Flatten, Squeeze, Unsqueeze  ->  value

Refuses with a reason: values that are computed, dequantized, sparse or of a type that NumPy cannot calculate with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from passes.core.site import Array
from passes.onnx_surgery import Surgery


class Refusal(Exception):
    """Why a node is kept as it is; the message is a sentence for a person."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A value and where it comes from.

    ``key`` is equal for one stored tensor unpacked in one way. ``dtype`` is the type it is stored in; a ``value`` in
    half precision is handed out in single.
    """

    value: Array
    key: str
    dtype: np.dtype[Any]


def is_constant(surgery: Surgery, tensor: gs.Tensor, known: dict[str, bool] | None = None) -> bool:
    """True if ``tensor`` depends on stored values alone, through whatever deterministic nodes without a body."""
    if isinstance(tensor, gs.Constant):
        return True
    if tensor.is_empty() or not tensor.inputs:
        return False
    node = tensor.inputs[0]
    known = {} if known is None else known
    if node.name not in known:
        known[node.name] = False
        pure = not node.attrs and not node.domain and node.op not in _RANDOM
        known[node.name] = pure and all(t.is_empty() or is_constant(surgery, t, known) for t in node.inputs)
    return known[node.name]


def constant(surgery: Surgery, tensor: gs.Tensor, what: str = "weight") -> Constant:
    """The value of ``tensor``. Raises Refusal, naming it as ``what``, where it is not a plain constant."""
    if isinstance(tensor, gs.Constant):
        weight = surgery.weight_of(tensor)
        if weight.sparse is not None:
            raise Refusal(f"its {what} is stored sparse")
        if weight.array is None:
            raise Refusal(f"its {what} is stored as {weight.type_name}")
        home = next((path for path, s in surgery.scopes.items() if s.weights.get(tensor.name) is tensor), "")
        return Constant(weight.floats(), f"{home}:{tensor.name}", weight.array.dtype)
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None:
        raise Refusal(f"its {what} is not a constant")
    if node.op == "Constant" and not node.domain:
        value = _constant_node(surgery, node, what)
        return Constant(_wide(value), f"{surgery.homes[node.name]}:{tensor.name}", value.dtype)
    if node.op == "DequantizeLinear":
        raise Refusal(f"its {what} is quantized: it stands behind DequantizeLinear")
    unpack = _UNPACK.get(node.op) if not node.domain else None
    if unpack is None:
        raise Refusal(f"its {what} is not a constant: {node.op} computes it")
    inner = constant(surgery, node.inputs[0], what)
    arguments = [_argument(surgery, t) for t in node.inputs[1:]]
    value = unpack(inner.value, surgery.attributes(node), arguments)
    dtype = value.dtype if node.op == "Cast" else inner.dtype
    value = _wide(value)
    shape = "x".join(map(str, value.shape))
    axes = surgery.attributes(node).get("perm", "") if node.op == "Transpose" else ""
    key = inner.key if node.op == "Identity" else f"{inner.key}>{node.op}{axes}:{shape}:{dtype}"
    return Constant(value, key, dtype)


def _wide(value: Array) -> Array:
    return value.astype(np.float32) if value.dtype == np.float16 else value


def _argument(surgery: Surgery, tensor: gs.Tensor) -> Array | None:
    return None if tensor.is_empty() else constant(surgery, tensor, "shape argument").value


def _constant_node(surgery: Surgery, node: gs.Node, what: str) -> Array:
    attributes = surgery.attributes(node)
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if name in attributes:
            return np.asarray(attributes[name], dtype)
    if "value_ints" in attributes:
        return np.asarray(attributes["value_ints"], np.int64)
    tensor = attributes.get("value")
    if not isinstance(tensor, TensorProto) or tensor.data_type == TensorProto.STRING:
        raise Refusal(f"its {what} is a Constant without numbers")
    value: Array = numpy_helper.to_array(tensor)
    if value.dtype.kind not in "fiub":
        raise Refusal(f"its {what} is stored as {str(TensorProto.DataType.Name(tensor.data_type)).lower()}")
    return value


def _transpose(x: Array, attributes: dict[str, Any], _: list[Array | None]) -> Array:
    return x.transpose(attributes.get("perm") or None)


def _cast(x: Array, attributes: dict[str, Any], _: list[Array | None]) -> Array:
    dtype = helper.tensor_dtype_to_np_dtype(attributes["to"])
    if attributes["to"] not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16) and dtype.kind not in "iub":
        raise Refusal(f"its weight is cast to {str(TensorProto.DataType.Name(attributes['to'])).lower()}")
    return x.astype(dtype, copy=False)


def _reshape(x: Array, attributes: dict[str, Any], arguments: list[Array | None]) -> Array:
    target = [int(n) for n in arguments[0]] if arguments and arguments[0] is not None else attributes.get("shape", [])
    if not attributes.get("allowzero", 0):
        target = [x.shape[i] if n == 0 else n for i, n in enumerate(target)]
    return x.reshape(target)


def _flatten(x: Array, attributes: dict[str, Any], _: list[Array | None]) -> Array:
    axis = attributes.get("axis", 1) % (x.ndim + 1)
    return x.reshape(prod(x.shape[:axis]), -1)


def _axes(attributes: dict[str, Any], arguments: list[Array | None]) -> tuple[int, ...] | None:
    """Axes of Squeeze and Unsqueeze: an attribute up to opset 12, an input after it."""
    axes = arguments[0] if arguments else attributes.get("axes")
    return None if axes is None else tuple(int(a) for a in axes)


_UNPACK: dict[str, Callable[[Array, dict[str, Any], list[Array | None]], Array]] = {
    "Identity": lambda x, attributes, arguments: x,
    "Transpose": _transpose,
    "Cast": _cast,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda x, attributes, arguments: np.squeeze(x, _axes(attributes, arguments)),
    "Unsqueeze": lambda x, attributes, arguments: np.expand_dims(x, _axes(attributes, arguments) or ()),
}
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
