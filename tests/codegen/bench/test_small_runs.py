"""The benchmarks on a network of seconds: shapes of their results, and what must hold whatever the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from scipy import stats

from codegen.bench.cifar10 import images, top1
from codegen.bench.error_models import FAMILIES, TRUTHS, ErrorModels, kendall, rank_correlation, spearman
from codegen.bench.lower_time import LowerTime
from codegen.bench.ptq_resnet20 import PtqResnet20
from codegen.bench.resnet50 import write_random
from codegen.events import QuietEvents, RecordingEvents
from passes.errors import InputError
from tests.codegen.bench.tiny import write_folders

TEST_IMAGES = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_folders(tmp_path_factory.mktemp("bench"), calibration=80, test=TEST_IMAGES)


def test_images_are_scaled_and_channels_first(folders: tuple[Path, Path]) -> None:
    x, y = images(folders[1], "test.npz", 2, 7)
    with np.load(folders[1] / "cifar10" / "test.npz", allow_pickle=False) as archive:
        pixels, labels = archive["x"], archive["y"]
    assert x.shape == (5, 3, 32, 32) and x.dtype == np.float32
    assert x[1, 2, 4, 9] == pytest.approx((pixels[3, 4, 9, 2] / 255 - 0.406) / 0.225, rel=1e-5, abs=1e-6)
    assert y.tolist() == labels[2:7].tolist()


def test_images_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(InputError, match=r"test.npz: no such file.*--data DIR"):
        images(tmp_path, "test.npz", 0, None)
    np.savez(tmp_path / "cifar10" / "test.npz", x=np.zeros((2, 3, 32, 32), np.float32), y=np.zeros(2))
    with pytest.raises(InputError, match=r"float32 \(2, 3, 32, 32\), expected uint8"):
        images(tmp_path, "test.npz", 0, None)


def test_top1_counts_right_answers(folders: tuple[Path, Path]) -> None:
    x, y = images(folders[1], "test.npz", 0, None)
    wrong = np.where(np.arange(len(y)) < 15, (y + 1) % 10, y)
    path = folders[0] / "resnet20_cifar10.onnx"
    assert top1(path, x, wrong, batch=7) == 45 / TEST_IMAGES


@pytest.fixture(scope="module")
def ptq(folders: tuple[Path, Path]) -> tuple[PtqResnet20, dict[str, Any]]:
    bench = PtqResnet20(*folders, rows="cab", budgets=(100, 60), effort="quick", calibration=80)
    return bench, bench.run(QuietEvents())


def test_ptq_has_a_row_per_method_and_budget(ptq: tuple[PtqResnet20, dict[str, Any]]) -> None:
    bench, result = ptq
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [(r["row"], r["budget_percent"]) for r in result["rows"]] == [
        ("dense", None), ("a", 100), ("a", 60), ("b", 100), ("b", 60), ("c", 100), ("c", 60)
    ]  # fmt: skip
    assert (result["evaluated"], result["calibration_images"]) == (TEST_IMAGES, 80)
    assert result["kinds"]["latency"] == "simulated" and result["kinds"]["accuracy"] == "measured"
    (table,) = bench.tables(result)
    assert len(table.rows) == 7 and all(len(row) == len(table.columns) for row in table.rows)


def test_ptq_keeps_the_network_where_the_budget_allows_it(ptq: tuple[PtqResnet20, dict[str, Any]]) -> None:
    """Labels are the dense network's own answers, and its error is 0: nothing else may be chosen at 100 %."""
    rows = {(r["row"], r["budget_percent"]): r for r in ptq[1]["rows"]}
    dense = rows["dense", None]
    assert dense["accuracy"] == 1.0
    for row in "abc":
        kept, reduced = rows[row, 100], rows[row, 60]
        assert (kept["accuracy"], kept["macs"], kept["latency"]) == (1.0, dense["macs"], dense["latency"])
        assert reduced["met"] and reduced["latency"] <= 0.6 * dense["latency"]
        assert reduced["macs"] < dense["macs"] and 0 <= reduced["accuracy"] <= 1


