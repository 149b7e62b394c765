"""The compiling process: ``python -m codegen.tvm_build_child REQUEST ANSWER``; see :mod:`codegen.tvm_build`.

onnxruntime folds constants first. Exporters write shapes and pads as little networks of their own (Shape, Gather,
Concat), which TVM's importer wants to see as constants.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.child_process import end_with_parent

if TYPE_CHECKING:
    import onnx

_OLDEST_OPSET = 13
"""Before it, Slice, Squeeze, Split and others took attributes that TVM's importer does not read."""


class Refused(Exception):
    """It cannot be done; the message says what. ``by_tvm``: TVM was asked and said no."""

    def __init__(self, reason: str, *, by_tvm: bool = False) -> None:
        super().__init__(reason)
        self.by_tvm = by_tvm


def main(request_path: str, answer_path: str) -> None:
    end_with_parent()
    request = json.loads(Path(request_path).read_bytes())
    try:
        answer = _build(Path(request["model"]), Path(request["library"]), request["shapes"])
    except Refused as refusal:
        answer = {"reason": str(refusal)}
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _build(path: Path, library: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    import onnx

    model = onnx.load(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    symbolic = any(not dim.HasField("dim_value") for value in inputs for dim in value.type.tensor_type.shape.dim)
    bound: dict[str, list[int]] = {}
    try:
        _compile(_folded(path, {}), library, len(inputs))
    except Refused as refusal:
        if not symbolic:
            raise
        bound = {value.name: shapes[value.name] for value in inputs}
        try:
            _compile(_folded(path, bound), library, len(inputs))
        except Refused as second:
            # Fixed shapes can contradict a network that has branches for several: then the first try tells more.
            raise (second if second.by_tvm else refusal) from second
    return {
        "inputs": [value.name for value in inputs],
        "outputs": [value.name for value in model.graph.output],
        "bound": bound,
        "coarse": _coarse(model),
    }


def _coarse(model: onnx.ModelProto) -> bool:
    from onnx import TensorProto

    half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    tensors = [tensor.data_type for tensor in model.graph.initializer]
    tensors += [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)]
    return bool(half & set(tensors)) or any(node.op_type.endswith("QuantizeLinear") for node in model.graph.node)


def _folded(path: Path, bound: dict[str, list[int]]) -> onnx.ModelProto:
    """The network with its constants folded, weights that are no inputs, and ``bound`` input shapes."""
    import onnx
    from onnx import version_converter

    model = onnx.load(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)  # initializers need not be inputs since
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, bound.get(value.name, ()), strict=False):
            dim.dim_value = size
    if bound:
        del model.graph.value_info[:]
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET:
        try:
            model = version_converter.convert_version(model, _OLDEST_OPSET)
        except (RuntimeError, ValueError) as error:
            raise Refused(f"opset {opset} cannot be converted to {_OLDEST_OPSET}: {first_line(error)}") from error
    return fold_constants(model)


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` as onnxruntime writes it after its basic optimizations: shapes and pads are constants then."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(after)
        options.log_severity_level = 3
        # Quantized constants are folded as well: TVM computes QDQ networks in floats, and wants constant pads.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            onnxruntime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise Refused(f"onnxruntime cannot fold the constants: {first_line(error)}") from error
        return onnx.load(after)


def _compile(model: onnx.ModelProto, library: Path, inputs: int) -> None:
    # The interpreter's torch is not needed here and takes seconds to load.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx
    from tvm.support import cc

    if cc.get_cc() is None:
        raise Refused("no C++ compiler was found to link the library with: install g++ or set CXX")
    try:
        module = from_onnx(model)
    except Exception as error:  # the importer raises whatever the operator's converter hits
        raise Refused(import_reason(error), by_tvm=True) from error
    taken = len(module["main"].params)
    if taken != inputs:
        raise Refused(f"TVM's importer made {taken} inputs of {inputs}")
    target = tvm.target.Target({"kind": "llvm"})
    try:
        with target:
            # tvm.compile alone fuses nothing.
            executable = tvm.compile(relax.get_pipeline("zero")(module), target=target)
        executable.export_library(str(library))
    except Exception as error:
        library.unlink(missing_ok=True)
        raise Refused(f"TVM cannot compile the network: {first_line(error)}", by_tvm=True) from error


def import_reason(error: Exception) -> str:
    """Names the node at which the importer stopped, found in the frames it went through."""
    node, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "_construct_nodes":
            node = trace.tb_frame.f_locals.get("node", node)
        trace = trace.tb_next
    at = "the network" if node is None else f"{node.op_type} {node.name or node.output[0]!r}"
    return f"TVM cannot import {at}: {first_line(error)}"


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
