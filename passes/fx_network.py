"""A torch.fx GraphModule under the knife: labels of nodes, names of tensors, shapes, insertion and removal.

Nodes carry what the frontend knows of them in ``node.meta``, so that it survives copies of the graph and renaming:

    LABEL    the node's name for people: module path, or the fx node's name
    TENSOR   the name of the tensor that it writes; a new node takes over the name of the one that it stands for
    FORMS    shape and type of each tensor that it writes
    SEVERAL  whether its result is a sequence of tensors
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.fx_operators import is_pure, is_torchs_own, is_view, writes

LABEL, TENSOR, FORMS, SEVERAL = "rankc_label", "rankc_tensor", "rankc_forms", "rankc_several"

_DIGITS = 12


class Refusal(Exception):
    """Why a node is kept as it is; the message is a sentence for a person."""


@dataclass(frozen=True)
class Form:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def label(node: fx.Node) -> str:
    return str(node.meta.get(LABEL, node.name))


def forms(node: fx.Node) -> tuple[Form, ...]:
    """Of the tensors that the node writes; () where it writes none, or is not known to."""
    found: tuple[Form, ...] = node.meta.get(FORMS, ())
    return found


def tensors_of(node: fx.Node) -> tuple[str, ...]:
    """Names of the tensors that the node writes. An item taken out of several has the name that it has there."""
    if is_item(node):
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        names = tensors_of(source)
        if -len(names) <= index < len(names):
            return (names[index],)
    name, count = str(node.meta.get(TENSOR, node.name)), len(forms(node))
    return (name,) if count == 1 else tuple(f"{name}:{i}" for i in range(count))


def is_item(node: fx.Node) -> bool:
    """True for a node that takes one result out of several."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem":
        return False
    source, index = node.args[:2] if len(node.args) == 2 else (None, None)
    return isinstance(source, fx.Node) and isinstance(index, int) and bool(source.meta.get(SEVERAL))


