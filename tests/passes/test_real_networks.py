"""Every pass on networks that no one here wrote: same values, and nothing left to do the second time."""

from __future__ import annotations

from pathlib import Path

import pytest

from passes.drop_dead_code import DropDeadCode
from passes.drop_identities import DropIdentities
from passes.fold_batchnorm import FoldBatchNorm
from passes.fuse_pointwise import FusePointwise
from passes.instruments import NumericCheck
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_runtime import random_feeds
from tests.pass_harness import op_counts
from tests.passes.onnx.exact import MODELS

if not MODELS.is_dir():
    pytest.skip("the folder ../shared/models is absent", allow_module_level=True)

PASSES = [DropIdentities(), FoldBatchNorm(), DropDeadCode(), FusePointwise()]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_values_stay_and_a_second_run_does_nothing(path: Path) -> None:
    graph = OnnxGraph.read(path)
    feeds = random_feeds(graph._surgery, graph.input_shapes, seed=3)
    # each pass rounds a weight at most once; the rounding of tens of layers adds up
    check = NumericCheck([feeds], tolerance=1e-4)
    PassManager(PASSES, [check]).run(graph)
    assert [name for name, _ in check.rows] == [step.name for step in PASSES]
    text = graph.to_text()
    again = PassManager(PASSES).run(graph)
    assert not again.modified and graph.to_text() == text


def test_all_batchnorms_of_ultraface_are_folded() -> None:
    graph = OnnxGraph.read(MODELS / "ultraface_RFB-320.onnx")
    assert op_counts(graph)["BatchNormalization"] == 35
    result = PassManager([FoldBatchNorm()]).run(graph)
    assert "BatchNormalization" not in op_counts(graph)
    assert len([note for note in result.notes if note.reason.startswith("folded into")]) == 35
