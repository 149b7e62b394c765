"""Inputs for a program, and its outputs: tensors of bytes, as the floats that they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine import HazardError
from accel_sim.program.isa import Tensor
from codegen.asic_compile.run import run_program
from codegen.dataset import load
from codegen.dataset_files import pieces
from codegen.simulate.network import Network
from codegen.simulate.simulation import Simulation
from passes.errors import InputError, UnsupportedError, UsageError
from passes.graph import TensorSpec

Array = NDArray[Any]

_SUFFIXES = ("_QuantizeLinear_Output", "_QuantizeLinear", ":bytes")
"""What tells the bytes of a tensor from the tensor, in the names of onnxruntime's quantizer and of ours."""


@dataclass(frozen=True, eq=False)
class Samples:
    """``feeds``: network's input -> (samples, *shape)."""

    feeds: dict[str, Array]
    source: str

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))


@dataclass(frozen=True)
class OutputRow:
    """An output tensor: its shape for one sample, and the SHA-256 of the bytes of all samples."""

    name: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, eq=False)
class Outputs:
    """``values``: output -> floats, (samples, *shape)."""

    rows: tuple[OutputRow, ...]
    values: dict[str, Array]
    samples: int
    source: str


def public_name(tensor: str) -> str:
    """A tensor's name in the network, from that of its bytes."""
    for suffix in _SUFFIXES:
        if tensor.endswith(suffix) and tensor != suffix:
            return tensor.removesuffix(suffix)
    return tensor


def read_samples(source: str, network: Network, limit: int | None) -> Samples:
    """The samples of ``source`` for the network's inputs, or those of a program. Raises InputError, UsageError."""
    specs = []
    graph, program = network.graph, network.program
    if graph is not None:
        for public, name, floats in zip(graph.input_names, graph.inputs, graph.float_inputs, strict=True):
            if name not in graph.tensors:
                raise UnsupportedError(f"--inputs: the input {public!r} is no tensor of bytes")
            tensor = graph.tensors[name]
            specs.append(TensorSpec(public, "float32" if floats else _byte_type(tensor.signed), tensor.shape))
    elif program is not None:
        given = next(iter(pieces(source, [public_name(t.name) for t in program.tensors if t.role == "input"]))).arrays
        for own in program.tensors:
            if own.role == "input":
                public, wanted = public_name(own.name), _byte_type(own.signed)
                as_bytes = public in given and given[public].dtype == np.dtype(wanted)
                specs.append(TensorSpec(public, wanted if as_bytes else "float32", own.shape))
    else:
        raise UsageError(f"--inputs needs a program to run: {network.refused or 'there is none'}")
    data = load(source, specs, limit)
    batches = list(data.batches(1))
    feeds = {spec.name: np.stack([batch[spec.name] for batch in batches]) for spec in specs}
    return Samples(feeds, data.source)


def run_samples(simulation: Simulation, samples: Samples) -> Outputs:
    """Runs the program with values, watching for hazards. Raises InputError for a program that has any."""
    program = simulation.program
    if program is None:
        raise UsageError(f"--inputs needs a program to run on {simulation.machine.name}: {simulation.reason}")
    tensors = {t.name: t for t in program.tensors if t.role == "input"}
    feeds = _by_tensor(samples.feeds, tensors)
    try:
        values, result = run_program(program, simulation.spec, feeds)
    except HazardError as error:
        raise InputError(f"the program cannot run: {error}") from error
    rows = []
    found = {}
    for name, data in result.outputs.items():
        public = public_name(name)
        rows.append(OutputRow(public, data.shape[1:], hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()))
        found[public] = values[name]
    return Outputs(tuple(rows), found, len(samples), samples.source)


def _by_tensor(feeds: Mapping[str, Array], tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """The program's tensors in place of the network's inputs."""
    by_public = {public_name(name): name for name in tensors} if len(tensors) > 1 else {}
    only = next(iter(tensors))
    found = {}
    for public, data in feeds.items():
        name = public if public in tensors else by_public.get(public, only)
        found[name] = data
    return found


def _byte_type(signed: bool) -> str:
    return "int8" if signed else "uint8"
