from __future__ import annotations

from passes.drop_dead_code import DropDeadCode
from passes.onnx_graph import OnnxGraph
from tests.onnx_models import normal, onnx_model
from tests.pass_harness import check_pass


def test_what_no_output_depends_on_goes_and_inputs_stay() -> None:
    body = """net (float[2,3] x, float[5] unread) => (float[2,4] y) {
        y = MatMul (x, w)
        a = Exp (y)
        b = MatMul (a, v)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(3, 4), "v": normal(4, 9), "orphan": normal(7)}))
    feeds = {"x": normal(2, 3, seed=1), "unread": normal(5)}
    result = check_pass(
        DropDeadCode(), graph, feeds, before={"MatMul": 2, "Exp": 1}, after={"MatMul": 1}, tolerance=0.0
    )
    assert {spec.name for spec in graph.inputs} == {"x", "unread"}
    assert {"v", "orphan"} <= {note.node for note in result.notes}
    assert "w" not in {note.node for note in result.notes}
