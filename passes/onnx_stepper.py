"""Walks an ONNX network node by node and stops at its sites.

The walk is a generator: at each site it yields the site and its input, and takes back the output. Two walks over one
network, one with the original layers and one with their chains, therefore advance in step, and a layer can be fitted
on what really reaches it. Operators run in torch, so gradients flow; an operator that is not in the table runs in
onnxruntime, node by node, and cuts the gradient there.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper

from passes.core.mapped import is_mapped
from passes.core.site import Array, Site
from passes.onnx_attributes import Attributes
from passes.onnx_torch_ops import IN_PLACE, OPS

Tensor = torch.Tensor
Walk = Generator["Stop", Tensor, dict[str, Tensor]]
Feeds = Mapping[str, Array | Tensor] | Sequence[Mapping[str, Array | Tensor]]


_SMALL_ELEMENTS = 256

_INTEGER = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
"""Products of 8-bit integers: their sums are exact where onnxruntime knows the weights beforehand."""


@dataclass(frozen=True)
class Epilogue:
    """What happens to a site's output: ``clamp(y + skip, low, high)``.

    ``skip`` names a tensor that is added (a residual branch), computed before the site wherever the graph allows it;
    ``low``/``high`` bound an activation that clamps (ReLU: 0 and None). All None: nothing of the kind follows.
    """

    skip: str | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Stop:
    """A pause of the walk: ``input`` is the site's, ``skip`` the value of its epilogue's branch where known.

    ``branch`` makes another walk that goes on from here with an output for the site, and that has to end while this one
    pauses; None where several sets of inputs are walked side by side.
    """

    site: Site
    input: Tensor
    skip: Tensor | None
    branch: Callable[[Tensor], Walk] | None = None


def finish(walk: Walk, at_site: Callable[[Stop], Tensor]) -> dict[str, Tensor]:
    """The outputs of a walk with one function for every site that is left."""
    answer: Tensor | None = None
    while True:
        try:
            stop = next(walk) if answer is None else walk.send(answer)
        except StopIteration as end:
            result: dict[str, Tensor] = end.value
            return result
        answer = at_site(stop)


class Stepper:
    """One network, ready to be walked any number of times.

    ``sites``: the sites to stop at, by their output tensor; sites inside bodies are not among them. ``constants``:
    values of initializers that ``model`` only has stubs of, see :meth:`passes.onnx_graph.OnnxGraph.skeleton`.
    """

    def __init__(self, model: ModelProto, sites: Sequence[Site], constants: Mapping[str, Array] | None = None) -> None:
        graph = model.graph
        self.sites = {site.output: site for site in sites if not site.in_body}
        self.opset = {o.domain: o.version for o in model.opset_import}
        self._opset_imports = list(model.opset_import)
        self._ir_version = model.ir_version
        self.outputs = [o.name for o in graph.output]
        values = {} if constants is None else dict(constants)
        self.constants = {
            t.name: _tensor(values[t.name] if t.name in values else numpy_helper.to_array(t)) for t in graph.initializer
        }
        self.inputs = [i.name for i in graph.input if i.name not in self.constants]
        self._types = _value_types(model)
        self.nodes = self._ordered(list(graph.node))
        self._uses = Counter(name for node in self.nodes for name in reads(node))
        self._uses.update(self.outputs)
        self.epilogues = {site.output: self._epilogue(site) for site in self.sites.values()}
        self._sessions: dict[int, Any] = {}
        self.cut: set[str] = set()
        """Operators that ran outside torch in a walk: gradients do not pass them."""

    def _ordered(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """A topological order in which the shorter branch of a join is computed first."""
        producer = {out: i for i, node in enumerate(nodes) for out in node.output if out}
        depth = [0] * len(nodes)
        for i, node in enumerate(nodes):  # the file is in topological order: the checker has seen to it
            below = [depth[producer[name]] for name in reads(node) if name in producer]
            depth[i] = max(below, default=0) + (1 if any(out in self.sites for out in node.output) else 0)
        done: set[int] = set()
        order: list[NodeProto] = []

        for root in [*(producer[o] for o in self.outputs if o in producer), *range(len(nodes))]:
            stack = [(root, False)]
            while stack:
                index, ready = stack.pop()
                if index in done:
                    continue
                if ready:
                    done.add(index)
                    order.append(nodes[index])
                    continue
                stack.append((index, True))
                needs = sorted({producer[n] for n in reads(nodes[index]) if n in producer}, key=lambda i: (depth[i], i))
                stack.extend((i, False) for i in reversed(needs) if i not in done)
        return order

    def _epilogue(self, site: Site) -> Epilogue:
        readers: dict[str, list[NodeProto]] = {}
        for reader in self.nodes:
            for read in reads(reader):
                readers.setdefault(read, []).append(reader)
        name, skip = site.output, None

        def only(tensor: str) -> NodeProto | None:
            users = readers.get(tensor, [])
            return users[0] if len(users) == 1 and tensor not in self.outputs else None

        node: NodeProto | None = only(name)
        if node is not None and node.op_type == "Add":
            other = node.input[1] if node.input[0] == name else node.input[0]
            if other in self.constants or other == name:
                return Epilogue()
            skip, name = other, node.output[0]
            node = only(name)
        if node is not None and node.op_type == "Relu":
            return Epilogue(skip, 0.0, None)
        if node is not None and node.op_type == "Clip":
            bounds = self._clip_bounds(node)
            if bounds is not None:
                return Epilogue(skip, *bounds)
        return Epilogue(skip)

    def _clip_bounds(self, node: NodeProto) -> tuple[float | None, float | None] | None:
        attributes = Attributes(node)
        if len(node.input) == 1:
            return attributes.get("min", None), attributes.get("max", None)
        bounds: list[float | None] = []
        for name in [*node.input[1:3], "", ""][:2]:
            if name and name not in self.constants:
                return None
            bounds.append(float(self.constants[name]) if name else None)
        return bounds[0], bounds[1]

    def walk(self, feeds: Feeds) -> Walk:
        """Runs the network; yields a :class:`Stop` at each site and expects the site's output; returns the outputs.

        The output becomes the walk's own: where no gradients are recorded, what is added to it and the clamp behind it
        are computed in its place. What a stop shows is never written to.

        ``feeds`` is one set of inputs or several. Several are walked side by side, and a stop shows them as one
        batch: that is how a network of fixed batch size is walked with many samples.
        """
        parts = [feeds] if isinstance(feeds, Mapping) else list(feeds)
        if not parts:
            raise ValueError("nothing to walk with: the list of feeds is empty")
        walks = [self._walk(part) for part in parts]
        if len(walks) == 1:
            return (yield from walks[0])
        ended: list[dict[str, Tensor]] = []
        answers: list[Tensor] | None = None
        while not ended:
            stops: list[Stop] = []
            for index, walk in enumerate(walks):
                try:
                    stops.append(next(walk) if answers is None else walk.send(answers[index]))
                except StopIteration as end:
                    ended.append(end.value)
            if stops:
                site = stops[0].site
                axis = 1 if stops[0].input.ndim + site.channel_axis == 0 else 0
                skips = [stop.skip for stop in stops if stop.skip is not None]
                skip = torch.cat(skips, axis) if len(skips) == len(stops) else None
                y = yield Stop(site, torch.cat([stop.input for stop in stops], axis), skip)
                answers = list(torch.split(y, [stop.input.shape[axis] for stop in stops], axis))
        return {name: torch.cat([e[name] for e in ended]) for name in ended[0] if ended[0][name].ndim}

    def _walk(self, feeds: Mapping[str, Array | Tensor]) -> Walk:
        env = {name: _laid_out(_tensor(value)) for name, value in feeds.items()}
        return self._walk_from(0, env, Counter(self._uses), set())

    def _walk_from(self, start: int, env: dict[str, Tensor], left: Counter[str], own: set[str]) -> Walk:
        """A walk from node ``start`` on with the values ``env``, which are still read as often as ``left`` says.

        ``own``: those that nobody else has, and that one operator reads.
        """
        for index, node in enumerate(self.nodes[start:], start):
            site = next((self.sites[out] for out in node.output if out in self.sites), None)
            if site is not None:
                skip = self.epilogues[site.output].skip
                own -= {site.input, skip or ""}
                branch = partial(self._branch, index, site.output, env, left)
                env[site.output] = yield Stop(site, env[site.input], env.get(skip) if skip else None, branch)
                own |= self._read_once(site.output)
            elif target := self._replaceable(node, env, own):
                others = [self._value(name, env) for name in node.input if name != target]
                env[node.output[0]] = IN_PLACE[node.op_type](env[target], *others)
                own |= self._read_once(node.output[0])
            else:
                values = self._evaluate(index, node, env)
                env.update((name, value) for name, value in zip(node.output, values, strict=False) if name)
            _let_go(node, env, left)
        return {name: self._value(name, env) for name in self.outputs}

    def _branch(self, index: int, output: str, env: Mapping[str, Tensor], left: Counter[str], y: Tensor) -> Walk:
        values, left = {**env, output: y}, Counter(left)
        _let_go(self.nodes[index], values, left)
        return self._walk_from(index + 1, values, left, self._read_once(output))

    def run(self, feeds: Feeds, at_site: Callable[[Stop], Tensor]) -> dict[str, Tensor]:
        """A whole walk with one function for every site."""
        return finish(self.walk(feeds), at_site)

    def _value(self, name: str, env: Mapping[str, Tensor]) -> Tensor:
        return env[name] if name in env else self.constants[name]

    def _read_once(self, name: str) -> set[str]:
        return {name} if self._uses[name] == 1 else set()  # the network's outputs are uses, too

    def _replaceable(self, node: NodeProto, env: Mapping[str, Tensor], own: Collection[str]) -> str:
        """The input of an operator, one of ``own``, that its result may be written over; "" for none."""
        if node.op_type not in IN_PLACE or node.domain not in ("", "ai.onnx") or torch.is_grad_enabled():
            return ""
        values = [self._value(name, env) for name in node.input]
        alike = {(value.dtype, value.shape, value.stride()) for value in values}
        if len(alike) > 1 or not values[0].is_floating_point():
            return ""
        return next((name for name in node.input if name in own), "")

    def _evaluate(self, index: int, node: NodeProto, env: Mapping[str, Tensor]) -> Sequence[Tensor]:
        def value(name: str) -> Tensor | None:
            return self._value(name, env) if name else None

        op = OPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if op is not None:
            result = op(Attributes(node), [value(name) for name in node.input], self.opset.get("", 1))
            if result is not None and len(result) >= sum(1 for name in node.output if name):
                return result
        self.cut.add(node.op_type)
        # small constants go into the model: shapes and the like, which some operators want to see beforehand
        most = math.inf if node.op_type in _INTEGER else _SMALL_ELEMENTS
        kept = {n for n in reads(node) if n not in env and self.constants[n].numel() <= most}
        names = sorted(set(reads(node)) - kept)
        arrays = {name: _array(value(name)) for name in names}
        session = self._session(index, node, arrays, sorted(kept))
        outputs = [name for name in node.output if name]
        found = dict(zip(outputs, session.run(outputs, arrays), strict=True))
        return [_tensor(found[name]) if name else torch.empty(0) for name in node.output]

    def _session(self, index: int, node: NodeProto, arrays: Mapping[str, Array], kept: Sequence[str]) -> Any:
        import onnxruntime

        from passes.onnx_runtime import exact_session

        if index not in self._sessions:
            inputs = [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
                for name, a in arrays.items()
            ]
            outputs = [self._types.get(name) or onnx.ValueInfoProto(name=name) for name in node.output if name]
            stored = [numpy_helper.from_array(self.constants[name].numpy(), name) for name in kept]
            graph = helper.make_graph([node], "node", inputs, outputs, stored)
            model = helper.make_model(graph, opset_imports=self._opset_imports, ir_version=max(self._ir_version, 4))
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            self._sessions[index] = exact_session(model.SerializeToString(), options)
        return self._sessions[index]


def _let_go(node: NodeProto, env: dict[str, Tensor], left: Counter[str]) -> None:
    """Takes what a computed node has read for the last time out of ``env``."""
    for name in reads(node):
        left[name] -= 1
        if not left[name]:
            env.pop(name, None)


def reads(node: NodeProto) -> list[str]:
    """Every tensor that a node reads, those its bodies take from outside included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for body in bodies:
            inside = {i.name for i in body.input} | {t.name for t in body.initializer}
            inside |= {out for inner in body.node for out in inner.output}
            outside = [name for inner in body.node for name in reads(inner) if name not in inside]
            outside += [o.name for o in body.output if o.name not in inside]
            names.extend(dict.fromkeys(outside))
    return names


def _value_types(model: ModelProto) -> dict[str, onnx.ValueInfoProto]:
    inferred = onnx.shape_inference.infer_shapes(model)
    infos = [*inferred.graph.value_info, *inferred.graph.output]
    types = {}
    for info in infos:
        bare = onnx.ValueInfoProto(name=info.name)
        bare.type.CopyFrom(info.type)
        if bare.type.HasField("tensor_type"):
            bare.type.tensor_type.ClearField("shape")
        types[info.name] = bare
    return types


def _tensor(value: Array | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if is_mapped(value):  # shared, since a copy might not fit into memory; operators do not write to their inputs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(value)
    value = np.asarray(value)
    return torch.from_numpy(value if value.flags.writeable and value.flags.c_contiguous else value.copy())


def _laid_out(value: Tensor) -> Tensor:
    """Images in channels-last order: convolutions are faster in it, and hand it on; and a patch lies in one piece."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def _array(value: Tensor | None) -> Array:
    assert value is not None
    return value.detach().cpu().numpy()
