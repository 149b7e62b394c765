"""The benchmark engine-resnet50: what it counts, held to the network's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegen.bench.engine_resnet50 import EngineResnet50
from codegen.bench.resnet50 import write_random
from codegen.events import QuietEvents
from passes.errors import UnsupportedError, UsageError
from tests.codegen.simulate.networks import counted_macs


@pytest.mark.slow
def test_resnet50_runs_whole_on_the_engine(tmp_path: Path) -> None:
    bench = EngineResnet50()
    result = bench.run(QuietEvents())
    write_random(tmp_path / "resnet50.onnx", 0)
    assert result["macs"] == counted_macs(tmp_path / "resnet50.onnx")
    assert result["cycles"] == result["predicted_cycles"] >= result["macs"] / 256
    assert [step["step"] for step in result["steps"]] == [
        "read and quantize",
        "compile",
        "check",
        "engine, timing mode",
    ]
    (table,) = bench.tables(result)
    assert len(table.rows) == 5 and f"{result['cycles']:,}" in table.title


def test_other_machines_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown target"):
        EngineResnet50(target="nobody").run(QuietEvents())
    with pytest.raises(UnsupportedError, match="programs are made for"):
        EngineResnet50(target="eyeriss_12x14").run(QuietEvents())
