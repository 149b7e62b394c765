"""Is the network under the knife a valid ONNX model, and does it still say what its outputs are?"""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, helper

from passes.errors import VerificationError
from passes.onnx_surgery import Surgery
from passes.onnx_weights import Weight

_LARGE_BYTES = 1 << 16
"""Initializers of the main graph from this size on are checked by type and shape alone."""


def structure(surgery: Surgery) -> ModelProto:
    """The network with large initializers declared as inputs, so that a check costs no copy of the weights."""
    large: list[Weight] = []

    def tensor(weight: Weight) -> TensorProto:
        return weight.header if weight.size_bytes >= _LARGE_BYTES and weight.array is not None else weight.tensor()

    model = surgery.export(tensor)
    declared = {info.name for info in model.graph.input}
    for index in reversed(range(len(model.graph.initializer))):
        stored = model.graph.initializer[index]
        weight = surgery.weight_of(surgery.main.weights[stored.name])
        if weight.size_bytes >= _LARGE_BYTES and weight.array is not None:
            large.append(weight)
            del model.graph.initializer[index]
    for weight in large:
        if weight.header.name not in declared:
            info = helper.make_tensor_value_info(weight.header.name, weight.header.data_type, list(weight.header.dims))
            model.graph.input.append(info)
    return model


def is_strict(surgery: Surgery) -> bool:
    """True if ONNX's strict shape inference accepts the network; models with foreign operators may not pass."""
    try:
        onnx.shape_inference.infer_shapes(structure(surgery), check_type=True, strict_mode=True)
    except Exception:
        return False
    return True


def check(surgery: Surgery, strict: bool) -> None:
    """Raises VerificationError where ONNX's checker finds fault, or, if ``strict``, where types and shapes disagree."""
    model = structure(surgery)
    try:
        onnx.checker.check_model(model)
        if strict:
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise VerificationError(f"the rewritten network is not valid ONNX: {text}") from error
