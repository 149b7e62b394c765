"""Whole networks: equal to onnxruntime's integer kernels in every byte, hidden tensors included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from codegen.bench.cifar10 import TEST, images
from codegen.quantized.frontend import read_qdq
from codegen.quantized.quantize import quantize
from codegen.quantized.reference import dequantized_outputs, quantized_inputs, run_quantized
from examples.digits_data import calibration, digits
from tests.codegen.quantized.qdq_models import kinds, ort

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared"
RESNET = SHARED / "models" / "resnet20_cifar10_qdq.onnx"


def compare(model: onnx.ModelProto, x: NDArray[Any], integers: bool) -> tuple[int, int, int, NDArray[Any]]:
    """Bytes that differ, the largest difference and all bytes over every tensor; top-1 that agree, by sample."""
    graph = read_qdq(model)
    made = {name for node in model.graph.node for name in node.output}
    hidden = [name for name in graph.tensors if name in made]
    found = run_quantized(graph, quantized_inputs(graph, {graph.input_names[0]: x}), hidden)
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in hidden)
    theirs = ort(shown, {graph.input_names[0]: x}, integers)
    gaps = [np.abs(found[n].astype(np.int64) - theirs[n].astype(np.int64)) for n in hidden]
    # Outputs of their own would keep onnxruntime from fusing: the top-1 is that of the network as it is.
    plain = ort(model, {graph.input_names[0]: x}, integers)[graph.output_names[0]]
    ours = dequantized_outputs(graph, found)[graph.output_names[0]]
    agree = plain.argmax(axis=1) == ours.argmax(axis=1)
    return sum(int((g > 0).sum()) for g in gaps), max(int(g.max()) for g in gaps), sum(g.size for g in gaps), agree


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn's digits are the data")
    quantize(ROOT / "examples" / "digits.onnx", tmp_path / "digits.onnx", list(calibration())[:4])
    model = onnx.load(tmp_path / "digits.onnx")
    x, y = digits("test")
    assert "QHost" not in kinds(read_qdq(model))
    differing, _, total, agree = compare(model, x[:60], integers=True)
    assert total > 500_000
    assert differing == 0
    assert agree.all()
    _, _, _, agree = compare(model, x[:60], integers=False)
    assert agree.mean() >= 0.99
    graph = read_qdq(model)
    found = dequantized_outputs(graph, run_quantized(graph, quantized_inputs(graph, {graph.input_names[0]: x})))
    assert (found[graph.output_names[0]].argmax(axis=1) == y).mean() > 0.95


@pytest.mark.skipif(not RESNET.exists(), reason="../shared/models is not there")
def test_resnet20_image_by_image() -> None:
    x, _ = images(SHARED / "data", TEST, 0, 16)
    model = onnx.load(RESNET)
    assert kinds(read_qdq(model)).count("QConv") == 20
    assert "QHost" not in kinds(read_qdq(model))
    differing, _, total, agree = compare(model, x, integers=True)
    assert (differing, agree.all()) == (0, True)
    # On x86, onnxruntime runs part of an int8 network in floats unless it is told otherwise.
    differing, _, total, agree = compare(model, x, integers=False)
    assert agree.all()
    assert differing < 0.005 * total
