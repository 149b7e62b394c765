"""The demo's network, its data, and the script that made it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from codegen.dataset import Dataset, load
from examples.digits_data import PARTS, digits
from passes.drop_dead_code import DropDeadCode
from passes.drop_identities import DropIdentities
from passes.fold_batchnorm import FoldBatchNorm
from passes.instruments import NumericCheck
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from tests.pass_harness import op_counts

pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "digits.onnx"
SCRIPT = ROOT / "examples" / "digits_data.py"


def accuracy(graph: OnnxGraph, data: Dataset) -> float:
    assert data.labels is not None
    found = np.concatenate([graph.run(feeds)[0].argmax(1) for feeds in data.batches(64)])
    return float(np.mean(found == data.labels))


def test_the_parts_are_disjoint_stratified_and_complete() -> None:
    parts = {part: digits(part) for part in PARTS}
    assert sum(len(labels) for _, labels in parts.values()) == 1797
    rows = np.concatenate([images.reshape(len(images), -1) for images, _ in parts.values()])
    assert len(np.unique(rows, axis=0)) == 1797, "no image stands in two parts"
    for part, (images, labels) in parts.items():
        assert images.shape[1:] == (1, 16, 16) and images.dtype == np.float32
        assert images.min() == 0 and images.max() == 1
        # 174 to 183 images of each digit in all
        assert all(abs(np.sum(labels == d) - 179.7 * PARTS[part]) < 6 for d in range(10))


def test_the_loader_feeds_the_network() -> None:
    inputs = OnnxGraph.read(MODEL).inputs
    calibration = load(f"{SCRIPT}:calibration", inputs)
    evaluation = load(f"{SCRIPT}:evaluation", inputs)
    assert (len(calibration), len(evaluation)) == (len(digits("train")[0]), len(digits("test")[0]))
    np.testing.assert_array_equal(evaluation.feeds["image"], digits("test")[0])
    np.testing.assert_array_equal(evaluation.labels, digits("test")[1])


def test_the_network_is_small_dynamic_and_unfolded() -> None:
    assert MODEL.stat().st_size < 1_000_000
    graph = OnnxGraph.read(MODEL)
    assert [(s.name, s.shape) for s in graph.inputs] == [("image", ("batch", 1, 16, 16))]
    counts = op_counts(graph)
    assert (counts["Conv"], counts["BatchNormalization"], counts["Gemm"]) == (7, 7, 1)
    assert not any(node.doc_string for node in onnx.load(MODEL).graph.node), "a doc string would hold source paths"


def test_folding_keeps_its_accuracy() -> None:
    graph = OnnxGraph.read(MODEL)
    data = load(f"{SCRIPT}:evaluation", graph.inputs)
    before = accuracy(graph, data)
    assert before == pytest.approx(535 / 539)  # what tools/train_digits.py printed: 99.26 %
    check = NumericCheck([{"image": data.feeds["image"][:64]}], tolerance=1e-5)
    PassManager([DropIdentities(), FoldBatchNorm(), DropDeadCode()], [check]).run(graph)
    assert "BatchNormalization" not in op_counts(graph)
    assert accuracy(graph, data) == before


@pytest.mark.slow
def test_training_is_deterministic(tmp_path: Path) -> None:
    paths = [tmp_path / "first.onnx", tmp_path / "second.onnx"]
    for path in paths:
        command = [sys.executable, str(ROOT / "tools" / "train_digits.py"), "--epochs", "1", "--out", str(path)]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert op_counts(OnnxGraph.read(paths[0])) == op_counts(OnnxGraph.read(MODEL))
