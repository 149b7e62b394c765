"""Shapes of every tensor of a torch.fx network, by a run on fake tensors, or on real ones where that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from passes.errors import InputError, first_line
from passes.fx_network import FORMS, SEVERAL, Form, Network, label

Known = Mapping[fx.Node, tuple[tuple[Form, ...], bool]]
"""By node: its tensors, and whether its result is a sequence of them."""


class _Recorder(fx.Interpreter):
    """Runs a network and writes down what each node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.known: dict[fx.Node, tuple[tuple[Form, ...], bool]] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        value = super().run_node(n)
        leaves = pytree.tree_leaves(value)
        tensors = tuple(Form(tuple(t.shape), t.dtype) for t in leaves if isinstance(t, torch.Tensor))
        self.known[n] = tensors, bool(tensors) and not isinstance(value, torch.Tensor)
        return value


def observe(net: Network, inputs: Sequence[torch.Tensor]) -> Known:
    """Runs the network on ``inputs`` and returns what each node gives.

    Raises InputError, naming the node, where the network cannot be run on them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad():
            recorder = _Recorder(net.module)
            recorder.run(*(mode.from_tensor(t) for t in inputs))
        return recorder.known
    except Exception:  # operators that need values, or that nobody made a fake of: values will tell
        recorder = _Recorder(net.module)
    try:
        with torch.no_grad():
            recorder.run(*(t.clone() for t in inputs))
    except Exception as error:
        node = recorder.current
        where = f"at '{label(node)}'" if node is not None else "at its inputs"
        first = first_line(error)
        given = ", ".join(str(Form(tuple(t.shape), t.dtype)) for t in inputs)
        raise InputError(f"the network cannot be run on inputs of {given}: {where}: {first[:200]}") from error
    return recorder.known


def record(net: Network, inputs: Sequence[torch.Tensor]) -> None:
    """Puts shapes and types on every node. Raises InputError as :func:`observe` does."""
    for node, (found, several) in observe(net, inputs).items():
        node.meta[FORMS], node.meta[SEVERAL] = found, several
