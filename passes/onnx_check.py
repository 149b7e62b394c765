"""Is the network under the knife a valid ONNX model, and does it still say what its outputs are?"""

from __future__ import annotations

import onnx
from onnx import ModelProto, helper

from passes.errors import VerificationError
from passes.onnx_surgery import Surgery

_LARGE_BYTES = 1 << 16
"""Initializers of the main graph from this size on are checked by type and shape alone."""


def structure(surgery: Surgery) -> ModelProto:
    """The network with large initializers declared as inputs, so that a check costs no copy of the weights."""
    weights = [surgery.weight_of(constant) for constant in surgery.main.weights.values()]
    large = {id(w): w for w in weights if w.array is not None and w.size_bytes >= _LARGE_BYTES}
    model = surgery.export(lambda weight: weight.header if id(weight) in large else weight.tensor())
    names = {weight.header.name for weight in large.values()}
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name in names:
            del model.graph.initializer[index]
    names -= {info.name for info in model.graph.input}
    for header in (weight.header for weight in large.values() if weight.header.name in names):
        model.graph.input.append(helper.make_tensor_value_info(header.name, header.data_type, list(header.dims)))
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
