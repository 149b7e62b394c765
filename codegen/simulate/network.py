"""What is simulated: a network as operations on bytes, as works of the price list, or a program that is there."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from accel_sim.program.container import MAGIC, decode
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Program
from codegen.asic_compile.works import op_works
from codegen.asic_program import is_quantized
from codegen.dataset import load
from codegen.events import Events
from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QHost, QuantizedGraph
from codegen.quantized.quantize import Calibration, quantize
from codegen.simulate.config import SimulateConfig
from passes.core.cost import OpWork
from passes.errors import InputError, UnsupportedError, UsageError

Array = NDArray[Any]

FLOATS, QUANTIZED, PROGRAM = "floats", "quantized", "program"

_RANDOM_COUNT = 2
"""Random samples for ranges that no value depends on."""


@dataclass(frozen=True, eq=False)
class Network:
    """``kind``: FLOATS, QUANTIZED or PROGRAM. ``ranges``: where the quantized values' ranges come from.

    ``graph``: None for a program, and for a network of floats that is not quantized, ``refused`` saying why it cannot
    be. ``works``: one per operator, of the graph where there is one; ``on_host``: place -> reason. ``images``: how many
    one inference takes.
    """

    path: Path
    sha256: str
    kind: str
    ranges: str
    images: int
    graph: QuantizedGraph | None = None
    works: Sequence[OpWork] = ()
    on_host: Mapping[int, str] = field(default_factory=dict)
    refused: str = ""
    program: Program | None = None

    @property
    def random_ranges(self) -> bool:
        return self.ranges.startswith("random")


def read_network(config: SimulateConfig, events: Events) -> Network:
    """Reads the model; a network of floats is quantized where any machine can have a program.

    InputError where the file cannot be used, UsageError where the options do not fit it.
    """
    path = config.model
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix not in (".onnx", ".bin"):
        raise UsageError(f"{path}: give a network (.onnx) or a program (program.bin)")
    if config.is_program:
        return _program(config)
    for option, given in (("--calib", config.calibration), ("--inputs", config.inputs)):
        if given is not None and given == str(path):
            raise UsageError(f"{option} {given}: is the network itself")
    digest = _sha256(path)
    with events.stage("read the network"):
        quantized = _is_quantized(path)
    if quantized:
        if config.calibration is not None:
            raise UsageError(f"--calib: {path} is quantized already and keeps its ranges")
        with events.stage("read the quantized network"):
            return _of_graph(path, digest, QUANTIZED, "the network's own", read_qdq(path, config.shapes))
    if config.price_list or all(machine.spec.row_stationary is not None for machine in config.machines):
        return _of_floats(config, digest, "")
    try:
        return _quantized(config, digest, events)
    except UnsupportedError as error:
        events.note(f"no program: {error}")
        return _of_floats(config, digest, str(error))


def _is_quantized(path: Path) -> bool:
    try:
        return is_quantized(path)
    except Exception as error:  # whatever protobuf raises on bytes that are no network
        raise InputError(f"{path}: cannot be read as an ONNX network: {error}") from error


def _program(config: SimulateConfig) -> Network:
    for option, given in (
        ("--shape", config.shapes),
        ("--calib", config.calibration),
        ("--price-list", config.price_list),
        ("--layer-by-layer", config.layer_by_layer),
    ):
        if given:
            raise UsageError(f"{option} is for networks; {config.model} is a program, which is compiled already")
    data = config.model.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{config.model}: is no program of rankc: it does not begin with {MAGIC!r}")
    try:
        program = decode(data)
    except ProgramError as error:
        raise InputError(f"{config.model}: {error}") from error
    shapes = [tensor.shape for tensor in program.tensors if tensor.role == "input"]
    digest = hashlib.sha256(data).hexdigest()
    return Network(config.model, digest, PROGRAM, "the program's own", _images(shapes), program=program)


def _quantized(config: SimulateConfig, digest: str, events: Events) -> Network:
    from passes.onnx_graph import OnnxGraph

    data = None
    if config.calibration is not None:
        data = load(config.calibration, OnnxGraph.read(config.model, config.shapes).inputs, config.samples)
    with events.stage("quantize", None if data is None else len(data)) as progress:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            progress.advance(count - done)
            done = count

        with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
            written = Path(folder) / "quantized.onnx"
            quantize(
                config.model,
                written,
                data,
                method=Calibration.MINMAX if data is None else Calibration.PERCENTILE,
                shapes=config.shapes,
                seed=config.seed,
                random_count=_RANDOM_COUNT,
                progress=advance,
            )
            graph = read_qdq(written, config.shapes)
    ranges = f"random inputs, seed {config.seed}" if data is None else f"{len(data)} samples of {data.source}"
    return _of_graph(config.model, digest, FLOATS, ranges, graph)


def _of_graph(path: Path, digest: str, kind: str, ranges: str, graph: QuantizedGraph) -> Network:
    on_host = {i: op.reason for i, op in enumerate(graph.operations) if isinstance(op, QHost)}
    shapes = [graph.tensors[name].shape for name in graph.inputs if name in graph.tensors]
    return Network(path, digest, kind, ranges, _images(shapes), graph, op_works(graph), on_host)


def _of_floats(config: SimulateConfig, digest: str, refused: str) -> Network:
    """The operators of a network of floats, which the price list takes as if they were of the machine's width."""
    from codegen.checked_passes import CANONICAL
    from passes.manager import PassManager
    from passes.onnx_graph import OnnxGraph

    graph = OnnxGraph.read(config.model, config.shapes)
    PassManager(CANONICAL).run(graph)
    return Network(
        config.model,
        digest,
        FLOATS,
        "none: prices alone",
        _images(list(graph.input_shapes.values())),
        works=graph.workload(),
        refused=refused,
    )


def _images(shapes: Sequence[tuple[int, ...]]) -> int:
    """How many images go in at once: the leading axis of the first map."""
    return next((shape[0] for shape in shapes if len(shape) == 4), 1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
