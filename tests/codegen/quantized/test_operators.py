"""Each operator against onnxruntime: in both types of activations, with random scales and zero points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.quantized.graph import QHost
from tests.codegen.quantized.operator_cases import CLOSE, EXACT
from tests.codegen.quantized.qdq_models import QdqModel, differences, kinds, ort, ours

SEEDS = (0, 1)


@pytest.mark.parametrize("signed", [True, False], ids=["int8", "uint8"])
@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_those_of_the_integer_kernels(name: str, signed: bool) -> None:
    for seed in SEEDS:
        m = QdqModel(seed, signed)
        EXACT[name](m)
        model, feeds = m.build(), m.feeds()
        graph, found = ours(model, feeds)
        assert not any(isinstance(operation, QHost) for operation in graph.operations)
        assert differences(found, ort(model, feeds))[0] == 0
        assert differences(found, ort(model, feeds, integers=False))[1] <= 1
        assert any(len(np.unique(value)) > 2 for value in found.values())


@pytest.mark.parametrize("signed", [True, False], ids=["int8", "uint8"])
@pytest.mark.parametrize("name", CLOSE)
def test_what_onnxruntime_does_in_floats_is_at_most_one_unit_away(name: str, signed: bool) -> None:
    for seed in SEEDS:
        m = QdqModel(seed, signed)
        CLOSE[name](m)
        model, feeds = m.build(), m.feeds()
        graph, found = ours(model, feeds)
        assert not any(isinstance(operation, QHost) for operation in graph.operations)
        for integers in (True, False):
            count, most, total = differences(found, ort(model, feeds, integers))
            assert most <= 1
            assert count <= 0.02 * total
        assert any(len(np.unique(value)) > 2 for value in found.values())


@pytest.mark.parametrize("op", ["Add", "Mul"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    scales=st.tuples(*[st.floats(0.00390625, 3.0, width=32)] * 3),
    zeros=st.tuples(*[st.integers(-128, 127)] * 3),
    signed=st.booleans(),
)
def test_all_pairs_of_bytes(
    op: str, scales: tuple[float, float, float], zeros: tuple[int, int, int], signed: bool
) -> None:
    m = QdqModel(0, signed)
    shift = 0 if signed else 128
    a = m.input("a", 256, 256, scale=scales[0], zero=zeros[0] + shift)
    b = m.input("b", 256, 256, scale=scales[1], zero=zeros[1] + shift)
    m.output(m.node(op, a, b), scales[2], zeros[2] + shift)
    every = np.arange(256, dtype=np.uint8).view(m.dtype)
    feeds = {"a.q": np.repeat(every, 256).reshape(256, 256), "b.q": np.tile(every, (256, 1))}
    model = m.build()
    assert differences(ours(model, feeds)[1], ort(model, feeds))[0] == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_convolutions_of_any_attributes(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 2))

    def each(least: int, most: int, times: int = 1) -> list[int]:
        return data.draw(st.lists(st.integers(least, most), min_size=axes * times, max_size=axes * times))

    groups = data.draw(st.sampled_from([1, 2, 6]))
    kernel, pads = each(1, 4), each(0, 2, 2)
    m = QdqModel(data.draw(st.integers(0, 10**6)), data.draw(st.booleans()))
    x = m.input("x", data.draw(st.integers(1, 3)), 6, *each(8, 12))
    w = m.weight("w", (12, 6 // groups, *kernel), data.draw(st.sampled_from([None, 0])), 12)
    m.output(
        m.node("Conv", x, w, m.bias("b", x, w, 12), strides=each(1, 3), dilations=each(1, 2), pads=pads, group=groups)
    )
    model, feeds = m.build(), m.feeds()
    graph, found = ours(model, feeds)
    assert kinds(graph) == ["QConv"]
    assert differences(found, ort(model, feeds))[0] == 0


def test_ties_of_an_average_are_at_most_one_unit_away() -> None:
    """Equal scales and a power of two taps make exact halves, which onnxruntime's float sums put either way."""
    count = total = 0
    for seed in range(10):
        m = QdqModel(seed)
        x = m.input("x", 1, 16, 8, 8, scale=0.037 + seed / 1000, zero=-128)
        m.output(m.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), 0.037 + seed / 1000, -128)
        model, feeds = m.build(), m.feeds()
        differing, most, size = differences(ours(model, feeds)[1], ort(model, feeds))
        assert most <= 1
        count, total = count + differing, total + size
    assert count <= total / 8  # a quarter of the sums are halves; half of those at most go the other way
