"""From an nn.Module and example inputs to a torch.fx GraphModule of one's own, with labels and shapes.

The module itself is never changed: it is copied, brought to inference mode and onto the CPU. Modules of torch.nn stay
calls of modules; others, subclasses of nn.Conv2d among them, are traced through, down to torch's functions.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from passes.errors import InputError, UnsupportedError, first_line
from passes.fx_network import LABEL, TENSOR, Network
from passes.fx_operators import CONVOLUTIONS, PRODUCTS, torch_name
from passes.training.layers import StageLayer

Examples = torch.Tensor | Mapping[str, Any] | Sequence[Any]
"""One input, inputs by the names of forward's parameters, or inputs in their order."""

ADVICE = (
    "export it (torch.export.save(torch.export.export(model, inputs), 'model.pt2')) and read the .pt2, or trace it by "
    "hand and give the GraphModule"
)


class _Tracer(fx.Tracer):
    """Keeps layers of this package whole, and remembers in which module a trace stopped."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.stopped_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, StageLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.stopped_in is None:
                self.stopped_in = self.path_of_module(m)
            raise


def trace(module: nn.Module, examples: Examples) -> tuple[Network, tuple[torch.Tensor, ...]]:
    """The network of a module, without shapes yet, and its example inputs in the order of its inputs.

    Raises UnsupportedError where it cannot be traced, InputError where the examples do not fit it.
    """
    if isinstance(examples, np.ndarray):
        examples = torch.from_numpy(examples)
    if not isinstance(examples, torch.Tensor | Mapping | list | tuple):
        raise InputError(
            f"example inputs cannot be a {type(examples).__name__}: give a tensor, tensors in the order of forward's "
            "parameters, or by their names"
        )
    try:
        own = copy.deepcopy(module)
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be copied: {first_line(error)}; give it without tensors that were "
            "computed from others with gradients"
        ) from error
    own = baked(own.eval().cpu()).requires_grad_(False)
    graph_module = own if isinstance(own, fx.GraphModule) else _traced(own, examples)
    if not isinstance(own, fx.GraphModule):
        _keep_given(graph_module, examples)
    net = Network(fx.GraphModule(graph_module, graph_module.graph, type(module).__name__).eval())
    inputs = _in_order(net, examples)
    name_nodes(net)
    return net, inputs


def baked(module: nn.Module) -> nn.Module:
    """The module with parametrized parameters (weight_norm, spectral_norm, ...) as what they are in inference mode.

    Changes the module that is given, and no class: torch's own way would take the property away from the class, which
    copies of a module share.
    """
    for layer in module.modules():
        if parametrize.is_parametrized(layer):
            with torch.no_grad():
                values = {name: getattr(layer, name) for name in layer.parametrizations}  # type: ignore[union-attr]
            layer.__class__ = type(layer).__bases__[0]  # parametrizing made a subclass of one base
            del layer.parametrizations
            for name, value in values.items():
                layer.register_parameter(name, nn.Parameter(value.detach().clone(), value.is_floating_point()))
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm | SpectralNorm):
                with torch.no_grad():
                    hook.remove(layer)
                del layer._forward_pre_hooks[key]
    return module


def _traced(module: nn.Module, examples: Examples) -> fx.GraphModule:
    parameters = list(inspect.signature(module.forward).parameters.values())
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not isinstance(module, nn.Sequential):
            raise UnsupportedError(
                f"forward of {type(module).__name__} takes *{p.name}, so its inputs have no names: {ADVICE}"
            )
    given = _given(parameters, examples)
    missing = [p.name for p in parameters if p.name not in given and p.default is p.empty]
    if missing:
        raise InputError(f"no example for input '{missing[0]}' of {type(module).__name__}: give one for each input")
    rest = {p.name: p.default for p in parameters if p.name not in given}
    tracer = _Tracer()
    try:
        graph = tracer.trace(module, rest or None)
    except Exception as error:
        raise UnsupportedError(_why(type(module).__name__, tracer.stopped_in, error)) from error
    return fx.GraphModule(tracer.root, graph)


def _given(parameters: Sequence[inspect.Parameter], examples: Examples) -> set[str]:
    names = [p.name for p in parameters]
    if isinstance(examples, Mapping):
        unknown = sorted(set(examples) - set(names))
        if unknown:
            raise InputError(f"there is no input '{unknown[0]}'; inputs are {', '.join(names)}")
        return set(examples)
    count = 1 if isinstance(examples, torch.Tensor) else len(examples)
    if count > len(names):
        raise InputError(f"{count} example inputs were given, the network takes {len(names)}: {', '.join(names)}")
    return set(names[:count])


def _keep_given(module: fx.GraphModule, examples: Examples) -> None:
    """Takes out inputs that stayed at their defaults, and the checks that they do."""
    count = 1 if isinstance(examples, torch.Tensor) else len(examples)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for index, node in enumerate(placeholders):
        kept = str(node.target) in examples if isinstance(examples, Mapping) else index < count
        if not kept:
            for user in _all_users(node):
                module.graph.erase_node(user)
            module.graph.erase_node(node)


def _all_users(node: fx.Node) -> list[fx.Node]:
    """What depends on the node, the last first."""
    found: list[fx.Node] = []
    for user in node.users:
        found = [*_all_users(user), user, *found]
    return list(dict.fromkeys(found))


def _why(name: str, path: str | None, error: Exception) -> str:
    """One line that names the module and the line of its source where tracing stopped."""
    where = f"module '{path}' of {name}" if path else name
    here = Path(torch.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if here not in Path(f.filename).parents]
    own = [f for f in frames if Path(f.filename) != Path(__file__)]
    line = ""
    if own:
        last = own[-1]
        text = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
        line = (
            f" at {Path(last.filename).name}:{last.lineno} ({text})" if text else f" at {last.filename}:{last.lineno}"
        )
    return f"{where} cannot be traced{line}: {first_line(error)}; {ADVICE}"


def _in_order(net: Network, examples: Examples) -> tuple[torch.Tensor, ...]:
    names = [str(node.target) for node in net.placeholders]
    if isinstance(examples, Mapping):
        missing = [name for name in names if name not in examples]
        if missing or len(names) != len(examples):
            wrong = missing[0] if missing else next(name for name in examples if name not in names)
            raise InputError(
                f"examples are for {', '.join(examples)}, inputs are {', '.join(names)}: '{wrong}' differs"
            )
        values = [examples[name] for name in names]
    else:
        values = [examples] if isinstance(examples, torch.Tensor) else list(examples)
        if len(values) != len(names):
            raise InputError(f"{len(values)} example inputs were given, the network takes {len(names)}: {names}")
    tensors = []
    for name, value in zip(names, values, strict=True):
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(f"input '{name}' is a {type(value).__name__}; only tensors can be inputs")
        tensors.append(value.detach().cpu().clone())
    return tuple(tensors)


def name_nodes(net: Network, names: Mapping[fx.Node, str] | None = None) -> None:
    """Labels every node: its module's path, else the path of the layer whose ``weight`` it reads, else its own name.

    ``names`` come before those. Where several nodes would have one name, the first has it and the others a number.
    """
    wanted = {node: (names or {}).get(node) or _wanted(net, node) for node in net.graph.nodes}
    for node, unique in zip(wanted, distinct(list(wanted.values())), strict=True):
        node.meta[LABEL] = unique
        node.meta[TENSOR] = str(node.target) if node.op == "placeholder" else node.name


def distinct(names: Sequence[str]) -> list[str]:
    """The names, those that were there before with the least number that makes a name nobody wants: a, a_1, a_2."""
    found: list[str] = []
    taken: Counter[str] = Counter()
    reserved = set(names)
    for name in names:
        taken[name] += 1
        unique = name
        while taken[name] > 1 and (unique in reserved or unique == name):
            unique = f"{name}_{taken[name] - 1}"
            if unique in reserved:
                taken[name] += 1
        reserved.add(unique)
        found.append(unique)
    return found


def is_named(net: Network, node: fx.Node) -> bool:
    """True for calls of functions that are a layer or a BatchNorm."""
    name = torch_name(net, node)
    return name in CONVOLUTIONS | PRODUCTS or "batchnorm" in name


def _wanted(net: Network, node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    if node.op in ("call_function", "call_method") and is_named(net, node):
        todo = [read for read in node.all_input_nodes if net.is_stored(read)]
        while todo:
            read = todo.pop(0)
            path, _, name = str(read.target).rpartition(".")
            if read.op == "get_attr" and name == "weight" and path and len(read.users) == 1:
                return path
            todo.extend(read.all_input_nodes)
    return node.name
