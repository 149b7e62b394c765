"""A stable, readable listing of a torch.fx network: one line per node, weights by digest.

Equal listings mean equal networks; runs of a pass are compared by it, and --dump-ir writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from passes.fx_network import Form, Network, is_item, label, tensors_of
from passes.graph import TensorSpec


def listing(net: Network, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Inputs, nodes in order with what they store, outputs."""
    lines = ["torch.fx"]
    lines += [
        f"input {_info(spec)} -> {node.meta.get('rankc_tensor', node.name)}"
        for spec, node in zip(inputs, net.placeholders, strict=True)
    ]
    for node in net.graph.nodes:
        if node.op not in ("placeholder", "output") and not is_item(node):
            lines += _node(net, node)
    result = net.output.args[0]
    lines += [f"output {_info(spec)}" for spec in outputs]
    return "\n".join([*lines, f"return {_argument(result)}"]) + "\n"


def _info(spec: TensorSpec) -> str:
    shape = ", ".join("?" if size is None else str(size) for size in spec.shape)
    return f"{spec.name} {spec.dtype}[{shape}]"


def _node(net: Network, node: fx.Node) -> Iterator[str]:
    options = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    writes = ", ".join(tensors_of(node))
    yield f"{label(node)}: {writes} = {_target(net, node)}({', '.join(options)})"
    if node.op == "get_attr":
        value = net.attribute(str(node.target))
        if isinstance(value, torch.Tensor):
            yield f"  {_digest(net, value)}"
    elif node.op == "call_module":
        module = net.called(node)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield f"  {name} {_digest(net, tensor)}"


def _digest(net: Network, tensor: torch.Tensor) -> str:
    return f"{Form(tuple(tensor.shape), tensor.dtype)} sha256:{net.digest(tensor)}"


def _target(net: Network, node: fx.Node) -> str:
    if node.op == "call_module":
        # repr tells a module's options, and those of what it holds
        return " ".join(repr(net.called(node)).split())
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return str(node.target)
        module = getattr(node.target, "__module__", None) or "torch"
        return f"{module}.{getattr(node.target, '__name__', node.target)}"
    return f"{node.op}:{node.target}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return ", ".join(tensors_of(value)) or str(value.meta.get("rankc_tensor", value.name))
    if isinstance(value, tuple | list):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_argument(v)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"{_argument(value.start)}:{_argument(value.stop)}:{_argument(value.step)}"
    return repr(value)
