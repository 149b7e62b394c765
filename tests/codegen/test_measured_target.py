"""The pipeline on a target whose binaries are timed, with a made-up stopwatch: what budgets and refusals go by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from codegen import driver
from codegen.config import LowerConfig
from codegen.cpu_latency import CpuLatency
from codegen.emission import Emission, EmissionRequest
from codegen.events import Events, QuietEvents
from codegen.report.measurement import Contender, MeasurementReport
from codegen.result import LowerResult
from codegen.target import Target
from codegen.tune.statistics import Ratio
from passes.core.cost import Cost, Kind, StageWork
from passes.onnx_graph import OnnxGraph
from tests.codegen.made_up_trials import DEVICE, MadeUpTrials

DIGITS = Path(__file__).parents[2] / "examples" / "digits.onnx"


def kernel_s(work: StageWork) -> float:
    return 2 * work.macs / 50e9 + 3e-7


class Stopwatch(MadeUpTrials):
    """Kernels take :func:`kernel_s`, networks the sum and 5 us; ``slower``: what chains take more than that in one.

    ``drift``: the input is timed again beside each result, and takes this many times as long then. ``busy``: what the
    input takes longer the first time, as a share. ``cliff``: with kernels of more than this share of the input's,
    chains take twice as long.
    """

    def __init__(
        self, slower: float = 1.0, drift: float = 1.0, noise: float = 0.005, busy: float = 0.0, cliff: float = 1.0
    ) -> None:
        super().__init__(kernel_s)
        self.slower, self.drift, self.noise, self.busy, self.cliff = slower, drift, noise, busy, cliff
        self.emitted: list[float] = []

    def network_s(self, model: Path) -> float:
        stages = [op.stage for op in OnnxGraph.read(model).workload() if op.stage is not None]
        kernels, dense = (sum(map(kernel_s, each)) for each in (stages, DENSE))
        factor = self.slower if len(stages) > len(DENSE) else 1.0
        return 5e-6 + factor * kernels * (2 if self.cliff * dense < kernels < dense else 1)

    def target(self) -> Target:
        prices = CpuLatency(DEVICE, self)

        def baseline(model: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, events: Events) -> Cost:
            prices.measure(DENSE, events)
            return Cost(latency=(1 + self.busy) * self.network_s(model), unit="s", kind=Kind.MEASURED)

        def emit(request: EmissionRequest) -> Emission:
            before, after = self.drift * self.network_s(request.original), self.network_s(request.model)
            self.emitted.append(after)
            share, doubt = after / before, 1 + self.noise
            ratio = Ratio(share, share / doubt, share * doubt, 0.95)
            contenders = (
                Contender("input", before, before, before, 9),
                Contender("result", after, after, after, 9, ratio.value, ratio.low, ratio.high),
            )
            return Emission(
                {"binary": None},
                None,
                Cost(latency=after, unit="s", kind=Kind.MEASURED),
                baseline=Cost(latency=before, unit="s", kind=Kind.MEASURED),
                comparison=ratio,
                measurement=MeasurementReport("made up", 1, 0.95, contenders, after, "none", len(self.times), 0, 0),
            )

        return Target("made up", {}, prices, emit, None, {}, baseline)


DENSE = [op.stage for op in OnnxGraph.read(DIGITS).workload() if op.stage is not None]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    (image,) = onnx.load(DIGITS).graph.input
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim][1:]
    noise = rng.standard_normal((64, *shape)).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "calib.npz"
    np.savez(path, **{image.name: noise + np.roll(noise, 1, -1)})
    return path


def lower(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path, **options: Any
) -> LowerResult:
    monkeypatch.setattr(driver, "parse_target", lambda text: watch.target())
    values = {"model": DIGITS, "output": tmp_path / "out", "effort": "quick", "calib": str(calibration), **options}
    return driver.lower(LowerConfig.from_values(values), QuietEvents())


def test_the_budget_is_a_share_of_the_input_as_it_was_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path
) -> None:
    watch = Stopwatch()
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets={"latency": "60%"})
    (budget,) = result.report["budgets"]
    dense_s = watch.network_s(DIGITS)
    assert budget["limit"] == pytest.approx(0.6 * dense_s, rel=1e-9) and budget["kind"] == "measured"
    assert budget["met"] and not result.missed and len(watch.emitted) == 1
    assert budget["value"] == watch.emitted[-1] == result.report["result"]["latency"]["value"]
    assert 0.5 < budget["value"] / dense_s <= 0.6  # most of what may be used is used
    assert {layer["kind"] for layer in result.report["layers"]} == {"measured"}


def test_a_binary_over_the_budget_is_searched_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path
) -> None:
    watch = Stopwatch(slower=1.08)
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets={"latency": "60%"})
    limit = 0.6 * watch.network_s(DIGITS)
    assert watch.emitted[0] > limit >= watch.emitted[-1] and len(watch.emitted) in (2, 3)
    assert not result.missed
    assert any("searching again" in note["text"] for note in result.report["notes"])


def test_a_budget_that_is_undercut_by_far_is_searched_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path
) -> None:
    """The input was timed on a busy machine: what its kernels do not explain is not there in the result."""
    watch = Stopwatch(busy=0.35)
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets={"latency": "60%"})
    dense_s = watch.network_s(DIGITS)
    assert watch.emitted[0] < 0.5 * dense_s < watch.emitted[-1] <= 0.6 * dense_s
    assert not result.missed and result.report["budgets"][0]["value"] == watch.emitted[-1]
    assert any("under: searching again" in note["text"] for note in result.report["notes"])


def test_where_the_next_plan_misses_the_budget_the_one_before_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path
) -> None:
    watch = Stopwatch(busy=0.35, cliff=0.45)
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets={"latency": "60%"})
    limit = 0.6 * watch.network_s(DIGITS)
    assert max(watch.emitted[1:-1]) > limit > watch.emitted[0] == watch.emitted[-1]
    assert not result.missed and result.report["budgets"][0]["value"] == watch.emitted[0]
    assert any("the plan before it stands" in note["text"] for note in result.report["notes"])
    assert watch.network_s(tmp_path / "out" / "model.onnx") == watch.emitted[0]  # it is what was written


def test_the_goal_is_sought_between_what_kept_the_budget_and_what_did_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path
) -> None:
    watch = Stopwatch(busy=0.35, cliff=0.5)
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets={"latency": "60%"})
    first, second, third = watch.emitted
    assert first < third <= 0.6 * watch.network_s(DIGITS) < second
    assert not result.missed and result.report["budgets"][0]["value"] == third


def test_the_input_counts_as_it_is_beside_the_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path
) -> None:
    watch = Stopwatch(drift=1.05)
    report = lower(watch, monkeypatch, tmp_path, calibration, budgets={"latency": "60%"}).report
    beside = 1.05 * watch.network_s(DIGITS)
    assert report["baseline"]["latency"]["value"] == pytest.approx(beside, rel=1e-9)
    assert report["budgets"][0]["limit"] == pytest.approx(0.6 * beside, rel=1e-9)


@pytest.mark.parametrize(("budgets", "noise"), [({"latency": "90%"}, 0.5), ({}, 9.0)])
def test_a_gain_within_noise_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path, budgets: dict[str, str], noise: float
) -> None:
    watch = Stopwatch(noise=noise)
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets=budgets)
    assert result.missed == bool(budgets)
    assert any("with 95% confidence: the input is kept" in text for text in result.report["warnings"])
    assert all(layer["choice"] == "dense" for layer in result.report["layers"])
    assert result.report["result"]["latency"]["value"] == watch.network_s(DIGITS)


def test_for_fewer_macs_it_is_enough_to_be_no_slower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path
) -> None:
    """And what latency they bought is reported, measured."""
    watch = Stopwatch(noise=0.9)
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets={"macs": "50%"})
    assert (
        not result.missed
        and result.report["result"]["macs"]["value"] <= 0.5 * result.report["baseline"]["macs"]["value"]
    )
    assert result.report["result"]["latency"] == {"value": watch.emitted[-1], "unit": "s", "kind": "measured"}


def test_a_slower_result_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Path) -> None:
    watch = Stopwatch(slower=20)
    result = lower(watch, monkeypatch, tmp_path, calibration, budgets={"macs": "50%"})
    assert result.missed and all(layer["choice"] == "dense" for layer in result.report["layers"])
