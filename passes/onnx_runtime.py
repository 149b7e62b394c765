"""onnxruntime on a network under the knife: whole runs, and runs that look at what lies inside."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernelError

from passes.core.site import Array
from passes.graph import Note
from passes.onnx_parts import MAIN
from passes.onnx_shapes import LENGTHS, Binding, bind, infer, variables
from passes.onnx_surgery import Scope, Surgery
from passes.onnx_weights import Weight
from passes.onnx_write import DataFile, stored_bytes

IN_MEMORY_BYTES = 256 << 20
"""Larger networks go to onnxruntime through a temporary file."""
_EXACT = "session.x64quantprecision"
_OBSERVED_ELEMENTS = 1 << 27
"""Inputs beyond this are not made up: nobody would wait for the run."""


def exact_session(model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session on a file or its bytes, on the CPU, in which sums of 8-bit products do not saturate where that can be.

    Processors of x86 without VNNI add pairs of products of uint8 and int8 up in 16 bits, unless onnxruntime is told to
    take a slower way. That way takes constant weights, and has no kernels for operators that are written out for int8,
    which need none: a network that has those, and others for uint8, keeps the fast kernels.
    """
    providers = ["CPUExecutionProvider"]
    options.add_session_config_entry(_EXACT, "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers)
    except NoKernelError:
        options.add_session_config_entry(_EXACT, "0")
        return onnxruntime.InferenceSession(model, options, providers)


def session(
    surgery: Surgery, build: Callable[[Callable[[Weight], TensorProto]], ModelProto], optimise: bool = True
) -> onnxruntime.InferenceSession:
    """A session on the model that ``build`` makes with a way to store weights. Raises what onnxruntime raises."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if stored_bytes(surgery) < IN_MEMORY_BYTES:
        return exact_session(build(Weight.tensor).SerializeToString(), options)
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        path = Path(folder) / "model.onnx"
        with (path.parent / "weights").open("wb") as data:
            path.write_bytes(build(DataFile(data, "weights").tensor).SerializeToString())
        return exact_session(str(path), options)


def random_feeds(surgery: Surgery, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """Inputs of the given shapes: normal floats, ones for integers, true for booleans."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    if sum(prod(shape) for shape in shapes.values()) > _OBSERVED_ELEMENTS:
        return feeds
    for info in surgery.main.frame.input:
        if info.name in shapes:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
            floats = dtype.kind not in "iub" and dtype.kind != "O"
            value = rng.standard_normal(shapes[info.name]) if floats else np.ones(shapes[info.name])
            feeds[info.name] = value.astype(dtype)
    return feeds


def settle(
    surgery: Surgery, asked: Mapping[str, tuple[int, ...]]
) -> tuple[Mapping[str, tuple[int, ...]], tuple[Note, ...]]:
    """Puts a concrete shape on every tensor it can; returns the inputs' shapes and what there is to say.

    Open sequence lengths are a guess, so lengths are tried until the network runs. Raises UsageError where ``asked``
    does not fit the inputs.
    """
    real = {t.name for t in surgery.main.graph.inputs}
    inputs = {info.name: info for info in surgery.main.frame.input if info.name in real}
    first: tuple[Binding, tuple[Note, ...]] | None = None
    for length in LENGTHS:
        binding = bind(inputs, asked, length)
        if first is not None and binding.shapes == first[0].shapes:
            break
        infer(surgery, binding.shapes)
        notes = observe(surgery, random_feeds(surgery, binding.shapes, 0))
        if not any(note.node == MAIN for note in notes):
            return binding.shapes, (*binding.notes, *notes)
        first = first or (binding, notes)
    assert first is not None
    infer(surgery, first[0].shapes)
    observe(surgery, random_feeds(surgery, first[0].shapes, 0))
    return first[0].shapes, (*first[0].notes, *first[1])


def observe(surgery: Surgery, feeds: Mapping[str, Array]) -> tuple[Note, ...]:
    """Fills shapes that inference left open by running the network once, bodies of If and Loop on their own.

    A body is run whether its branch is taken or not. Returns a note for each graph that could not be run.
    """
    notes: list[Note] = []
    _observe(surgery, surgery.main, dict(feeds), notes)
    return tuple(notes)


def _observe(surgery: Surgery, scope: Scope, values: dict[str, Array], notes: list[Note]) -> None:
    bodies = [(node, f"{node.name}/{name}") for node in scope.graph.nodes for name in node.attrs]
    bodies = [(node, path) for node, path in bodies if node.op in ("If", "Loop") and _has_holes(surgery, path)]
    wanted = {t.name: t for t in variables(scope) if t.shape is None}
    for node, path in bodies:
        for tensor in [*captured(surgery, surgery.scopes[path]), *node.inputs]:
            if isinstance(tensor, gs.Variable) and not tensor.is_empty() and tensor.name not in values:
                wanted[tensor.name] = tensor
    wanted = {name: tensor for name, tensor in wanted.items() if name not in values}
    if wanted:
        found, problem = _run_as_far_as_possible(surgery, scope, values, wanted)
        if problem:
            where = f"the body '{scope.path}'" if scope.path else "the network"
            notes.append(Note(scope.path, "graph", f"{where} could not be run to observe shapes: {problem}"))
        values = {**values, **found}
    for tensor in variables(scope):
        if tensor.shape is None and tensor.name in values:
            tensor.shape = tuple(values[tensor.name].shape)
            tensor.dtype = tensor.dtype or helper.np_dtype_to_tensor_dtype(values[tensor.name].dtype)
    for node, path in bodies:
        inner = dict(values)
        if node.op == "Loop":
            carried = [_value(surgery, t, values) for t in node.inputs[2:]]
            start = [np.array(0, np.int64), np.array(True), *carried]
            names = [t.name for t in surgery.scopes[path].graph.inputs]
            inner.update((name, v) for name, v in zip(names, start, strict=False) if v is not None)
        _observe(surgery, surgery.scopes[path], inner, notes)


def _has_holes(surgery: Surgery, path: str) -> bool:
    scopes = {scope.path: scope for scope, _ in surgery.nodes(path)}
    return any(t.shape is None for scope in scopes.values() for t in variables(scope))


def _value(surgery: Surgery, tensor: gs.Tensor, values: Mapping[str, Array]) -> Array | None:
    if isinstance(tensor, gs.Constant):
        return surgery.weight_of(tensor).array
    return values.get(tensor.name)


def captured(surgery: Surgery, scope: Scope) -> list[gs.Tensor]:
    """Tensors that the nodes of a body, and of bodies in it, read from outside of it."""
    inside: set[int] = set()
    reads: dict[int, gs.Tensor] = {}
    seen = set()
    for home, node in surgery.nodes(scope.path):
        if home.path not in seen:
            seen.add(home.path)
            inside.update(id(t) for t in [*home.graph.inputs, *home.weights.values()])
        inside.update(id(t) for t in node.outputs)
        reads.update((id(t), t) for t in node.inputs if not t.is_empty())
    return [tensor for key, tensor in reads.items() if key not in inside]


def _run_as_far_as_possible(
    surgery: Surgery, scope: Scope, values: Mapping[str, Array], wanted: Mapping[str, gs.Tensor]
) -> tuple[dict[str, Array], str]:
    """The wanted tensors, and "" or what stopped the run; then the tensors before the node that fails."""
    nodes = scope.graph.nodes
    good: dict[str, Array] = {}
    low, high, problem = 0, len(nodes), ""
    count = high
    while low < high or not problem:  # the longest runnable prefix, by bisection; most graphs run at once
        written = {id(t) for node in nodes[:count] for t in node.outputs}
        names = [name for name, tensor in wanted.items() if id(tensor) in written]
        try:
            good = _run(surgery, scope, values, names, count) if names else {}
            if count == len(nodes):
                return good, ""
            low = count
        except Exception as error:  # whatever the runtime refuses is told in the note
            problem = problem or " ".join(str(error).split())[:200]
            high = count - 1
        count = (low + high + 1) // 2
    return good, problem


def _run(
    surgery: Surgery, scope: Scope, values: Mapping[str, Array], wanted: list[str], count: int
) -> dict[str, Array]:
    """Runs the first ``count`` nodes of a graph as a model of their own; returns the wanted tensors."""
    outer = [] if scope.path == MAIN else captured(surgery, scope)
    stored = [surgery.weight_of(t) for t in outer if isinstance(t, gs.Constant)]
    names = [t.name for t in [*scope.graph.inputs, *outer] if t.name in values]

    def build(tensor: Callable[[Weight], TensorProto]) -> ModelProto:
        model = surgery.export_scope(scope, tensor)
        del model.graph.output[:]
        del model.graph.node[count:]
        model.graph.output.extend(ValueInfoProto(name=name) for name in wanted)
        if scope.path != MAIN:
            del model.graph.input[:]
            for name in names:
                kind = helper.np_dtype_to_tensor_dtype(values[name].dtype)
                model.graph.input.append(helper.make_tensor_value_info(name, kind, values[name].shape))
            model.graph.initializer.extend(tensor(weight) for weight in stored)
        return model

    run = session(surgery, build, optimise=False)
    results = run.run(wanted, {name: values[name] for name in names})
    return {name: value for name, value in zip(wanted, results, strict=True) if isinstance(value, np.ndarray)}
