"""Single bits of programs flipped: who notices, by section of the container.

As the bits lie in the file, the checksums refuse every one. The table is about the harder case, in which somebody has
recomputed the checksums: then the rules of the container, those of programs and the engine stand in line, and behind
them outputs are compared with onnxruntime's and cycles with the program's own predictions. What passes all of them is
listed by field.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine import Result
from accel_sim.program.check import check_program
from accel_sim.program.container import decode, encode, reseal, section_places
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Program
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from codegen.bench.benchmark import MODELS, Table, existing
from codegen.events import Events, Progress
from passes.errors import UsageError

Array = NDArray[Any]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits.onnx"
RESNET = "resnet20_cifar10_qdq.onnx"
NETWORKS = ("digits", "resnet20", "host")


class Seen(StrEnum):
    """Who notices that a bit is another one, the checksums being right; in tables by its name."""

    CONTAINER = "refused by the container"
    CHECK = "refused by check_program"
    ENGINE = "refused by the engine"
    INTERFACE = "other inputs or outputs"
    VALUES = "other values than onnxruntime's"
    CYCLES = "other cycles than predicted"
    COUNTERS = "other energy or traffic"
    NOTHING = "no change"


@dataclass(frozen=True)
class Flip:
    """``bit`` of the file lies in ``section``; ``field`` is what it changes where the container can be read.

    ``indexed``: the refusal names an entry of its section, for code the instruction. ``cpu_s``: what looking took.
    """

    bit: int
    section: str
    seen: Seen
    field: str
    indexed: bool
    cpu_s: float


class Subject:
    """A program, what it is to compute on a few samples, and what is measured when it runs.

    ``path``: a QDQ network that onnxruntime's integer kernels run. ``feeds``: its input (samples, ...), one inference
    each. Raises ValueError where the program as it is does not give onnxruntime's outputs in the predicted cycles.
    """

    def __init__(self, name: str, path: Path, feeds: Array, spec: MachineSpec) -> None:
        import onnxruntime

        from codegen.asic_compile.compile import compile_graph
        from codegen.asic_latency import AsicLatency
        from codegen.quantized.frontend import read_qdq
        from codegen.quantized.onnx_network import integer_options

        self.name, self.spec = name, spec
        shape = feeds.shape[1:]
        session = onnxruntime.InferenceSession(str(path), integer_options(signed=True), ["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        graph = read_qdq(path, {given.name: shape})
        self.program: Program = compile_graph(graph, spec, AsicLatency(spec)).program
        self.data = encode(self.program)
        (tensor,) = (t for t in self.program.tensors if t.role == "input")
        self._feeds = {tensor.name: feeds}
        self._wanted = np.stack([session.run(None, {given.name: x})[0] for x in feeds])
        self._output = graph.outputs[0]
        self._counters: tuple[Any, ...] = ()
        field, seen, _ = self._look(self.data)
        if seen is not Seen.NOTHING:
            raise ValueError(f"{name}: its program itself shows {seen}, {field}")

    def flip(self, bit: int, section: str) -> Flip:
        """Flips ``bit`` of the file, mends the checksums and looks who notices."""
        forged = bytearray(self.data)
        forged[bit // 8] ^= 1 << (bit % 8)
        begin = time.process_time()
        field, seen, indexed = self._look(reseal(forged))
        return Flip(bit, section, seen, field, indexed, time.process_time() - begin)

    def refused_as_stored(self, bit: int) -> bool:
        """Whether the reader refuses the file with ``bit`` flipped and nothing else."""
        forged = bytearray(self.data)
        forged[bit // 8] ^= 1 << (bit % 8)
        try:
            decode(bytes(forged), self.spec)
        except ProgramError:
            return True
        return False

    def _look(self, data: bytes) -> tuple[str, Seen, bool]:
        """The field that is another one, who notices, and whether the refusal has an index."""
        try:
            program = decode(data, self.spec)
        except ProgramError as error:
            return "", Seen.CONTAINER, error.index is not None
        # Of what the container tells apart only zeros of either sign are equal.
        field = changed_field(self.program, program) or ("" if data == self.data else "the sign of a zero")
        try:
            check_program(program, self.spec)
        except ProgramError as error:
            return field, Seen.CHECK, error.index is not None
        if _interface(program) != _interface(self.program):
            return field, Seen.INTERFACE, False
        try:
            outputs, result = self._run(program)
        except ProgramError as error:
            return field, Seen.ENGINE, error.index is not None
        return field, self._compared(outputs, result), False

    def _run(self, program: Program) -> tuple[dict[str, Array], Result]:
        from codegen.asic_compile.run import run_program

        return run_program(program, self.spec, self._feeds)

    def _compared(self, outputs: Mapping[str, Array], result: Result) -> Seen:
        if not np.array_equal(outputs[self._output].reshape(self._wanted.shape), self._wanted):
            return Seen.VALUES
        # A layer that the host computes has no prediction; -1 says so.
        if any(layer.cycles != layer.predicted_cycles for layer in result.layers if layer.predicted_cycles != -1):
            return Seen.CYCLES
        counters = (result.cycles, result.energy_pj, result.macs, result.counts, result.host_cycles)
        self._counters = self._counters or counters  # those of the program as it is, which is looked at first
        return Seen.NOTHING if counters == self._counters else Seen.COUNTERS


def _interface(program: Program) -> list[tuple[Any, ...]]:
    """What whoever calls a program has to know of its inputs and outputs to find them."""
    return [(t.name, t.shape, t.signed, t.role) for t in program.tensors if t.role != "internal"]


def changed_field(a: Any, b: Any, name: str = "") -> str:
    """The first field in which two programs differ, entries of tables not told apart; "" for equal ones."""
    if a == b:
        return ""
    if is_dataclass(a):
        if type(a) is not type(b):
            return f"{name}.opcode"
        for field in fields(a):
            found = changed_field(getattr(a, field.name), getattr(b, field.name), _joined(name, field.name, a))
            if found:
                return found
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and a and is_dataclass(a[0]):
        return next(found for x, y in zip(a, b, strict=True) if (found := changed_field(x, y, name)))
    return name


def _joined(name: str, field: str, of: Any) -> str:
    if not name:
        return field
    return f"{name}.{type(of).__name__.lower()}.{field}" if name == "code" else f"{name}.{field}"


def bits_of(data: bytes, count: int, rng: np.random.Generator) -> Iterator[tuple[int, str]]:
    """Up to ``count`` bits of each part of a container, drawn evenly and in order: (bit of the file, part)."""
    for part, spans in section_places(data).items():
        places = np.concatenate([np.arange(8 * begin, 8 * end) for begin, end in spans])
        chosen = places if len(places) <= count else np.sort(rng.choice(places, count, replace=False))
        yield from ((int(bit), part) for bit in chosen)


def flips(subject: Subject, bits: Sequence[tuple[int, str]], progress: Progress | None = None) -> list[Flip]:
    """Each of ``bits`` flipped alone and the checksums mended; those of the checksums themselves are left out."""
    found = []
    for bit, section in bits:
        if section != "checksums":
            found.append(subject.flip(bit, section))
        if progress is not None:
            progress.advance()
    return found


@dataclass(frozen=True)
class FlippedBits:
    """``bits`` of each section of each program; ``samples`` inputs whose outputs are compared."""

    models: Path = MODELS
    networks: tuple[str, ...] = NETWORKS
    bits: int = 200
    samples: int = 2
    seed: int = 0

    name: ClassVar[str] = "flipped-bits"

    def __post_init__(self) -> None:
        if set(self.networks) - set(NETWORKS):
            raise UsageError(f"--networks {','.join(self.networks)!r}: there are: {', '.join(NETWORKS)}")

    def run(self, events: Events) -> dict[str, Any]:
        rows = []
        with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
            for name in self.networks:
                with events.stage(f"{name}: quantize, compile"):
                    subject = self._subject(name, Path(folder))
                bits = list(bits_of(subject.data, self.bits, np.random.default_rng(self.seed)))
                with events.stage(f"{name}: flip bits", len(bits)) as progress:
                    found = flips(subject, bits, progress)
                refused = sum(subject.refused_as_stored(bit) for bit, _ in bits)
                rows.append(_summary(subject, found, len(bits), refused))
        return {"programs": rows, "kinds": {"values": "measured", "cycles": "simulated"}}

    def _subject(self, name: str, folder: Path) -> Subject:
        rng = np.random.default_rng(self.seed)
        spec = load_spec()
        if name == "resnet20":
            path = existing(self.models / RESNET, "--models", "a quantized ResNet-20 for CIFAR-10")
            return Subject(name, path, rng.standard_normal((self.samples, 1, 3, 32, 32), np.float32), spec)
        if name == "digits":
            path = existing(EXAMPLE, "examples", "the example network")
            return quantized_subject(name, path, rng.random((self.samples, 1, 1, 16, 16), np.float32), folder, spec)
        write_host_network(folder / "host.onnx", rng)
        feeds = rng.standard_normal((self.samples, 1, 4, 6, 6), np.float32)
        return quantized_subject(name, folder / "host.onnx", feeds, folder, spec)

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        tables = []
        for row in result["programs"]:
            columns = ("section", "bits", "flipped", *(seen.name.lower() for seen in Seen))
            rows = [
                (section["section"], f"{section['bits']:,}", f"{section['flipped']:,}", *_counts(section["seen"]))
                for section in row["sections"]
            ]
            title = (
                f"{row['name']}: {row['bytes']:,} bytes, {row['instructions']:,} instructions; as stored, "
                f"{row['refused_as_stored']:,} of {row['flipped']:,} are refused; with mended checksums, who notices "
                f"(the longest look took {row['longest_s']:.2f} s of CPU time)"
            )
            tables.append(Table(title, columns, tuple(rows)))
        for seen in (Seen.COUNTERS, Seen.NOTHING):
            passed: Counter[str] = Counter()
            for row in result["programs"]:
                passed.update(row["passed"][seen])
            listed = tuple((field, f"{count:,}") for field, count in sorted(passed.items()))
            tables.append(Table(f"{seen}: by field", ("field", "bits"), listed))
        return tables


def _counts(seen: Mapping[str, int]) -> list[str]:
    return [f"{seen[kind]:,}" if seen[kind] else "" for kind in Seen]


def _summary(subject: Subject, found: Sequence[Flip], flipped: int, refused: int) -> dict[str, Any]:
    sections = []
    for part, spans in section_places(subject.data).items():
        here = [flip for flip in found if flip.section == part]
        if not here:
            continue
        bits = sum(8 * (end - begin) for begin, end in spans)
        seen = {kind: sum(flip.seen is kind for flip in here) for kind in Seen}
        unnamed = sum(not flip.indexed for flip in here if flip.seen in (Seen.CONTAINER, Seen.CHECK, Seen.ENGINE))
        sections.append({"section": part, "bits": bits, "flipped": len(here), "seen": seen, "unnamed": unnamed})
    return {
        "name": subject.name,
        "bytes": len(subject.data),
        "instructions": len(subject.program.code),
        "flipped": flipped,
        "refused_as_stored": refused,
        "sections": sections,
        "passed": {
            kind: dict(sorted(Counter(flip.field for flip in found if flip.seen is kind).items()))
            for kind in (Seen.CYCLES, Seen.COUNTERS, Seen.NOTHING)
        },
        "longest_s": max(flip.cpu_s for flip in found),
    }


def quantized_subject(name: str, path: Path, feeds: Array, folder: Path, spec: MachineSpec) -> Subject:
    """A float network of one input, quantized on ``feeds``, into ``folder``."""
    import onnxruntime

    from codegen.quantized.quantize import quantize

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    target = folder / f"{name}_qdq.onnx"
    quantize(path, target, [{given: x} for x in feeds], shapes={given: feeds.shape[1:]})
    return Subject(name, target, feeds, spec)


def write_host_network(path: Path, rng: np.random.Generator) -> None:
    """Writes a small network whose program has a table (a sigmoid) and a host call (a transposed convolution)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.standard_normal(shape, np.float32) / 3, name)

    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"], "sigmoid"),
        helper.make_node("ConvTranspose", ["s", "w1"], ["t"], "up", strides=[2, 2]),
        helper.make_node("Conv", ["t", "w2", "b2"], ["y"], "last"),
    ]
    constants = [
        *(constant("w0", 6, 4, 3, 3), constant("b0", 6), constant("w1", 6, 3, 2, 2)),
        *(constant("w2", 5, 3, 1, 1), constant("b2", 5)),
    ]
    graph = helper.make_graph(
        nodes,
        "host",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 12, 12])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
