"""Values of a torch.fx network that are stored, or follow from what is stored: what can be a layer's weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from passes.core.site import Array
from passes.fx_network import Network, Refusal, dtype_name, label
from passes.fx_operators import raw_name

_WIDE = (torch.float32, torch.float64)


def constant(net: Network, argument: Any, what: str = "weight") -> tuple[torch.Tensor, str]:
    """A node's value and a key that is equal for one stored tensor. Raises Refusal, naming it as ``what``."""
    if isinstance(argument, torch.Tensor):
        return argument.detach(), net.key_of(argument, "")
    if not isinstance(argument, fx.Node):
        raise Refusal(f"its {what} is no tensor")
    if not net.is_stored(argument):
        raise Refusal(_computed(net, argument, what))
    with torch.no_grad():
        value = _value(net, argument, {})
    if not isinstance(value, torch.Tensor):
        raise Refusal(f"its {what} is no tensor")
    key = net.key_of(value, str(argument.target)) if argument.op == "get_attr" else f"={label(argument)}"
    return value.detach(), key


def _computed(net: Network, node: fx.Node, what: str) -> str:
    if node.op == "placeholder":
        return f"its {what} is an input of the network"
    return f"its {what} is computed by {raw_name(net, node)} ('{label(node)}')"


def _value(net: Network, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        known[node] = _compute(net, node, lambda read: _value(net, read, known))
    return known[node]


def _compute(net: Network, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    if node.op == "get_attr":
        return net.attribute(str(node.target))
    args = fx.node.map_arg(node.args, value_of)
    kwargs: dict[str, Any] = dict(fx.node.map_arg(node.kwargs, value_of))
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return net.called(node)(*args, **kwargs)


def floats(tensor: torch.Tensor, what: str = "weight") -> Array:
    """The values of a tensor of floats, single or double; half precision is handed out in single. Shares memory."""
    if isinstance(tensor, nn.UninitializedParameter):
        raise Refusal(f"its {what} has no shape yet: run the module once on example inputs before it is traced")
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise Refusal(f"its {what} is a {type(tensor).__name__}, not a plain tensor")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise Refusal(f"its {what} is stored {'quantized' if tensor.is_quantized else 'sparse'}")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise Refusal(f"its {what} is of type {dtype_name(tensor.dtype)}")
    plain = tensor.detach().cpu()
    array: Array = (plain if plain.dtype in _WIDE else plain.float()).numpy()
    return array


def vector(tensor: torch.Tensor) -> Array:
    """The values of a tensor in double precision."""
    return floats(tensor, "operand").astype(np.float64)
