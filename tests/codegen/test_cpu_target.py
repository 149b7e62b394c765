"""The target cpu as the command line sees it; the last test tunes, compiles, times and ships the demo's network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from codegen import driver
from codegen.config import LowerConfig
from codegen.cpu_latency import CpuLatency
from codegen.events import QuietEvents
from codegen.report.build import validate
from codegen.runner.library import Library
from codegen.target import parse_target
from codegen.tune.database import default_path
from codegen.tune.options import TuningOptions
from passes.core.cost import Kind, StageWork
from passes.core.site import Geometry
from passes.errors import InputError, UsageError

DIGITS = Path(__file__).parents[2] / "examples" / "digits.onnx"
CONV = StageWork(Geometry((3, 3), pads=(1, 1, 1, 1)), 16, 32, (16, 16))


def config(tmp_path: Path, **options: object) -> LowerConfig:
    return LowerConfig.from_values({"model": DIGITS, "output": tmp_path / "out", "target": "cpu", **options})


def test_this_host_is_described_in_full(tmp_path: Path) -> None:
    target = parse_target("cpu").under(TuningOptions(database=tmp_path / "tune.jsonl"))
    assert target.name == "cpu" and target.latency.unit == "s" and target.clock_hz is None
    assert target.spec["threads"] == 1 and target.spec["target"]["kind"] == "llvm" and target.spec["model"]
    assert "tuning" in target.versions
    json.dumps(target.spec)


def test_the_user_s_database_is_not_touched_where_another_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default_path().parent.mkdir()
    default_path().write_text("no database\n")
    plain = parse_target("cpu")
    (cost,) = plain.under(TuningOptions(database=tmp_path / "tune.jsonl")).latency.chains([(CONV,)])
    assert cost.latency > 0
    for opened in (lambda: plain.latency.chains([(CONV,)]), lambda: plain.under(TuningOptions())):
        with pytest.raises(InputError, match=r"tune\.jsonl"):
            opened()


def test_nothing_tells_the_energy(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--energy: nothing tells the energy of cpu; there are --latency, --macs, --params, --size"
    ):
        driver.lower(config(tmp_path, budgets={"energy": "50%"}), QuietEvents())


def test_what_is_not_tuned_takes_no_options_of_tuning(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--database, --trials: the target asic is not tuned"):
        driver.lower(config(tmp_path, target="asic", trials=3, database=tmp_path / "x"), QuietEvents())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rpc": "127.0.0.1:9190"}, "--rpc and --rpc-key belong together"),
        ({"rpc": "here", "rpc_key": "lab"}, "--rpc 'here': write HOST:PORT"),
        ({"rpc": "here:0", "rpc_key": "lab"}, "--rpc 'here:0': write HOST:PORT"),
    ],
)
def test_a_farm_is_an_address_and_a_key(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(tmp_path, **options)


def test_another_processor_is_estimated_and_never_measured(tmp_path: Path) -> None:
    target = parse_target("cpu:mtriple=aarch64-linux-gnu,mcpu=cortex-a72").under(
        TuningOptions(database=tmp_path / "tune.jsonl")
    )
    prices = target.latency
    assert isinstance(prices, CpuLatency)
    (cost,) = prices.chains([(CONV,)])
    assert cost.kind is Kind.ESTIMATED and cost.latency > 0
    assert prices.wanting([CONV]) == [] and not prices.measure([CONV], QuietEvents())
    assert not (tmp_path / "tune.jsonl").exists()


@pytest.mark.slow
def test_the_binary_is_tuned_timed_and_what_ships(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(str(DIGITS), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    shape = [1 if isinstance(size, str) else size for size in image.shape]
    noise = rng.standard_normal((96, *shape[1:])).astype(np.float32)
    np.savez(tmp_path / "calib.npz", **{image.name: noise + np.roll(noise, 1, -1)})
    options = {
        "calib": str(tmp_path / "calib.npz"),
        "budgets": {"latency": "85%"},
        "include": ("/block*",),
        "effort": "quick",
        "trials": 2,
        "database": tmp_path / "tune.jsonl",
        "formats": ("svd", "channel_svd_in", "channel_svd_out", "tucker2"),
    }
    result = driver.lower(config(tmp_path, **options), QuietEvents())
    report = result.report
    validate(report)
    (budget,) = report["budgets"]
    measured = report["measurement"]
    dense, rewritten, *references = measured["contenders"]
    assert report["baseline"]["latency"] == {"value": dense["seconds"], "unit": "s", "kind": "measured"}
    assert budget["value"] == report["result"]["latency"]["value"] == rewritten["seconds"]
    assert budget["kind"] == "measured" and budget["limit"] == pytest.approx(0.85 * dense["seconds"], rel=1e-9)
    assert budget["met"] == (not result.missed) == (budget["value"] <= budget["limit"])
    assert rewritten["low"] <= rewritten["ratio"] <= rewritten["high"]
    # On a machine that is too busy to show the gain the input is kept, and a warning says so.
    assert rewritten["high"] < 1 or any("the input is kept" in text for text in report["warnings"])
    assert len(references) == 2 and all(c["seconds"] > 0 for c in measured["contenders"])
    assert measured["trials"] > 0 and measured["untuned"] == []
    assert {layer["kind"] for layer in report["layers"] if layer["kind"] is not None} == {"measured"}
    library = Library(tmp_path / "out" / report["artifacts"]["binary"])
    x = noise[:1]
    wanted = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"]).run(
        None, {image.name: x}
    )
    for have, want in zip(library.run({image.name: x}).values(), wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))

    # The same plan: a search keeps to what the input takes by the clock, which may give another one on a busy machine.
    plan = tmp_path / "plan.json"
    plan.write_bytes((tmp_path / "out" / "plan.json").read_bytes())
    again = driver.lower(config(tmp_path, **options, plan=plan, force=True), QuietEvents()).report
    assert again["measurement"]["trials"] == 0
    assert again["measurement"]["from_database"] > 0
