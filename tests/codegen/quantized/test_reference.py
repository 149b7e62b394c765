"""The executor itself: many samples at once, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import average_multiplier
from codegen.quantized.reference import run_quantized
from passes.errors import InputError
from tests.codegen.quantized.operator_cases import CLOSE, EXACT
from tests.codegen.quantized.qdq_models import QdqModel

SINGLE = ["Conv grouped", "ConvTranspose grouped", "MaxPool dilated", "Slice", "Pad edge", "Concat", "DepthToSpace CRD",
          "Gather", "Tile", "Add constant"]  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_samples_at_once_are_samples_one_by_one(name: str) -> None:
    m = QdqModel(1)
    {**EXACT, **CLOSE}[name](m)
    if name == "Conv grouped":
        m.inputs["x.q"] = (1, *m.inputs["x.q"][1:])
    graph = read_qdq(m.build())
    parts = [m.feeds() for _ in range(3)]
    whole = {n: np.concatenate([part[n] for part in parts]) for n in graph.inputs}
    together = run_quantized(graph, whole)
    for output, value in together.items():
        alone = [run_quantized(graph, part)[output] for part in parts]
        assert np.array_equal(value, np.concatenate(alone))


def test_samples_that_meet_run_one_by_one() -> None:
    m = QdqModel(2)
    x = m.input("x", 1, 4, 6)
    rows = m.node("Transpose", m.node("Reshape", x, m.constant("shape", np.array([4, 6]))), perm=[1, 0])
    m.output(rows, 0.1, 0)
    graph = read_qdq(m.build())
    values = np.stack([m.feeds()["x.q"][0] for _ in range(3)])
    (found,) = run_quantized(graph, {"x.q": values}).values()
    parts = [next(iter(run_quantized(graph, {"x.q": value[None]}).values())) for value in values]
    assert found.shape == (18, 4)
    assert np.array_equal(found, np.concatenate(parts))


def test_hidden_tensors_can_be_kept() -> None:
    m = QdqModel(3)
    x = m.input("x", 1, 50)
    hidden = m.requantize(m.node("Tanh", x))
    m.output(m.node("Add", hidden, m.input("z", 1, 50)))
    graph = read_qdq(m.build())
    found = run_quantized(graph, m.feeds(), keep=[f"{hidden}.q"])
    assert set(found) == {*graph.outputs, f"{hidden}.q"}
    with pytest.raises(InputError, match="no tensor is called 'nothing'"):
        run_quantized(graph, m.feeds(), keep=["nothing"])


def test_inputs_are_checked() -> None:
    m = QdqModel(4)
    m.output(m.node("Add", m.input("x", 1, 50), m.input("z", 1, 50)))
    graph, feeds = read_qdq(m.build()), m.feeds()
    with pytest.raises(InputError, match=r"'z\.q' is missing"):
        run_quantized(graph, {"x.q": feeds["x.q"]})
    with pytest.raises(InputError, match=r"is float32 \(1, 50\), expected int8"):
        run_quantized(graph, {**feeds, "z.q": feeds["z.q"].astype(np.float32)})
    with pytest.raises(InputError, match="different numbers of samples"):
        run_quantized(graph, {**feeds, "z.q": np.concatenate([feeds["z.q"]] * 2)})


def test_the_accumulator_is_rounded_to_float32_before_it_is_scaled() -> None:
    """float32 has 24 bits: 2^24 + 1 becomes 2^24."""
    m = QdqModel(5)
    x = m.input("x", 1, 1, scale=1.0, zero=0)
    m.constants |= {"w.q": np.array([[1]], np.int8), "one": np.array(1, np.float32)}
    m.constants["b.q"] = np.array([1 << 24], np.int32)
    from onnx import helper

    m.nodes.append(helper.make_node("DequantizeLinear", ["w.q", "one"], ["w"]))
    m.nodes.append(helper.make_node("DequantizeLinear", ["b.q", "one"], ["b"]))
    scale = float(np.float32(2.0**24 / 100.5))
    m.output(m.node("Gemm", x, "w", "b"), scale, 0)
    graph = read_qdq(m.build())
    (operation,) = graph.operations
    multiplier = operation.multipliers[0]  # type: ignore[union-attr]
    want = np.rint(np.float32(1 << 24) * multiplier)
    (found,) = run_quantized(graph, {"x.q": np.array([[1]], np.int8)}).values()
    assert found[0, 0] == want


def test_average_multiplier_divides_by_the_product() -> None:
    m = QdqModel(6)
    m.output(m.node("GlobalAveragePool", m.input("x", 1, 3, 5, 7)))
    graph = read_qdq(m.build())
    (pool,) = graph.operations
    x, y = graph.tensors[graph.inputs[0]], graph.tensors[graph.outputs[0]]
    assert pool.ratio == average_multiplier(x, y, 35)  # type: ignore[union-attr]
    assert abs(pool.ratio * 35 * y.scale / x.scale - 1) < 1e-6  # type: ignore[union-attr]
