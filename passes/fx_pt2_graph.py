"""From the JSON of an exported program to a torch.fx GraphModule.

Nothing that the file says is evaluated: names are checked to be names, operators are looked up in ATen's dispatcher by
name, private ones and those that open files are refused, and the expressions of symbolic sizes are only compared.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from passes.errors import InputError, UnsupportedError, UsageError
from passes.fx_network import Network
from passes.fx_trace import is_named, name_nodes
from passes.graph import Note

Dim = int | str | None

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_OPERATOR = re.compile(r"torch\.ops\.aten\.([a-z_][a-zA-Z0-9_]*)\.([A-Za-z0-9_]+)")
_LAYER = re.compile(r"torch\.nn\.modules\.(conv|linear|batchnorm)\.\w+")
_SYMBOL = re.compile(r"Symbol\('(\w+)'[\w=, ]*\)|(\w+)")
_DTYPES = {
    **{1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16},
    **{7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16},
}
_MEMORY = {
    **{1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format},
}
_PRIVATE = frozenset(
    {
        *("_native_batch_norm_legit_no_training", "_softmax", "_log_softmax", "_to_copy", "_unsafe_view"),
        *("_convolution", "_convolution_mode", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_prelu_kernel"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_weight_norm_interface", "_weight_norm", "_unsafe_index"),
        *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_trilinear"),
    }
)
"""Operators with a leading underscore that exported inference networks hold."""
_SKIPPED = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
"""Checks of what the exporter assumed; they compute nothing."""
_FILES = frozenset({"from_file"})
_ARITHMETIC = {
    **{
        f"_operator.{n}": getattr(operator, n)
        for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")
    },
    **{f"_operator.{n}": getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    **{"_operator.getitem": operator.getitem, "torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min},
    **{"torch.sym_not": torch.sym_not, "torch.sym_int": torch.sym_int, "torch.sym_float": torch.sym_float},
}


@dataclass(frozen=True, eq=False)
class Program:
    """A network out of a file: inputs and outputs as declared, and example inputs of the priced shapes."""

    network: Network
    examples: tuple[torch.Tensor, ...]
    inputs: tuple[tuple[Dim, ...], ...]
    outputs: tuple[tuple[Dim, ...], ...]
    notes: tuple[Note, ...]


def build(
    path: Path, program: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Program:
    """The network of a program's JSON with its stored tensors. Raises what :func:`passes.fx_pt2.load` raises, and what
    a damaged file provokes."""
    writer = _Writer(path, program["graph_module"]["graph"], tensors)
    signature = program["graph_module"]["signature"]
    names = writer.inputs(signature["input_specs"])
    for node in writer.graph_json["nodes"]:
        writer.node(node)
    outputs = writer.outputs(signature["output_specs"])
    for node in reversed(writer.graph.nodes):  # results that nobody takes
        if node.target is operator.getitem and not node.users:
            writer.graph.erase_node(node)
    module = fx.GraphModule(writer.root, writer.graph, "ExportedProgram").eval()
    module.graph.lint()
    network = Network(module)
    name_nodes(network, {node: path for node, path in writer.paths.items() if is_named(network, node)})
    declared = tuple(writer.declared(name) for name in names)
    sizes, notes = _bind(names, declared, writer, shapes)
    examples = tuple(torch.zeros(size, dtype=writer.dtype(name)) for name, size in zip(names, sizes, strict=True))
    return Program(network, examples, declared, tuple(writer.declared(name) for name in outputs), notes)


@dataclass(eq=False)
class _Writer:
    """Turns the JSON of a graph into a torch.fx graph, node by node."""

    path: Path
    graph_json: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    paths: dict[fx.Node, str] = field(default_factory=dict)
    """By node the path of the layer's module that it comes from."""

    def refuse(self, reason: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {reason}")

    def name(self, text: Any) -> str:
        """``text``, which becomes part of generated code, if it is a plain name."""
        if not isinstance(text, str) or not _NAME.fullmatch(text) or keyword.iskeyword(text):
            raise InputError(f"{self.path} is damaged: {text!r} is no name of a tensor")
        return text

    def inputs(self, specs: Sequence[Mapping[str, Any]]) -> list[str]:
        """Placeholders for what the caller gives, stored tensors for the rest; returns the names of the former."""
        names = []
        for spec in specs:
            ((kind, content),) = spec.items()
            if kind == "user_input":
                ((form, argument),) = content["arg"].items()
                if form == "as_none":
                    continue
                if form != "as_tensor":
                    raise self.refuse(f"an input is no tensor ({form.removeprefix('as_')})")
                name = self.name(argument["name"])
                self.values[name] = self.graph.placeholder(name)
                names.append(name)
            elif kind in ("parameter", "buffer", "tensor_constant"):
                self.stored[self.name(content["arg"]["name"])] = self._hold(str(content[f"{kind}_name"]))
            elif kind == "constant_input":
                continue
            else:
                raise self.refuse(f"it takes an input of kind '{kind}', which is not supported")
        if not names:
            raise self.refuse("the network takes no tensor")
        return names

    def _hold(self, path: str) -> str:
        """Puts a stored tensor into the module; returns its path there."""
        if not _PATH.fullmatch(path) or path not in self.tensors:
            raise InputError(f"{self.path} is damaged: it stores no tensor {path!r}")
        *parents, name = path.split(".")
        module = self.root
        for parent in parents:
            child = module._modules.get(parent)
            if child is None:
                child = nn.Module()
                module.add_module(parent, child)
            module = child
        tensor = self.tensors[path]
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
        return path

    def node(self, node: Mapping[str, Any]) -> None:
        target = str(node["target"])
        outputs = [self._output(output) for output in node["outputs"]]
        called = self._target(target, outputs)
        if called is None:
            return
        args, kwargs = [], {}
        for given in node["inputs"]:
            value = self._argument(given["arg"], target)
            if given.get("kind") == 2:
                kwargs[self.name(given["name"])] = value
            else:
                args.append(value)
        name = next((o for o in outputs if isinstance(o, str)), "unused")
        whole = len(outputs) != 1 or isinstance(outputs[0], list)
        made = self.graph.create_node("call_function", called, tuple(args), kwargs, f"{name}_all" if whole else name)
        stack = str(node.get("metadata", {}).get("nn_module_stack", "")).rpartition(";")[2].split(",")
        if len(stack) == 3 and _LAYER.fullmatch(stack[2]) and _PATH.fullmatch(stack[1]):
            self.paths[made] = stack[1]
        if not whole:
            if isinstance(outputs[0], str):
                self.values[outputs[0]] = made
            return
        parts = outputs[0] if len(outputs) == 1 and isinstance(outputs[0], list) else outputs
        for index, part in enumerate(parts):
            if isinstance(part, str):
                item = self.graph.create_node("call_function", operator.getitem, (made, index), {}, part)
                self.values[part] = item

    def _output(self, output: Mapping[str, Any]) -> Any:
        """A name, names of a list, or None for what nobody reads."""
        ((kind, content),) = output.items()
        if kind == "as_tensor":
            return self.name(content["name"])
        if kind == "as_tensors":
            return [self.name(part["name"]) for part in content]
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float") and "as_name" in content:
            return self.name(content["as_name"])
        if kind in ("as_none", "as_int", "as_bool", "as_float"):
            return None
        raise self.refuse(f"a node gives a result of kind '{kind.removeprefix('as_')}', which is not supported")

    def _target(self, target: str, outputs: list[Any]) -> Any:
        """The operator of that name; None for one that computes nothing."""
        where = next((o for o in outputs if isinstance(o, str)), "?")
        if target in _ARITHMETIC:
            return _ARITHMETIC[target]
        match = _OPERATOR.fullmatch(target)
        if match is None:
            kind = "control flow" if "higher_order" in target else "an operator from outside of ATen"
            raise self.refuse(f"node '{where}' calls {target}: {kind} is not supported")
        name, overload = match.groups()
        if name in _SKIPPED:
            return None
        if name in _FILES or (name.startswith("_") and name not in _PRIVATE) or name.endswith("_backward"):
            raise self.refuse(f"node '{where}' calls {target}, which no inference network needs")
        full = f"aten::{name}" if overload == "default" else f"aten::{name}.{overload}"
        if not torch._C._dispatch_has_kernel(full) and not name.startswith("sym_"):
            raise self.refuse(f"node '{where}' calls {target}, which this torch does not have")
        return getattr(getattr(torch.ops.aten, name), overload)

    def _read(self, name: str) -> Any:
        if name in self.stored:
            path = self.stored[name]
            if name not in self.values:
                self.values[name] = self.graph.get_attr(path)
            return self.values[name]
        if name not in self.values:
            raise InputError(f"{self.path} is damaged: {name!r} is read before it is written")
        return self.values[name]

    def _argument(self, argument: Mapping[str, Any], target: str) -> Any:
        ((kind, content),) = argument.items()
        if kind == "as_none":
            return None
        if kind == "as_tensor":
            return self._read(content["name"])
        if kind == "as_tensors":
            return [self._read(part["name"]) for part in content]
        if kind in ("as_optional_tensors", "as_optional_tensor"):
            found = [self._argument(part, target) for part in (content if isinstance(content, list) else [content])]
            return found if isinstance(content, list) else found[0]
        if kind == "as_float" and content in _SPECIAL:
            return _SPECIAL[content]
        if kind in _PLAIN and _is_plain(content, _PLAIN[kind]):
            return content
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            return self._symbolic(content)
        if kind in ("as_sym_ints", "as_sym_bools", "as_sym_floats"):
            return [self._symbolic(part) for part in content]
        if kind == "as_scalar_type":
            return _DTYPES[content]
        if kind == "as_memory_format":
            return _MEMORY[content]
        if kind == "as_layout" and content == 7:
            return torch.strided
        if kind == "as_device":  # networks are rewritten on the CPU, wherever they were exported
            return torch.device("cpu")
        raise self.refuse(f"{target} has an argument of kind '{kind.removeprefix('as_')}', which is not supported")

    def _symbolic(self, part: Mapping[str, Any]) -> Any:
        ((kind, content),) = part.items()
        if kind == "as_name":
            return self._read(content)
        if not isinstance(content, int | float):
            raise InputError(f"{self.path} is damaged: {content!r} is no number")
        return content

    def outputs(self, specs: Sequence[Mapping[str, Any]]) -> list[str]:
        """Writes the graph's output; returns the names of its tensors."""
        results, names = [], []
        for spec in specs:
            ((kind, content),) = spec.items()
            if kind == "buffer_mutation":
                buffer = content["buffer_name"]
                raise self.refuse(
                    f"the network changes its buffer '{buffer}'; only inference is supported: call eval() on the "
                    "module before it is exported"
                )
            if kind != "user_output":
                raise self.refuse(f"it has an output of kind '{kind}', which is not supported")
            if "as_tensor" in content["arg"]:
                names.append(self.name(content["arg"]["as_tensor"]["name"]))
            results.append(self._argument(content["arg"], "the network's output"))
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        return names

    def declared(self, name: str) -> tuple[Dim, ...]:
        """The shape of a tensor as the file declares it: numbers, names of symbols, None for expressions."""
        return tuple(_dimension(size)[0] for size in self.graph_json["tensor_values"][name]["sizes"])

    def hints(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor had when the network was exported."""
        return tuple(_dimension(size)[1] for size in self.graph_json["tensor_values"][name]["sizes"])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.graph_json["tensor_values"][name]["dtype"]]


_SPECIAL = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""Numbers that JSON has no way to write."""
_PLAIN: dict[str, type | tuple[type, ...]] = {
    **{"as_int": int, "as_ints": int, "as_bool": bool, "as_bools": bool, "as_string": str, "as_strings": str},
    **{"as_float": (int, float), "as_floats": (int, float), "as_int_lists": int},
}


def _is_plain(content: Any, kind: type | tuple[type, ...]) -> bool:
    if isinstance(content, list):
        return all(_is_plain(part, kind) for part in content)
    return isinstance(content, kind)


def _dimension(size: Mapping[str, Any]) -> tuple[Dim, int]:
    """A dimension as declared, and its size when the network was exported (1 if that is not known)."""
    if "as_int" in size:
        return int(size["as_int"]), int(size["as_int"])
    expression = size["as_expr"]
    match = _SYMBOL.fullmatch(str(expression["expr_str"]))
    hint = (expression.get("hint") or {}).get("as_int", 1)
    return (match.group(1) or match.group(2)) if match else None, int(hint)


def _bind(
    names: Sequence[str],
    declared: Sequence[tuple[Dim, ...]],
    writer: _Writer,
    asked: Mapping[str, tuple[int, ...]],
) -> tuple[list[tuple[int, ...]], tuple[Note, ...]]:
    """Concrete sizes: those asked for, else 1 for a symbolic batch and the exported size for every other one."""
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise UsageError(f"shape given for input '{unknown[0]}': the network's inputs are {', '.join(names)}")
    sizes: dict[str, int] = {}
    for name, dims in zip(names, declared, strict=True):
        if name not in asked:
            continue
        wanted = asked[name]
        if len(wanted) != len(dims) or any(isinstance(d, int) and d != w for d, w in zip(dims, wanted, strict=True)):
            raise UsageError(f"input '{name}' is of shape {list(dims)}, given is {list(wanted)}")
        for dim, size in zip(dims, wanted, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise UsageError(f"dimension '{dim}' is given as {sizes[dim]} and as {size}")
    shapes, notes = [], []
    for name, dims in zip(names, declared, strict=True):
        if name in asked:
            shapes.append(tuple(asked[name]))
            continue
        shape = []
        for axis, (dim, hint) in enumerate(zip(dims, writer.hints(name), strict=True)):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            size = sizes.setdefault(dim, 1 if axis == 0 else hint) if dim is not None else hint
            shape.append(size)
            reason = f"dimension '{dim or axis}' of input '{name}' is symbolic: priced at {size}"
            notes.append(Note(name, "input", reason))
        shapes.append(tuple(shape))
    return shapes, tuple(notes)
