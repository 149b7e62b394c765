"""Runs compiled networks on floats: quantize, the engine, host calls through onnxruntime, dequantize."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from accel_sim.engine import Result, run
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import HostCall, Program, Tensor
from accel_sim.spec import MachineSpec
from codegen.asic_compile.compile import Compiled
from codegen.quantized.host_session import host_session
from codegen.quantized.reference import dequantize_array, quantized_inputs

Array = NDArray[Any]


def run_program(
    program: Program, spec: MachineSpec, feeds: Mapping[str, Array], hazards: bool = True
) -> tuple[dict[str, Array], Result]:
    """Outputs as floats, by the names of the program's tensors, and what the engine says of the run.

    ``feeds``: per input tensor floats of its shape, with an axis of samples in front where there are several; the
    tensor's own bytes are taken as they are. ValueError where a feed does not fit.
    """
    inputs = {t.name: _quantized(feeds[t.name], t) for t in program.tensors if t.role == "input"}
    result = run(program, spec, inputs, hazards=hazards, host=call_host)
    outputs = {t.name: _dequantized(result.outputs[t.name], t) for t in program.tensors if t.role == "output"}
    return outputs, result


def run_network(
    compiled: Compiled, spec: MachineSpec, feeds: Mapping[str, Array], hazards: bool = True
) -> tuple[dict[str, Array], Result]:
    """The network's own outputs, by its names, for one sample per run of the program; and the engine's result.

    ``feeds``: by the network's input names, with a leading axis of several times the network's batch for as many
    samples. What the host runs behind the program (``Compiled.tail``) is run here.
    """
    graph = compiled.graph
    tensors = {tensor.name: tensor for tensor in compiled.program.tensors}
    given = quantized_inputs(graph, feeds)
    inputs = {name: values.reshape(-1, *tensors[name].shape) for name, values in given.items()}
    result = run(compiled.program, spec, inputs, hazards=hazards, host=call_host)
    samples = len(next(iter(inputs.values())))
    found: list[dict[str, Array]] = []
    for sample in range(samples):
        made = {**inputs, **result.outputs}  # an input may leave the network as it came
        values = {name: x[sample].reshape(graph.tensors[name].shape) for name, x in made.items()}
        for operation in compiled.tail:
            parts = host_session(graph, operation)({name: values[name] for name in operation.inputs})
            values |= dict(zip(operation.outputs, parts, strict=True))
        found.append(values)
    whole = {name: np.concatenate([values[name] for values in found]) for name in graph.outputs}
    outputs = {
        name: dequantize_array(whole[tensor], graph.tensors[tensor]) if is_float else whole[tensor]
        for tensor, name, is_float in zip(graph.outputs, graph.output_names, graph.float_outputs, strict=True)
    }
    return outputs, result


def call_host(call: HostCall, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """A host call by onnxruntime; tensors go in and out in the shapes of its model.

    ProgramError where the model cannot be read or does not take these tensors.
    """
    try:
        session = _session(call.model)
        feeds = {
            value.name: inputs[name].reshape(value.shape)
            for value, name in zip(session.get_inputs(), call.inputs, strict=True)
        }
        return dict(zip(call.outputs, session.run(None, feeds), strict=True))
    except Exception as error:  # onnxruntime has a dozen, of no common type
        raise ProgramError(f"the host's call {call.name!r} fails: {str(error).strip()}", "calls") from error


@lru_cache(maxsize=64)
def _session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, and told by whoever catches them
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"], enable_fallback=0)


def _quantized(values: Array, tensor: Tensor) -> Array:
    dtype = np.dtype(np.int8 if tensor.signed else np.uint8)
    if values.dtype == dtype:
        return values
    low, high = (-128, 127) if tensor.signed else (0, 255)
    real = np.rint(values.astype(np.float32) / np.float32(tensor.scale)) + tensor.zero_point
    quantized: Array = np.clip(real, low, high).astype(dtype)
    return quantized


def _dequantized(values: Array, tensor: Tensor) -> Array:
    centred: Array = (values.astype(np.int32) - tensor.zero_point).astype(np.float32)
    real: Array = centred * np.float32(tensor.scale)
    return real
