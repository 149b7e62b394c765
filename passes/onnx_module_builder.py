"""Builds the trainable module of an ONNX network by running it, node by node, with one batch and with two at once.

Values tell more than shapes: which numbers are sizes, which axis is the batch's, what torch computes.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import NodeProto, ValueInfoProto, helper, numpy_helper
from torch import fx, nn

from passes.core.site import Array
from passes.errors import UnsupportedError, first_line
from passes.graph import TensorSpec
from passes.onnx_graph import OnnxGraph
from passes.onnx_module_nodes import (
    BatchedReshape,
    OnSizes,
    OnTensors,
    Refused,
    batch_norm,
    batch_of,
    dropout,
    fixed_numbers,
)
from passes.onnx_module_ops import MODULE_OPS
from passes.onnx_module_values import RULES, Values, values_of
from passes.onnx_stepper import reads
from passes.training.layers import StageLayer
from passes.training.network import TrainableNetwork

Tensor = torch.Tensor
Value = Tensor | Values

_GAINS = frozenset({"Add", "Sub", "Mul", "Div"})
_TRAINED: Mapping[str, tuple[int, ...]] = {
    "PRelu": (1,),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
}
"""Inputs whose constants are weights, whatever their shape."""
_REFUSALS = {
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "control flow is not trained"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent layers are not trained"),
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
        "quantized networks are not trained; train the one in floats and quantize it then",
    ),
}


@dataclass(frozen=True)
class _Known:
    """A tensor of the network: where the module has it, and its values with one batch and with two."""

    at: fx.Node
    one: Value
    two: Value


class Builder:
    """One use: :meth:`build`, then ``results`` holds the outputs for ``feeds[0]`` and for both feeds as one batch.

    ``half``: the network computes in half precision, outside of here.
    """

    def __init__(self, graph: OnnxGraph, feeds: Sequence[Mapping[str, Array]]) -> None:
        model, outside = graph.skeleton()
        self.model, self.feeds, self.specs = model, feeds, graph.inputs
        self.opset = {o.domain: o.version for o in model.opset_import}.get("", 1)
        self.outputs = [o.name for o in model.graph.output]
        self.sites = {site.output: site for site in graph.sites().sites if not site.in_body}
        stored = {t.name: outside.get(t.name, t) for t in model.graph.initializer}
        self.plain = {name: v if isinstance(v, np.ndarray) else numpy_helper.to_array(v) for name, v in stored.items()}
        self.plain |= {n.output[0]: _held(n) for n in model.graph.node if n.op_type == "Constant" and _is_plain(n)}
        self.half = any(array.dtype == np.float16 for array in self.plain.values())
        self.nodes = self._live()
        self.constants = {**self.plain, **self._folded()}
        self.nodes = [n for n in self.nodes if any(out not in self.constants for out in n.output if out)]
        self.trained = self._to_train()
        self.root, self.fx = nn.Module(), fx.Graph()
        self.env: dict[str, _Known] = {}
        self.stored: dict[str, fx.Node] = {}
        self.tied: dict[tuple[str, tuple[int, ...]], StageLayer] = {}
        self._taken: set[str] = set()
        self.results: list[tuple[Tensor, Tensor]] = []
        self.network = TrainableNetwork(
            fx.GraphModule(nn.Module(), fx.Graph()), tuple(s.name for s in self.specs), tuple(self.outputs)
        )

    def _live(self) -> list[NodeProto]:
        """Nodes that an output depends on; what only unpacks the weight of a site is none."""
        needed, live = set(self.outputs), []
        for node in reversed(self.model.graph.node):
            if needed.isdisjoint(node.output):
                continue
            live.append(node)
            site = next((self.sites[out] for out in node.output if out in self.sites), None)
            needed.update(reads(node) if site is None else [site.input])
        return live[::-1]

    def _folded(self) -> dict[str, Array]:
        """What depends on constants alone, by onnxruntime."""
        fixed, nodes = set(self.plain), []
        for node in self.nodes:
            given = reads(node)
            random = node.op_type.startswith("Random") or node.op_type in ("Multinomial", "Bernoulli")
            if fixed.issuperset(given) and not random and not node.domain and node.output[0] not in self.plain:
                nodes.append(node)
                fixed.update(node.output)
        made = {out for node in nodes for out in node.output if out}
        wanted = [name for name in made if name in self.outputs or any(name in reads(n) for n in self.nodes)]
        if not wanted:
            return {}
        used = {name for node in nodes for name in reads(node)} & set(self.plain)
        small = helper.make_graph(
            nodes,
            "constants",
            [],
            [ValueInfoProto(name=name) for name in wanted],
            [numpy_helper.from_array(np.asarray(self.plain[name], order="C"), name) for name in sorted(used)],
        )
        model = helper.make_model(
            small, opset_imports=list(self.model.opset_import), ir_version=max(self.model.ir_version, 4)
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
            return dict(zip(wanted, session.run(wanted, {}), strict=True))
        except Exception as error:  # onnxruntime has an exception for each state
            reason = first_line(error)
            raise UnsupportedError(f"the network's constants cannot be computed: {reason}") from error

    def _to_train(self) -> set[str]:
        """Constants that are trained: every node that reads them takes them for weights."""
        votes: dict[str, bool] = {}
        for node in self.nodes:
            if node.op_type == "BatchNormalization" or any(out in self.sites for out in node.output):
                continue
            for slot, name in enumerate(node.input):
                if name in self.plain:
                    votes[name] = votes.get(name, True) and self._is_weight(node, slot)
        return {name for name, wanted in votes.items() if wanted}

    def _is_weight(self, node: NodeProto, slot: int) -> bool:
        array = self.plain[node.input[slot]]
        if array.dtype.kind != "f" or node.domain:
            return False
        if node.op_type in _GAINS:
            meets_input = any(name in self.feeds[0] for name in node.input)
            return not meets_input and array.size > 1 and sum(size > 1 for size in array.shape) == 1
        return slot in _TRAINED.get(node.op_type, ())

    def build(self) -> TrainableNetwork:
        for spec in self.specs:
            self._input(spec)
        left = Counter(name for node in self.nodes for name in reads(node))
        left.update(self.outputs)
        for node in self.nodes:
            try:
                with torch.no_grad():
                    self._node(node)
            except Refused as reason:
                raise UnsupportedError(f"{_label(node)} cannot be trained: {reason}") from reason
            for name in reads(node):
                left[name] -= 1
                if not left[name]:
                    self.env.pop(name, None)
        found = [self.env[name] if name in self.env else self._constant(name) for name in self.outputs]
        for known, name in zip(found, self.outputs, strict=True):
            if isinstance(known.one, Values) or isinstance(known.two, Values):
                raise UnsupportedError(f"output '{name}' is a size, which cannot be trained")
            self.results.append((known.one, known.two))
        at = [known.at for known in found]
        self.fx.output(at[0] if len(at) == 1 else tuple(at))
        self.fx.lint()
        self.network.module = fx.GraphModule(self.root, self.fx, "OnnxModule").eval()
        return self.network

    def _input(self, spec: TensorSpec) -> None:
        one, other = (torch.from_numpy(np.asarray(feeds[spec.name])) for feeds in self.feeds)
        at = self.fx.placeholder(self._path(spec.name))
        if spec.dtype in ("float16", "float64"):
            at = self.fx.call_method("float", (at,))
            one, other = one.float(), other.float()
        two = torch.cat([one, other], _batch_axis(spec)) if one.ndim else one
        self.env[spec.name] = _Known(at, one, two)

    def _node(self, node: NodeProto) -> None:
        site = next((self.sites[out] for out in node.output if out in self.sites), None)
        if site is not None:
            layer = StageLayer(site.stage, site.channel_axis)
            self._tie(layer, site.weight_key)
            path = self._call(node, layer, [site.input])
            self.network.sites[site.name], self.network.layers[site.name] = site, path
        elif node.domain not in ("", "ai.onnx"):
            raise Refused(f"it is of domain {node.domain}")
        elif node.op_type == "BatchNormalization":
            known = self._known(node.input[0])
            assert isinstance(known.one, Tensor)
            norm = batch_norm(node, known.one.ndim, [self.constants.get(name) for name in node.input[1:5]])
            self.network.norms[self._call(node, norm, [node.input[0]])] = node.output[0]
        elif node.op_type == "Dropout":
            given = node.input[1] if len(node.input) > 1 else ""
            if given and given not in self.constants:
                raise Refused("its ratio is computed")
            self._call(node, dropout(node, self.constants.get(given)), [node.input[0]])
        else:
            self._operator(node)

    def _tie(self, layer: StageLayer, key: str) -> None:
        """Gives the layer the weight of an earlier one that reads the same, and its bias if that is equal."""
        first = self.tied.setdefault((key, tuple(layer.weight.shape)), layer) if key else layer
        layer.weight = first.weight
        if layer.bias is not None and first.bias is not None and torch.equal(layer.bias, first.bias):
            layer.bias = first.bias

    def _operator(self, node: NodeProto) -> None:
        if node.op_type in _REFUSALS:
            raise Refused(_REFUSALS[node.op_type])
        computed = [name for name in node.input if name and name not in self.constants]
        sizes = bool(computed) and all(isinstance(self._known(name).one, Values) for name in computed)
        sizes = (sizes and node.op_type in RULES) or node.op_type in ("Shape", "Size")
        fixed: list[Values | None] = [None] * len(node.input)
        slots, names = [], []
        for slot, name in enumerate(node.input):
            if name in self.constants:
                array = self.constants[name]
                fixed[slot] = values_of(array) if sizes else fixed_numbers(node.op_type, slot, array)
                if sizes and fixed[slot] is None:
                    raise Refused("its arithmetic on sizes is not covered")
            if name and fixed[slot] is None:
                slots.append(slot)
                names.append(name)
        if sizes:
            self._call(node, OnSizes(node, self.opset, fixed, slots), names)
            return
        if node.op_type not in MODULE_OPS:
            raise Refused("there is no such operator with gradients here")
        x = self._known(names[0]) if names else None
        batch = None
        if x is not None and isinstance(x.one, Tensor) and isinstance(x.two, Tensor):
            batch = batch_of(node, fixed[1] if len(fixed) > 1 else None, x.one.shape, x.two.shape)
        if batch is not None:
            self._call(node, BatchedReshape(node, self.opset, fixed, slots, batch), names)
        else:
            self._call(node, OnTensors(node, self.opset, fixed, slots), names)

    def _call(self, node: NodeProto, module: nn.Module, names: Sequence[str]) -> str:
        """Puts ``module`` in the node's place; returns its path."""
        known = [self._known(name) for name in names]
        module.eval()
        one = _tried(module, [k.one for k in known], "")
        two = _tried(module, [k.two for k in known], "it cannot take two samples as a batch: ")
        path = self._path(node.name or node.output[0])
        self.root.add_module(path, module)
        at = self.fx.call_module(path, tuple(k.at for k in known))
        if len(node.output) == 1:
            self.env[node.output[0]] = _Known(at, one, two)
            return path
        singles = (list(one), list(two)) if isinstance(one, tuple) else ([one], [two])
        for index, name in enumerate(node.output):
            if name and index < len(singles[0]):
                part = self.fx.call_function(_item, (at, index)) if isinstance(one, tuple) else at
                self.env[name] = _Known(part, singles[0][index], singles[1][index])
        return path

    def _known(self, name: str) -> _Known:
        return self.env[name] if name in self.env else self._constant(name)

    def _constant(self, name: str) -> _Known:
        array = np.asarray(self.constants[name])
        value = torch.tensor(array, dtype=torch.float32 if array.dtype.kind == "f" else None)
        if name not in self.stored:
            path = self._path(name)
            if name in self.trained:
                self.root.register_parameter(path, nn.Parameter(value))
                self.network.constants[path] = name
            else:
                self.root.register_buffer(path, value)
            self.stored[name] = self.fx.get_attr(path)
        return _Known(self.stored[name], value, value)

    def _path(self, label: str) -> str:
        """A fresh name of an attribute, after a label of the file."""
        base = re.sub(r"\W+", "_", label.removeprefix("/"), flags=re.ASCII).strip("_") or "node"
        base = f"node_{base}" if base[0].isdigit() or keyword.iskeyword(base) else base
        path, count = base, 0
        while hasattr(self.root, path) or path in self._taken:
            count += 1
            path = f"{base}_{count}"
        self._taken.add(path)
        return path


def _tried(module: nn.Module, inputs: Sequence[Value], when: str) -> Any:
    try:
        return module(*inputs)
    except Refused as reason:
        raise Refused(f"{when}{reason}") from reason
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:  # what torch raises
        raise Refused(f"{when}torch says: {first_line(error)}") from error


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _label(node: NodeProto) -> str:
    return f"node '{node.name or node.output[0]}' ({node.op_type})"


def _is_plain(node: NodeProto) -> bool:
    """True for a Constant that holds a tensor of numbers."""
    return any(a.name == "value" and numpy_helper.to_array(a.t).dtype.kind in "fiub" for a in node.attribute)


def _held(node: NodeProto) -> Array:
    return numpy_helper.to_array(next(a.t for a in node.attribute if a.name == "value"))


def _batch_axis(spec: TensorSpec) -> int:
    """Where two samples are joined: the first axis, or where that is fixed, the first that is not."""
    if spec.shape and isinstance(spec.shape[0], int):
        return next((i for i, size in enumerate(spec.shape) if not isinstance(size, int)), 0)
    return 0
