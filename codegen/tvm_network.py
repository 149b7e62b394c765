"""A whole network, from ONNX to a library, by TVM Relax. TVM is imported when a function is called.

Convolutions and products become annotated tensor expressions with packed weights (:mod:`codegen.tvm_kernels`), what is
added and clamped behind them is fused into their loops, every function gets a schedule, and the calls between them
become one function (:mod:`codegen.tvm_network_flat`) where all shapes are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.runner.attach import attach, describe
from codegen.tune.device import Device
from codegen.tune.schedule import ScheduleSource
from codegen.tvm_network_flat import flattened
from codegen.tvm_network_fold import with_views_folded
from codegen.tvm_network_link import linker
from codegen.tvm_network_onnx import Refused, fold_constants
from codegen.tvm_network_rewrites import rewritten
from passes.errors import first_line

if TYPE_CHECKING:
    import onnx


_ONNX = ("", "ai.onnx")
"""Domains of ONNX's own operators."""


@dataclass(frozen=True)
class Kernel:
    """A function of the library. ``calls`` of it in the network; ``arguments``: shapes and types, results last.

    ``workload``: the key of the layer in it, "" where there is none; ``schedule``: the layer's, as JSON.
    """

    name: str
    calls: int
    arguments: tuple[tuple[tuple[int, ...], str], ...]
    workload: str = ""
    schedule: str = ""


@dataclass(frozen=True)
class Lowered:
    """A network that is ready to be compiled: ``module``, its kernels, and what is to be said of them.

    ``notes``: why a function has not the schedule that it was to have, or the network not the form.
    """

    module: Any
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]


def imported(model: onnx.ModelProto) -> Any:
    """``model`` as a Relax module. Refused with the node that the importer does not take, in no other form either."""
    from codegen.tvm_kernels.imports import load_tvm

    load_tvm()
    from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

    inputs = len(model.graph.input)
    known = {*onnx_frontend._get_convert_map(), "If"}
    if model.functions or _unknown(model.graph, known) is not None:
        model = rewritten(model, known)
        node = _unknown(model.graph, known)
        if node is not None:
            raise Refused(f"TVM cannot import {_named(node)}: its importer has no such operator", by_tvm=True)
        if all(node.domain in _ONNX for node in model.graph.node):
            model = fold_constants(model)
    try:
        module = from_onnx(model)
    except Exception as error:  # the importer raises whatever the operator's converter hits
        raise Refused(import_reason(error), by_tvm=True) from error
    taken = len(module["main"].params)
    if taken != inputs:
        raise Refused(f"TVM's importer made {taken} inputs of {inputs}")
    return module


def import_reason(error: Exception) -> str:
    """Names the node at which the importer stopped, found in the frames it went through."""
    node, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "_construct_nodes":
            node = trace.tb_frame.f_locals.get("node", node)
        trace = trace.tb_next
    at = "the network" if node is None else _named(node)
    return f"TVM cannot import {at}: {first_line(error)}"


def _unknown(graph: onnx.GraphProto, known: Collection[str]) -> onnx.NodeProto | None:
    """The first node of ONNX's own domain, in a branch too, whose operator is not among the ``known`` ones."""
    for node in graph.node:
        if node.domain in _ONNX and node.op_type not in known:
            found: onnx.NodeProto | None = node
            return found
        for attribute in node.attribute:
            found = _unknown(attribute.g, known) if attribute.HasField("g") else None
            if found is not None:
                return found
    return None


def _named(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"


def lowered(module: Any, device: Device, source: ScheduleSource) -> Lowered:
    """``module`` of Relax operators as scheduled functions for ``device``; ``source`` has the layers' schedules."""
    from codegen.tvm_kernels.imports import load_tvm

    tvm = load_tvm()
    from tvm import relax

    from codegen.tvm_kernels.apply import scheduled_with_notes
    from codegen.tvm_kernels.legalize import legalized

    with tvm.target.Target(device.target):
        module = relax.transform.DecomposeOpsForInference()(module)
        module = relax.transform.FoldConstant()(with_views_folded(module))
        module = legalized(module, device, source)
        for step in ("AnnotateTIROpPattern", "FoldConstant", "FuseOps", "FuseTIR", "DeadCodeElimination"):
            module = getattr(relax.transform, step)()(module)
        kernels = _kernels(module)
        module, notes = scheduled_with_notes(module, device)
        module, calls, unsuited = flattened(module)
    if calls is not None:
        kernels = [replace(kernel, calls=calls[kernel.name]) for kernel in kernels if calls[kernel.name]]
    said = [f"{note.node}: {note.op}: {note.reason}" for note in notes]
    if unsuited:
        said.append(f"operators are called by Relax's virtual machine: {unsuited}")
    return Lowered(module, tuple(kernels), tuple(said))


def compiled(module: Any, device: Device, library: Path, options: Sequence[str] = ()) -> None:
    """Writes a lowered module to ``library``; ``options`` go to the compiler that links it. Refused."""
    from codegen.tvm_kernels.imports import load_tvm

    tvm = load_tvm()
    link = linker(device)
    target = tvm.target.Target(device.target)
    try:
        with target:
            executable = tvm.compile(module, target=target)
        executable.export_library(str(library), fcompile=link, options=list(options))
    except Exception as error:
        library.unlink(missing_ok=True)
        raise Refused(f"TVM cannot compile the network: {first_line(error)}", by_tvm=True) from error


def compile_network(
    model: onnx.ModelProto,
    library: Path,
    device: Device,
    source: ScheduleSource,
    *,
    network: str = "",
    plan: str = "",
) -> Lowered:
    """Compiles ``model``, which :func:`codegen.tvm_network_onnx.prepared` made, to ``library``. Raises Refused.

    ``network`` and ``plan``: hashes that the library carries in its metadata.
    """
    linker(device)  # says what is missing before anything is compiled
    module = imported(model)
    inputs, outputs = [[value.name for value in values] for values in (model.graph.input, model.graph.output)]
    made = lowered(module, device, source)
    metadata = describe(module, inputs, outputs, device.target, device=device.model, network=network, plan=plan)
    compiled(attach(made.module, metadata), device, library)
    return made


def _kernels(module: Any) -> list[Kernel]:
    """The functions that ``main`` calls, in the order of the first calls."""
    from tvm import relax

    calls: Counter[Any] = Counter()
    main = module["main"]

    def count(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir":
            calls[expr.args[0]] += 1

    relax.analysis.post_order_visit(main, count)
    found = []
    for variable, number in calls.items():
        function = module[variable]
        workload, schedule = _anchor(function)
        arguments = tuple(_argument(parameter) for parameter in function.params)
        found.append(Kernel(variable.name_hint, number, arguments, workload, schedule))
    return found


def _argument(parameter: Any) -> tuple[tuple[int, ...], str]:
    """Shape and type; -1 for a symbolic size."""
    shape = getattr(parameter.ty, "shape", None)
    sizes = [] if shape is None else [int(size.value) if hasattr(size, "value") else -1 for size in shape]
    return tuple(sizes), str(parameter.ty.dtype)


def _anchor(function: Any) -> tuple[str, str]:
    """The key of the workload and the schedule's JSON that a block of the function is annotated with, or nothing."""
    from tvm import s_tir

    from codegen.tvm_kernels.tensors import SCHEDULE, WORKLOAD

    sketch = s_tir.Schedule(function)
    for block in sketch.get_child_blocks(sketch.get_sblock("root")):
        annotations = sketch.get(block).annotations
        if WORKLOAD in annotations:
            return str(annotations[WORKLOAD]), str(annotations[SCHEDULE])
    return "", ""
