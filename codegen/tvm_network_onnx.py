"""A network as TVM's importer wants it: constants folded, shapes bound, weights that are no inputs.

Exporters write shapes and pads as little networks of their own (Shape, Gather, Concat), which TVM's importer wants to
see as constants: onnxruntime folds them. It folds batch norms, additions and pads into convolutions as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import first_line

if TYPE_CHECKING:
    import onnx

_OLDEST_OPSET = 13
"""Before it, Slice, Squeeze, Split and others took attributes that TVM's importer does not read."""


class Refused(Exception):
    """It cannot be done; the message says what. ``by_tvm``: TVM was asked and said no."""

    def __init__(self, reason: str, *, by_tvm: bool = False) -> None:
        super().__init__(reason)
        self.by_tvm = by_tvm


def free_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are no weights; before IR 4 all weights were inputs too."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def is_symbolic(model: onnx.ModelProto) -> bool:
    """True if an input has a dimension without a size."""
    return any(
        not dim.HasField("dim_value") for value in free_inputs(model) for dim in value.type.tensor_type.shape.dim
    )


def is_coarse(model: onnx.ModelProto) -> bool:
    """True if values pass through 8-bit integers or 16-bit floats on their way."""
    from onnx import TensorProto

    half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    tensors = [tensor.data_type for tensor in model.graph.initializer]
    tensors += [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)]
    return bool(half & set(tensors)) or any(node.op_type.endswith("QuantizeLinear") for node in model.graph.node)


def prepared(path: Path, bound: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The network at ``path`` with its inputs bound to the shapes of ``bound``, of an opset that TVM reads. Refused."""
    import onnx
    from onnx import version_converter

    model = onnx.load(path)
    inputs = free_inputs(model)
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
