"""The engine beside the price list, on a few layers: what the full benchmark says of many."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegen.bench.asic_engine import MACHINES, AsicEngine, random_graphs
from codegen.bench.benchmark import make
from codegen.events import QuietEvents
from codegen.quantized.graph import QConv, QSum
from passes.errors import UsageError


def test_engine_and_price_list_agree_on_every_machine(tmp_path: Path) -> None:
    bench = AsicEngine(models=tmp_path, layers=6, seed=3)
    result = bench.run(QuietEvents())
    assert [row["machine"] for row in result["machines"]] == list(MACHINES)
    for row in result["machines"]:
        assert row["layers"] > 6
        assert row["cycles"]["exact"] == row["dram_bytes"]["exact"] == 1.0
        assert row["cycles"]["worst"] == 0
        assert row["energy_pj"]["worst"] < 0.01
    assert result["networks"] == []
    assert len(bench.tables(result)[0].rows) == 3 * len(MACHINES)


def test_the_sample_holds_every_kind_of_layer() -> None:
    convs = [op for graph in random_graphs(60, 0) for op in graph.operations if isinstance(op, QConv)]
    groups = {"depthwise" if op.geometry.groups == len(op.weight) > 1 else op.geometry.groups > 1 for op in convs}
    assert groups == {"depthwise", True, False}
    assert {op.geometry.kernel[0] for op in convs} == {1, 3, 5}
    assert {op.geometry.strides[0] for op in convs} == {1, 2}
    assert any(isinstance(op, QSum) for graph in random_graphs(6, 0) for op in graph.operations)
    assert {len(graph.operations) for graph in random_graphs(30, 1)} >= {1, 2, 3, 4}


def test_no_layers_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--layers"):
        make("asic-engine", {"layers": 0})
