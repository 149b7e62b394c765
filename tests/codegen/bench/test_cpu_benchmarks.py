"""The benchmarks of the target cpu on a network of seconds, tuned and timed for real."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from codegen.bench.cpu_networks import CpuNetworks
from codegen.bench.cpu_prediction import CpuPrediction
from codegen.bench.cpu_resnet20 import CpuResnet20
from codegen.events import QuietEvents
from passes.errors import UsageError
from tests.codegen.bench.tiny import write_folders

TEST_IMAGES = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_folders(tmp_path_factory.mktemp("bench"), calibration=40, test=TEST_IMAGES)


@pytest.mark.slow
def test_binaries_take_turns_with_onnxruntime_and_a_second_run_needs_no_trial(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    bench = CpuResnet20(
        *folders, limits=("macs=70%",), database=tmp_path / "trials.jsonl", effort="quick", calibration=40
    )
    result = bench.run(QuietEvents())
    json.dumps(result)
    names = [row["name"] for row in result["contenders"]]
    assert names == [f"{what}, {of}" for what in ("tuned binary", "onnxruntime") for of in ("the input", "macs=70%")]
    rows = {row["name"]: row for row in result["contenders"]}
    assert rows["onnxruntime, the input"]["times_faster"] == 1.0
    assert all(0 < row["seconds"] <= row["p10"] <= row["median"] for row in rows.values())
    assert all(row["low"] <= row["times_faster"] <= row["high"] for row in rows.values())
    assert rows["tuned binary, macs=70%"]["macs"] <= 0.7 * rows["tuned binary, the input"]["macs"]
    first, second = result["runs"]
    assert first["measurement"]["trials"] > 0 == second["measurement"]["trials"]
    assert result["untuned_layers"] == []
    assert {row["accuracy"] * TEST_IMAGES % 1 for row in rows.values()} == {0.0}
    assert [len(table.rows) for table in bench.tables(result)] == [4, 2]


@pytest.mark.slow
def test_predictions_stand_beside_what_was_measured(folders: tuple[Path, Path]) -> None:
    bench = CpuPrediction(folders[0], plans=3, effort="quick")
    result = bench.run(QuietEvents())
    json.dumps(result)
    for row in result["plans"]:
        assert min(row["measured"], row["dense"], row["after"]) > 0
    for what in ("before", "after"):
        errors = sorted(abs(row[what] / row["measured"] - 1) for row in result["plans"])
        assert result[what]["median_error"] == pytest.approx(errors[1])
        assert result[what]["largest_error"] == pytest.approx(errors[2])
        assert -1 <= result[what]["rank_correlation"] <= 1
    assert [len(table.rows) for table in bench.tables(result)] == [2, 3]


@pytest.mark.slow
def test_networks_stand_beside_onnxruntime_or_say_what_stops_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (network,) = folders[0].glob("*.onnx")
    (tmp_path / network.name).write_bytes(network.read_bytes())
    unknown = helper.make_graph(
        [helper.make_node("RNN", ["x", "w", "r"], ["", "y"], "loop", hidden_size=2)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2])],
        [helper.make_tensor(n, TensorProto.FLOAT, [1, 2, 2], [0.5] * 4) for n in ("w", "r")],
    )
    onnx.save(
        helper.make_model(unknown, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "z.onnx"
    )
    bench = CpuNetworks(tmp_path)
    result = bench.run(QuietEvents())
    json.dumps(result)
    first, second = result["networks"]
    assert first["max_abs"] < 1e-4 and first["low"] <= first["ratio"] <= first["high"]
    assert first["untuned"] == first["kernels"] > 0
    assert "RNN" in second["reason"] and "loop" in second["reason"]
    assert [len(table.rows) for table in bench.tables(result)] == [1, 1]


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="metric=limit"):
        CpuResnet20(limits=("50%",))
    with pytest.raises(UsageError, match="at least 3"):
        CpuPrediction(plans=2)
