"""Passes that must keep values are held to it; one that does not is left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from codegen.checked_passes import CANONICAL, run_checked
from codegen.events import RecordingEvents
from passes.graph import Graph
from passes.manager import Pass, PassResult
from passes.onnx_graph import OnnxGraph
from tests.onnx_models import batchnorm_weights, normal, onnx_model

BODY = """net (float[N,3,6,6] x) => (float[N,4,6,6] y) {
    i = Identity (x)
    c = Conv (i, w)
    y = BatchNormalization (c, gamma, beta, mean, var)
}"""


def network(dtype: Any = np.float32) -> OnnxGraph:
    weights = {"w": normal(4, 3, 1, 1), **batchnorm_weights(4)}
    body = BODY if dtype is np.float32 else BODY.replace("float[", "float16[")
    return OnnxGraph.from_model(onnx_model(body, {k: v.astype(dtype) for k, v in weights.items()}))


@dataclass(frozen=True)
class Scaled(Pass):
    """A pass that breaks what it must keep: it multiplies each weight."""

    name: ClassVar[str] = "scaled"
    factor: float = 1.0

    def run(self, graph: Graph) -> PassResult:
        for affine in graph.affines():
            wrong = affine.site.stage.affine(affine.scale * self.factor, affine.shift)
            graph.fold(affine, replace(affine.site.stage, weight=wrong.weight, bias=wrong.bias))
        return PassResult(True)


def test_a_rewrite_that_keeps_values_is_taken() -> None:
    graph, events = network(), RecordingEvents()
    before = graph.to_text()
    found, result = run_checked(CANONICAL, graph, {"x": normal(2, 3, 6, 6)}, [], events)
    assert result.modified and not events.warnings and not events.notes
    assert [op.op for op in found.workload()] == ["Conv"]
    assert graph.to_text() == before  # the rewrite is done on a copy
    x = normal(2, 3, 6, 6, seed=3)
    np.testing.assert_allclose(found.run({"x": x})[0], graph.run({"x": x})[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "factor", "taken"), [
    (np.float32, 1.0005, True), (np.float32, 1.01, False), (np.float16, 1.01, True), (np.float16, 1.2, False),
])  # fmt: skip
def test_a_rewrite_that_changes_values_is_left_out(dtype: Any, factor: float, taken: bool) -> None:
    graph, events = network(dtype), RecordingEvents()
    found, result = run_checked([Scaled(factor=factor)], graph, {"x": normal(2, 3, 6, 6).astype(dtype)}, [], events)
    assert (found is not graph) == result.modified == taken
    if not taken:
        assert len(events.warnings) == 1
        assert "pass scaled (the first pass): output y moved by a relative L2 of" in events.warnings[0]
        assert "without this pass" in events.warnings[0]


def test_a_network_that_cannot_be_run_goes_unchecked_with_a_note() -> None:
    events = RecordingEvents()
    found, result = run_checked(CANONICAL, network(), {"x": normal(2, 5, 6, 6)}, [], events)
    assert result.modified and [op.op for op in found.workload()] == ["Conv"]
    (note,) = events.notes
    assert note.startswith("drop-identities, fold-batchnorm, drop-dead-code: not checked by values: ")


def test_a_large_network_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().model()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = OnnxGraph.read(tmp_path / "m.onnx", large_bytes=1)
    monkeypatch.setattr(OnnxGraph, "run", None)
    found, result = run_checked(CANONICAL, graph, {}, [], RecordingEvents())
    assert graph.is_large and result.modified and [op.op for op in found.workload()] == ["Conv"]
