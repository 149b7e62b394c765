"""rankc reproduce on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codegen.cli import main
from codegen.reproduce import run as running
from codegen.reproduce.experiment import names
from codegen.reproduce.run import ReproduceConfig

RESULT: dict[str, Any] = {
    "title": "T", "schedule": "short", "seeds": [0, 1],
    "summary": [
        {"step": "dense", "accuracy_mean": 0.9, "accuracy_deviation": 0.001, "gain_points_mean": 0.0,
         "gain_points_deviation": 0.0, "runs": 2, "accuracy_int8_mean": None, "accuracy_int8_deviation": None,
         "budgets_missed": None, "macs_ratio_mean": 1.0, "params_ratio_mean": 1.0, "latency_ratio_mean": None},
        {"step": "milp", "accuracy_mean": 0.91, "accuracy_deviation": None, "gain_points_mean": 1.0,
         "gain_points_deviation": None, "runs": 2, "accuracy_int8_mean": 0.897, "accuracy_int8_deviation": 0.002,
         "budgets_missed": 1, "macs_ratio_mean": 0.278, "params_ratio_mean": 0.3, "latency_ratio_mean": 0.5},
    ],
    "published": [{"system": "HALOC", "source": "s", "gain_points": 0.07, "macs_removed": 72.2}],
}  # fmt: skip


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", *arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ReproduceConfig]:
    seen: list[ReproduceConfig] = []
    monkeypatch.setattr(running, "reproduce", lambda config, events: seen.append(config) or RESULT)
    return seen


def test_the_list(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--list") == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == list(names())
    assert call("--list", "--json", "-") == 0
    listed = json.loads(capfd.readouterr().out)["experiments"]
    assert [row["name"] for row in listed] == list(names()) and listed[0]["steps"][0] == "dense"


def test_options_arrive_and_the_table_is_shown(
    asked: list[ReproduceConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "r.json"
    code = call(
        "vgg16-macs", "-o", str(tmp_path), "--data", "d", "--models", "m", "--seeds", "2, 5", "--epochs", "3",
        "--schedule", "full", "--device", "cpu", "--dense", "net.onnx", "--json", str(target),
    )  # fmt: skip
    assert code == 0 and json.loads(target.read_text()) == RESULT
    assert asked == [
        ReproduceConfig("vgg16-macs", tmp_path, Path("d"), Path("m"), "full", (2, 5), 3, Path("net.onnx"), "cpu")
    ]
    out = capfd.readouterr().out
    assert "90.00 % ± 0.10" in out and "+1.00" in out and "27.8 %" in out and "HALOC (published)" in out
    (row,) = [line for line in out.splitlines() if "milp" in line]
    assert "89.70 % ± 0.20" in row and "missed by 1 of 2" in row
    assert call("vgg16-macs", "-o", str(tmp_path), "--json", "-") == 0
    assert json.loads(capfd.readouterr().out) == RESULT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which experiment? There are: dense-resnet20"),
        (["vgg16-macs"], "no output folder: give -o DIR"),
        (["vgg16-macs", "--list"], "--list does nothing else"),
        (["vgg16-macs", "-o", "out", "--seeds", "1,a"], "--seeds '1,a': write whole numbers"),
        (["vgg16-macs", "-o", "out", "--schedule", "long"], "--schedule 'long': there are: short, full"),
        (["vgg16-macs", "-o", "out", "-v", "-q"], "--verbose and --quiet contradict each other"),
    ],
)
def test_calls_that_are_wrong(
    arguments: list[str], message: str, asked: list[ReproduceConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    assert message in capfd.readouterr().err and not asked


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "reproduce", stopped)
    assert call("vgg16-macs", "-o", str(tmp_path)) == 130
    assert f"interrupted: what is done is kept in {tmp_path}; the same command goes on" in capfd.readouterr().err
