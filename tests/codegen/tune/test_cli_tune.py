import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest

from codegen import cli, cpu_trials
from codegen.cpu_device import host_device
from codegen.tune.database import Database
from codegen.tune.run import schema
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from tests.codegen.tune.tuning import KnownTimes
from tests.onnx_models import normal, onnx_model

CHECKOUT = Path(cli.__file__).resolve().parents[1]
FIRST = Workload.parse("conv 1x4x8x8 -> 8, kernel 3x3, pads 1,1,1,1, float32")
SECOND = Workload.parse("conv 1x8x8x8 -> 8, kernel 3x3, pads 1,1,1,1, float32")
LAST = Workload.parse("linear 1x512 -> 200, float32")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four layers of three kernels."""
    body = """net (float[1,4,8,8] x) => (float[1,200] y) {
        a = Conv <pads = [1,1,1,1]> (x, u)
        b = Conv <pads = [1,1,1,1]> (a, v)
        c = Conv <pads = [1,1,1,1]> (b, w)
        d = Flatten (c)
        y = Gemm (d, m)
    }"""
    weights = {"u": normal(8, 4, 3, 3), "v": normal(8, 8, 3, 3), "w": normal(8, 8, 3, 3, seed=1), "m": normal(512, 200)}
    path = tmp_path / "net.onnx"
    onnx.save(onnx_model(body, weights), path)
    return path


@pytest.fixture
def measurer(monkeypatch: pytest.MonkeyPatch) -> KnownTimes:
    """In the place of this host: the first schedule of a kernel takes 2 us, the second breaks, the others take 1 us."""

    def seconds(workload: Workload, schedule: Schedule) -> float | None:
        count = sum(job.workload == workload for job in found.asked)
        return {1: 2e-6, 2: None}.get(count, 1e-6)

    found = KnownTimes(seconds)
    found.device = host_device()
    monkeypatch.setattr(cpu_trials, "_here", lambda device: found)
    return found


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_report_holds_every_kernel_once(model: Path, tmp_path: Path, measurer: KnownTimes, capfd: Any) -> None:
    database = tmp_path / "tune.jsonl"
    arguments = (str(model), "--database", str(database), "--trials", "4", "--json", "-", "-q")
    assert call(*arguments) == 0
    report = json.loads(capfd.readouterr().out)
    jsonschema.validate(report, schema())
    assert [(row["workload"], row["layers"]) for row in report["workloads"]] == [
        (FIRST.key, 1), (SECOND.key, 2), (LAST.key, 1)
    ]  # fmt: skip
    for row in report["workloads"]:
        assert (row["default_s"], row["best_s"], row["trials"], row["measured"], row["broken"]) == (2e-6, 1e-6, 4, 4, 1)
        assert row["error"] == "it broke" and row["ended"] == "trials"
    # 2 FLOPs for each of 8 x 8 positions x 8 outputs x 4 inputs x 9 taps, in a microsecond.
    assert report["workloads"][0]["flops_per_s"] == pytest.approx(2 * 8 * 8 * 8 * 4 * 9 / 1e-6, rel=1e-12)
    assert report["totals"] == {
        "default_s": pytest.approx(8e-6, rel=1e-12),
        "best_s": pytest.approx(4e-6, rel=1e-12),
        "measured": 12,
        "trials": 12,
        "broken": 3,
    }
    assert report["database"]["schedules"] == 12 and report["complete"]
    assert call(*arguments) == 0
    again = json.loads(capfd.readouterr().out)
    assert again["totals"]["measured"] == 0 and again["workloads"][0]["best_s"] == 1e-6
    assert len(measurer.asked) == 12


def test_the_table_is_for_people(model: Path, tmp_path: Path, measurer: KnownTimes, capfd: Any) -> None:
    database = tmp_path / "tune.jsonl"
    assert call(str(model), "--database", str(database), "--trials", "4") == 0
    out, err = capfd.readouterr()
    assert "done  tune" in err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        "kernel layers default best ratio GFLOP/s trials broken",
        f"{FIRST.key} 1 2 µs 1 µs 50.0 % 36.9 4 1",
        f"{SECOND.key} 2 2 µs 1 µs 50.0 % 73.7 4 1",
        f"{LAST.key} 1 2 µs 1 µs 50.0 % 204.8 4 1",
        "",
        "all layers one after another: 8 µs by default, 4 µs by the best schedules (measured, minimum of single calls)",
        "12 trials made, 12 known of these kernels, 3 of them broken",
        f"{database}: 12 schedules",
    ]
    assert call("--database", str(database), "--list") == 0
    rows = capfd.readouterr().out.splitlines()
    assert rows[0].startswith(host_device().key)
    assert [line.split("  ")[0] for line in rows[2:5]] == sorted(w.key for w in (FIRST, SECOND, LAST))
    assert call("--database", str(database), "--list", "--json", "-", "-q") == 0
    assert {row["best_s"] for row in json.loads(capfd.readouterr().out)["kernels"]} == {1e-6}


def test_databases_are_merged_and_compacted(model: Path, tmp_path: Path, measurer: KnownTimes, capfd: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(str(model), "--database", str(first), "--trials", "4", "-q") == 0
    assert call("--database", str(second), "--merge", str(first), "--compact", "1") == 0
    # Of each kernel the fastest and the broken one stay, of four.
    assert capfd.readouterr().out == f"{second}: 6 schedules, 12 merged, 6 dropped\n"
    asked = len(measurer.asked)
    assert call(str(model), "--database", str(second), "--trials", "2", "-q") == 0
    assert len(measurer.asked) == asked


def test_layers_without_a_template_are_named(tmp_path: Path, measurer: KnownTimes, capfd: Any) -> None:
    body = "net (float[1,4,8,8,8] x) => (float[1,3,6,6,6] y) { y = Conv (x, u) }"
    path = tmp_path / "net.onnx"
    onnx.save(onnx_model(body, {"u": normal(3, 4, 3, 3, 3)}), path)
    assert call(str(path), "--database", str(tmp_path / "d"), "-q", "--json", str(tmp_path / "report")) == 0
    report = json.loads((tmp_path / "report").read_text())
    assert report["without_template"] == [{"workload": "conv 1x4x8x8x8 -> 3, kernel 3x3x3, float32", "layers": 1}]
    assert report["workloads"] == [] and measurer.asked == []


def test_nothing_but_broken_trials_is_an_error(
    model: Path, tmp_path: Path, measurer: KnownTimes, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    broken = KnownTimes(lambda workload, schedule: None)
    broken.device = measurer.device
    monkeypatch.setattr(cpu_trials, "_here", lambda device: broken)
    assert call(str(model), "--database", str(tmp_path / "d"), "-q") == 4
    assert capfd.readouterr().err == "error: every trial of every layer broke; the first: it broke\n"


def test_time_that_is_up_ends_it_well(model: Path, tmp_path: Path, measurer: KnownTimes, capfd: Any) -> None:
    assert call(str(model), "--database", str(tmp_path / "d"), "--time-budget", "0.001s", "--json", "-") == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert not report["complete"] and report["totals"]["measured"] == len(measurer.asked) == 1
    assert "time was up: 3 of 3 kernels had fewer trials than they may" in err
    assert report["totals"]["best_s"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ("", 2, "nothing to tune: give a network (.onnx), or --merge FILE, --compact N or --list"),
        ("none.onnx", 4, "none.onnx: no such file"),
        ("net.toml", 2, "net.toml: give a network (.onnx)"),
        ("net.onnx --target asic", 2, "--target asic: only cpu has kernels to tune"),
        ("net.onnx --target cpu:mtriple=aarch64-linux-gnu", 2, "measure on a farm of such devices"),
        ("net.onnx --target cpu:cores=2", 2, "a CPU target has no option 'cores'"),
        ("net.onnx --space all", 2, "--space 'all': there are templates, metaschedule, evolutionary"),
        ("net.onnx --trials 0", 2, "Invalid value for '--trials'"),
        ("net.onnx --time-budget soon", 2, "--time-budget 'soon' is no duration"),
        ("net.onnx --rpc 127.0.0.1:1", 2, "--rpc and --rpc-key belong together"),
        ("net.onnx --list", 2, "--list does nothing else"),
        ("net.onnx --serve", 2, "--serve does nothing else"),
        ("net.onnx --port 1", 2, "--port goes with --serve"),
        ("net.onnx -q -v", 2, "--verbose and --quiet contradict each other"),
        ("--list", 4, "d: no such file"),
        ("--merge none", 4, "none: no such file"),
        ("net.onnx --database net.onnx", 4, "net.onnx: is no tuning database of rankc"),
    ],
)
def test_a_wrong_call_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, arguments: str, code: int, line: str
) -> None:
    monkeypatch.chdir(model.parent)
    (model.parent / "net.toml").write_text("")
    given = arguments.split()
    if "--database" not in given:
        given += ["--database", "d"]
    assert call(*given) == code
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("error: ") and line in err[-1], err
    assert sum(part.startswith("error") for part in err) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_tool_tunes_with_tvm_and_keeps_everything_on_an_interrupt(model: Path, tmp_path: Path) -> None:
    database = tmp_path / "tune.jsonl"
    command = [sys.executable, str(CHECKOUT / "tools" / "tune.py"), str(model), "--database", str(database), "-q"]
    run = subprocess.Popen([*command, "--trials", "1000"], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not database.exists() or len(database.read_bytes().splitlines()) < 4:
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[1] == f"interrupted: every trial that was finished is in {database}\n"
    assert run.returncode == 130
    before = Database(database).records()
    done = subprocess.run([*command, "--trials", "2", "--json", "-"], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["totals"]["broken"] == 0
    for row in report["workloads"]:
        # Between 0.1 GFLOP/s, which plain code reaches, and 200, which a core of this decade does not.
        assert row["trials"] >= 2 and 1e8 < row["flops_per_s"] < 2e11
    records = Database(database).records()
    assert {*before} <= {*records}
    assert len({(r.workload, r.schedule) for r in records}) == len(database.read_bytes().splitlines()) - 1