class Network:
    """A GraphModule and what is known of its tensors. Weights are shared by copies, since nobody writes into them."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._digests: dict[int, tuple[torch.Tensor, int, str]] = {}
        self._known: dict[fx.Node, bool] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def clone(self) -> Network:
        memo: dict[int, Any] = {id(t): t for t in self.stored().values()}
        other = Network(copy.deepcopy(self.module, memo))
        other._digests = dict(self._digests)
        return other

    def nodes(self) -> Iterator[fx.Node]:
        """Nodes that compute something, in order."""
        return (node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr", "output"))

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    def find(self, name: str) -> fx.Node:
        """The node of that label. KeyError if there is none."""
        for node in self.nodes():
            if label(node) == name:
                return node
        raise KeyError(f"no node '{name}' in the network: was it replaced before?")

    def called(self, node: fx.Node) -> nn.Module:
        """The module that a call_module node calls."""
        return self.module.get_submodule(str(node.target))

    def stored(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by every path that leads to them."""
        found: dict[str, torch.Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        found.update(self.module.named_buffers(remove_duplicate=False))
        for node in self.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in found:
                value = self.attribute(str(node.target))
                if isinstance(value, torch.Tensor):  # a plain attribute, as torch.fx makes of constants
                    found[str(node.target)] = value
        return found

    def attribute(self, path: str) -> Any:
        """What a get_attr node of that target gives."""
        value: Any = self.module
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def key_of(self, tensor: torch.Tensor, fallback: str) -> str:
        """The first path that leads to a stored tensor: equal wherever it is shared."""
        return next((path for path, stored in self.stored().items() if stored is tensor), fallback)

    def digest(self, tensor: torch.Tensor) -> str:
        """A digest of the tensor's values, type and shape."""
        known = self._digests.get(id(tensor))
        version = tensor._version
        if known is not None and known[0] is tensor and known[1] == version:
            return known[2]
        state = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        plain = tensor.detach().contiguous()
        if plain.numel():
            state.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        found = state.hexdigest()[:_DIGITS]
        self._digests[id(tensor)] = (tensor, version, found)
        return found

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        """The one node that reads ``node``, once; None where several do, or the network's output does."""
        if len(node.users) != 1:
            return None
        (reader,) = node.users
        reads = sum(argument is node for argument in flat_inputs(reader))
        return reader if reader.op != "output" and reads == 1 else None

    def fresh_path(self, wanted: str) -> str:
        """A module path where nothing stands, ``wanted`` if it may be; below no module that a node calls."""
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        done: list[str] = []
        inside: Any = self.module
        parts = wanted.split(".")
        for depth, part in enumerate(parts, 1):
            name, count = part, 0
            while inside is not None and hasattr(inside, name):
                there = getattr(inside, name)
                if depth < len(parts) and isinstance(there, nn.Module) and ".".join([*done, name]) not in called:
                    break
                count += 1
                name = f"{part}_{count}"
            done.append(name)
            inside = getattr(inside, name, None)
        return ".".join(done)

    def put(self, path: str, module: nn.Module) -> None:
        """Adds a module; what stands at ``path`` must be gone."""
        if not self.module.add_submodule(path, module):
            raise ValueError(f"'{path}' cannot hold a module")

    def call(self, before: fx.Node, path: str, source: fx.Node, name: str, form: Form, tensor: str = "") -> fx.Node:
        """A new call of the module at ``path`` on ``source``, placed before a node."""
        with self.graph.inserting_before(before):
            node = self.graph.call_module(path, (source,))
        node.meta.update({LABEL: name, TENSOR: tensor or node.name, FORMS: (form,)})
        return node

    def erase(self, nodes: Sequence[fx.Node]) -> None:
        """Removes nodes, the last first, with the modules and constants that nothing else needs."""
        for node in reversed(nodes):
            reads = list(dict.fromkeys(node.all_input_nodes))
            self.graph.erase_node(node)
            if node.op == "call_module":
                self._release(str(node.target))
            self.prune([read for read in reads if read not in nodes])

    def prune(self, nodes: Sequence[fx.Node]) -> None:
        """Removes those of ``nodes`` that nothing reads and that hold, or compute from, constants alone."""
        for node in nodes:
            if node.users or not self.is_stored(node):
                continue
            reads = list(dict.fromkeys(node.all_input_nodes))
            self.graph.erase_node(node)
            if node.op == "get_attr":
                self._release(str(node.target))
            self.prune(reads)

    def is_stored(self, node: fx.Node) -> bool:
        """True if the node's value follows from stored values alone."""
        if node not in self._known:
            for each in self.graph.nodes:  # in order, so that what a node reads is known before it
                if each not in self._known:
                    self._known[each] = self._follows(each)
        return self._known[node]

    def _follows(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return not self._is_changed(node)
        if node.op in ("placeholder", "output"):
            return False
        inputs = node.all_input_nodes
        return bool(inputs) and all(self._known[read] for read in inputs) and is_pure(self, node)

    def _is_changed(self, node: fx.Node) -> bool:
        """True if a node writes into the value of ``node``, or into a view of it, or may."""
        for user in node.users:
            if writes(self, user):
                others = user.op == "call_module" or "out" in user.kwargs
                if others or not user.args or user.args[0] is node or not is_torchs_own(user):
                    return True
            elif is_view(self, user) and self._is_changed(user):
                return True
        return False

    def _release(self, path: str) -> None:
        """Takes out what stands at ``path``, where no node needs it or a part of it."""
        targets = [str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr")]
        if any(t == path or t.startswith(f"{path}.") or path.startswith(f"{t}.") for t in targets):
            return
        parent_path, _, name = path.rpartition(".")
        parent = self.module.get_submodule(parent_path)
        if hasattr(parent, name):
            delattr(parent, name)


def flat_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that ``node`` reads, as often as it reads them."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found
