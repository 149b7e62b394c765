"""Float networks to int8 QDQ networks by onnxruntime's static quantizer, calibrated batch by batch."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, version_converter

from codegen.dataset import Dataset, random_inputs
from codegen.quantized.onnx_network import has_body
from passes import onnx_reader
from passes.errors import InputError, RankcError, UnsupportedError
from passes.onnx_graph import OnnxGraph

Array = NDArray[Any]

OPERATORS = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "DepthToSpace", "Elu", "Flatten", "Gather", "Gelu",
    "Gemm", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "LeakyRelu", "MatMul", "MaxPool", "Mul",
    "Pad", "ReduceMean", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Softplus", "SpaceToDepth", "Split",
    "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
)  # fmt: skip
"""What is quantized: what the frontend makes operations on bytes of. All else stays in floats."""

OPSET = 17
"""What networks of an operator set that has no quantization per channel (below 13) are converted to."""

_PER_CHANNEL_OPSET = 13


class Calibration(StrEnum):
    """How the range of a tensor follows from the values that were seen.

    The default is PERCENTILE at 99.999: of the three, its networks stay nearest to those of floats (docs/quantized.md).
    MINMAX keeps no values, so it takes the least memory.
    """

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"


@dataclass(frozen=True)
class Quantized:
    """What became of a network. ``calibrated`` is False where random inputs had to do: its accuracy means nothing."""

    path: Path
    method: Calibration
    samples: int
    calibrated: bool
    source: str


def quantize(
    model_path: str | Path,
    out_path: str | Path,
    samples: Dataset | Iterable[Mapping[str, Array]] | None = None,
    *,
    method: Calibration | str = Calibration.PERCENTILE,
    percentile: float = 99.999,
    signed: bool = True,
    batch: int = 8,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    random_count: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Quantized:
    """Writes the network at ``model_path`` as a QDQ network to ``out_path``.

    Activations become int8 (uint8 with ``signed`` False) with one scale per tensor, weights int8 with one scale per
    output channel. Inputs, outputs, their types, names and symbolic dimensions stay as they are; of the network, only
    the canonical passes (identities, batch norms, dead code) go before. ``samples``: a dataset, taken ``batch`` samples
    at a time where it can be, or an iterable of feeds; None calibrates on ``random_count`` random inputs with ``seed``,
    for which ``shapes`` binds symbolic dimensions. ``progress`` is called with the number of samples seen so far.

    The same call gives the same file. Raises InputError where the network or the samples cannot be used,
    UnsupportedError where the quantizer cannot handle the network.
    """
    method = Calibration(method)
    graph = OnnxGraph.read(model_path, shapes)
    feeds, source = _feeds(graph, samples, batch, shapes or {}, random_count, seed)
    model = _prepared(graph, model_path)
    with _quietly(), tempfile.TemporaryDirectory(prefix="rankc-") as folder, _refusing(model_path):
        ranges, count = _ranges(model, Path(folder), feeds, method, percentile, source, progress)
        done = _inserted(model, ranges, signed)
        onnx.checker.check_model(done)
    _write(done, Path(out_path))
    return Quantized(Path(out_path), method, count, samples is not None, source)


def _feeds(
    graph: OnnxGraph,
    samples: Dataset | Iterable[Mapping[str, Array]] | None,
    batch: int,
    shapes: Mapping[str, tuple[int, ...]],
    random_count: int,
    seed: int,
) -> tuple[Iterable[Mapping[str, Array]], str]:
    if samples is None:
        bound = {**graph.input_shapes, **shapes}
        # A symbolic leading dimension counts samples: it is not bound.
        given = {s.name: bound[s.name] for s in graph.inputs if not all(isinstance(d, int) for d in s.shape[1:])}
        samples = random_inputs(graph.inputs, given, random_count, seed)
    if isinstance(samples, Dataset):
        return samples.batches(batch), samples.source
    return samples, "feeds"


def _prepared(graph: OnnxGraph, path: str | Path) -> ModelProto:
    """The network after the canonical passes, in an operator set that can be quantized per channel."""
    from codegen.checked_passes import CANONICAL
    from passes.manager import PassManager

    PassManager(CANONICAL).run(graph)
    try:
        model = graph.model()
    except ValueError as error:
        raise UnsupportedError(f"{path} is larger than 2 GiB, which the quantizer cannot carry") from error
    operators = {node.op_type for node in model.graph.node}
    if operators & {"QuantizeLinear", "DequantizeLinear"}:
        raise InputError(f"{path} is quantized already; give the network of floats")
    if operators.isdisjoint(OPERATORS):
        where = "; bodies of control flow are not looked into" if any(has_body(n) for n in model.graph.node) else ""
        raise UnsupportedError(f"{path} has no operator that can be quantized ({', '.join(OPERATORS)}){where}")
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 8)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _PER_CHANNEL_OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:  # the converter has no errors of its own
            reason = onnx_reader.one_line(error)
            raise UnsupportedError(
                f"{path} is of operator set {opset}, quantizing per channel takes {_PER_CHANNEL_OPSET}, and converting "
                f"it fails: {reason}; export it again with opset_version={OPSET}"
            ) from error
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "Sum" and len(node.input) == 2 and node.domain in ("", "ai.onnx"):
            node.op_type = "Add"  # the same, and the quantizer knows it
    return model


def _ranges(
    model: ModelProto,
    folder: Path,
    feeds: Iterable[Mapping[str, Array]],
    method: Calibration,
    percentile: float,
    source: str,
    progress: Callable[[int], None] | None,
) -> tuple[Any, int]:
    """Ranges of all tensors; each batch is reduced before the next is run, so memory is that of one."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

    class OneBatch(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feed: Mapping[str, Array]) -> None:
            self.left: list[dict[str, Array]] = [dict(feed)]

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    methods = {
        Calibration.MINMAX: CalibrationMethod.MinMax,
        Calibration.PERCENTILE: CalibrationMethod.Percentile,
        Calibration.ENTROPY: CalibrationMethod.Entropy,
    }
    inferred = onnx.shape_inference.infer_shapes(model)
    onnx.save_model(inferred, folder / "model.onnx")
    options = {"symmetric": False, "percentile": percentile} if method is Calibration.PERCENTILE else {}
    calibrator = create_calibrator(
        folder / "model.onnx",
        list(OPERATORS),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=methods[method],
        extra_options=options,
    )
    calibrator.infer_session = None  # its own one
    calibrator.infer_session = _yielding(calibrator)
    names = [value.name for value in model.graph.input]
    count = 0
    for feed in feeds:
        missing = [name for name in names if name not in feed]
        if missing:
            raise InputError(f"{source}: has no data for the input {missing[0]!r}")
        known = {name: np.asarray(feed[name]) for name in names}
        try:
            calibrator.collect_data(OneBatch(known))
        except Exception as error:
            reason = onnx_reader.one_line(error)
            raise InputError(f"the network cannot be run on the samples of {source}: {reason}") from error
        count += max((len(value) for value in known.values() if value.ndim), default=1)
        if progress is not None:
            progress(count)
    if not count:
        raise InputError(f"{source}: holds no samples to calibrate on")
    return calibrator.compute_data(), count


def _yielding(calibrator: Any) -> Any:
    """The calibrator's session with threads that leave the cores to others between two batches, instead of spinning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(calibrator.augmented_model_path, options, calibrator.execution_providers)


def _inserted(model: ModelProto, ranges: Any, signed: bool) -> ModelProto:
    """The model with QuantizeLinear and DequantizeLinear around everything in OPERATORS."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

    quantizer = QDQQuantizer(
        save_and_reload_model_with_shape_infer(model),
        True,  # weights per channel
        False,
        QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8,
        ranges,
        [],
        [],
        list(OPERATORS),
        {"QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}, "MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    done: ModelProto = quantizer.model.model
    del done.graph.value_info[:]
    return done


@contextmanager
def _refusing(path: str | Path) -> Iterator[None]:
    """Turns what onnxruntime's quantizer raises into one line."""
    try:
        yield
    except RankcError:
        raise
    except Exception as error:  # the quantizer raises whatever comes
        raise UnsupportedError(f"{path} cannot be quantized: {onnx_reader.one_line(error)}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """The quantizer logs on the root logger, and prints, what is no news here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _write(model: ModelProto, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString(deterministic=True))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
