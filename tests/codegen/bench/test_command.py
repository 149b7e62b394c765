"""``rankc bench``: streams, exit codes, options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

from codegen import cli
from codegen.bench import BUILTIN, benchmark
from codegen.bench.benchmark import EFFORT_NAMES, Table, make
from codegen.bench.command import percentages
from codegen.config import LowerConfig
from passes.errors import UsageError

ROOT = Path(cli.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Counting:
    """Counts to ``plans``, with noise on every stream on the way."""

    plans: int = 2
    models: Path = Path("/somewhere/models")

    name: ClassVar[str] = "counting"

    def run(self, events: Any) -> dict[str, Any]:
        os.write(1, b"stray line of a native library\n")
        print("stray line of Python")
        with events.stage("count", self.plans) as progress:
            progress.advance(self.plans)
        return {"rows": list(range(self.plans)), "kinds": {}}

    def tables(self, result: Any) -> list[Table]:
        return [Table("counted [to the end]", ("number",), tuple((str(n),) for n in result["rows"]))]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "make", lambda name, options: Counting(**options))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.usefixtures("counting")
def test_json_is_one_object_alone_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("counting", "--plans", "3", "--json", "-") == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert (found["benchmark"], found["rows"]) == ("counting", [0, 1, 2])
    assert found["options"] == {"plans": 3, "models": "models"}  # no folder of one machine
    assert found["machine"]["cores"] >= 1 and "python" in found["tool"]
    assert "stray" in err and "count" in err


@pytest.mark.usefixtures("counting")
def test_tables_go_to_stdout_and_json_to_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("counting", "--json", str(tmp_path / "r.json")) == 0
    out, _ = capfd.readouterr()
    assert out.splitlines()[0] == "counted [to the end]"
    cells = [line.strip("| ") for line in out.splitlines() if line.startswith("|")]
    assert [cells[0], *cells[2:]] == ["number", "0", "1"]
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [0, 1]


@pytest.mark.usefixtures("counting")
def test_quiet_leaves_stderr_empty(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("counting", "-q") == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("solvr",), "unknown benchmark 'solvr' (did you mean solver?)"),
        (("solver", "--rows", "a"), "--rows does not apply to the benchmark solver"),
        (("ptq-resnet20", "--rows", "ax"), "--rows 'ax': write any of a, b, c, d"),
        (("ptq-resnet20", "--rows", ""), "--rows '': write any of"),
        (("ptq-resnet20", "--budgets", "60,fast"), "--budgets '60,fast': write percentages"),
        (("ptq-resnet20", "--effort", "huge"), "--effort 'huge': there are: quick, default, extensive"),
        (("lower-time", "--networks", "vgg"), "--networks 'vgg': write any of resnet20, resnet50"),
        (("error-models", "--plans", "5", "--corrected", "6"), "--corrected 6: at most the number of plans, 5"),
        (("error-models", "--corrected", "2"), "--corrected 2: a rank correlation needs at least 3 plans"),
        (("solver", "--json", ""), "--json takes a file"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_2(
    arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize("name", ["ptq-resnet20", "error-models", "lower-time"])
def test_missing_networks_are_one_line_and_exit_4(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--models", str(tmp_path), "--data", str(tmp_path), "--json", "-") == 4
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "resnet20_cifar10.onnx: no such file" in err and "--models DIR" in err


def test_percentages() -> None:
    assert percentages("90, 55%,1") == (90, 55, 1)
    for text in ("", "0", "101", "50,", "5.5", "-3"):
        with pytest.raises(UsageError):
            percentages(text)


def test_every_registered_benchmark_has_options_with_defaults() -> None:
    for name in BUILTIN:
        assert make(name, {}).name == name


def test_the_efforts_are_those_of_lower() -> None:
    assert get_args(LowerConfig.model_fields["effort"].annotation) == EFFORT_NAMES


def test_the_tool_and_the_command_are_one(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "bench.py"), "ptq-resnet20", "--models", str(tmp_path)]
    done = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr
    assert done.stdout == "" and "--models DIR" in done.stderr