@pytest.mark.slow
def test_the_last_row_is_what_lower_makes(folders: tuple[Path, Path]) -> None:
    events = RecordingEvents()
    bench = PtqResnet20(*folders, rows="d", budgets=(60,), effort="quick", calibration=80, images=40)
    result = bench.run(events)
    _, row = result["rows"]
    assert row["met"] and row["latency_ratio"] <= 0.6 and result["evaluated"] == 40
    assert "correct in sequence" in events.timings


@pytest.mark.slow
def test_lower_time_reports_the_stages(folders: tuple[Path, Path]) -> None:
    bench = LowerTime(*folders, networks=("resnet20",), effort="quick", calibration=80)
    (run,) = bench.run(QuietEvents())["runs"]
    assert run["met"] and run["result"]["value"] <= 0.6 * run["baseline"]["value"]
    assert run["stages"]["price candidates"] > 0
    assert max(run["stages"].values()) < run["seconds"]
    (table,) = bench.tables({"runs": [run]})
    assert [row[0] for row in table.rows[-2:]] == ["in all", "CPU time of it"]


def test_error_models_compares_each_with_each(folders: tuple[Path, Path]) -> None:
    bench = ErrorModels(
        *folders, plans=5, corrected=3, pool=12, statistics=50, held_out=30, reacting=16, probing=16, resamples=20
    )
    result = bench.run(QuietEvents())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [plan["family"] for plan in result["plans"]] == ["random"] * 5 + ["solved"] * 5
    assert ["corrected" in plan["kl"] for plan in result["plans"]] == [True, True, True, False, False] * 2
    assert all(0.5 <= plan["latency_ratio"] <= 0.95 and plan["kl"]["whitened"] > 0 for plan in result["plans"])
    assert all(plan["latency_ratio"] <= 0.65 for plan in result["plans"][5:])
    names = list(result["plans"][0]["predicted"])
    found = [(row["family"], row["truth"], row["model"]) for row in result["correlations"]]
    assert found == [(family, truth, name) for family in FAMILIES for truth in TRUTHS for name in names]
    assert all(-1 <= row["spearman"]["low"] <= row["spearman"]["high"] <= 1 for row in result["correlations"])
    assert {row["model"] for row in result["costs"]} == set(names) - {"latency saved (control)"}
    assert all(row["per_candidate_s"] > 0 for row in result["costs"])
    assert len(bench.tables(result)) == len(FAMILIES) * len(TRUTHS) + 1


@pytest.mark.parametrize(("statistic", "value"), [("spearman", 1 - 6 * 2 / (4 * 15)), ("kendall", (5 - 1) / 6)])
def test_rank_correlation_by_hand(statistic: str, value: float) -> None:
    """One swapped pair among four: squared rank differences 1 + 1, five pairs in order and one not."""
    found = rank_correlation(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 40, 30]), statistic, 200, 0)
    assert found["value"] == pytest.approx(value, rel=1e-12)
    assert found["low"] is not None and found["high"] is not None
    assert -1 <= found["low"] <= value <= found["high"] <= 1


def test_rank_correlations_equal_those_of_scipy_ties_included() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, (20, 15)).astype(float), rng.integers(0, 9, (20, 15)).astype(float)
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        wanted = [float(theirs(x, y).statistic) for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(ours(a, b), wanted, rtol=1e-12, atol=1e-15)
    assert np.isnan(spearman(np.ones((1, 4)), b[:1, :4])).all()


def test_a_constant_has_no_rank_correlation() -> None:
    assert rank_correlation(np.ones(5), np.arange(5.0), "kendall", 10, 0) == {"value": None, "low": None, "high": None}


@pytest.mark.slow
def test_the_random_resnet50_computes_finite_outputs(tmp_path: Path) -> None:
    path = tmp_path / "r50.onnx"
    write_random(path, seed=0)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert ops.count("Conv") == 53 and "ConstantOfShape" not in ops
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (spec,) = session.get_inputs()
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    (y,) = session.run(None, {spec.name: x})
    assert y.shape == (1, 1000) and np.isfinite(y).all() and float(y.std()) > 0
