"""The command itself: streams, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen import cli
from codegen.simulate import run as pipeline
from codegen.simulate.report import validate
from tests.codegen.simulate.networks import DIGITS, ROOT, images, write_chain


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *map(str, arguments)], checkout=ROOT)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain(tmp_path_factory.mktemp("chain") / "chain.onnx", 16, 4, 8)


def test_the_stub_prints_one_object_and_nothing_else_on_stdout(chain: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "simulate.py", chain, "--target", "asic:rows=8", "--json", "-"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=chain.parent,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    validate(report)
    assert report["machines"][0]["target"]["name"] == "asic:rows=8"
    assert len(report["machines"][0]["layers"]) == 3
    assert "done" in done.stderr


def test_tables_name_layers_totals_and_sources(chain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(chain, "--stalls", "--sweep", "rows=8,16") == 0
    out = capfd.readouterr().out
    for words in (
        "Conv_0",
        "latency",
        "simulated",
        "busy",
        "array used",
        "fastest: rows=",
        "cycles hold, values do not",
    ):
        assert words in out
    assert call(chain, "--target", "asic", "--target", "eyeriss_12x14") == 0
    out = capfd.readouterr().out
    assert "eyeriss_12x14" in out and "simulated by the price list" in out


def test_files_are_written_where_they_are_asked_for(chain: Path, tmp_path: Path) -> None:
    assert call(chain, "--json", tmp_path / "r.json", "--csv", tmp_path / "l.csv", "-q") == 0
    validate(json.loads((tmp_path / "r.json").read_text(encoding="utf-8")))
    assert (tmp_path / "l.csv").read_text(encoding="utf-8").count("\n") == 4
    out = tmp_path / "out"
    assert call(chain, "-o", out, "-q") == 0
    assert call(chain, "-o", out, "-q") == 2  # not empty
    assert call(chain, "-o", out, "-q", "--force") == 0
    (out / "mine.txt").write_text("keep me", encoding="utf-8")
    assert call(chain, "-o", out, "-q", "--force") == 2
    assert (out / "mine.txt").read_text(encoding="utf-8") == "keep me"


def test_several_targets_get_a_folder_each(chain: Path, tmp_path: Path) -> None:
    targets = ("asic", "asic:rows=8", "eyeriss_12x14")
    asked = [word for target in targets for word in ("--target", target)]
    assert call(chain, *asked, "-o", tmp_path / "out", "-q") == 0
    report: dict[str, Any] = json.loads((tmp_path / "out" / "simulation.json").read_text(encoding="utf-8"))
    assert report["artifacts"]["program asic:rows=8"] == "2_asic_rows=8/program.bin"
    for path in report["artifacts"].values():
        assert (tmp_path / "out" / path).is_file()
    assert "program eyeriss_12x14" not in report["artifacts"]
    assert call(tmp_path / "out" / "2_asic_rows=8" / "program.bin", "--target", "asic:rows=8", "-q") == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["nothing.onnx"], 4, "nothing.onnx: no such file"),
        (["{chain}", "--target", "nobody"], 2, "unknown target 'nobody'"),
        (["{chain}", "--target", "nobody.toml"], 4, "nobody.toml: cannot be read"),
        (["{chain}", "--target", "asic:rows=zero"], 2, "rows=zero"),
        (["{chain}", "--target", "asic", "--target", "asic"], 2, "given twice"),
        (["{chain}", "--shape", "z=1"], 2, "inputs are x"),
        (["{chain}", "--inputs", "nothing.npz"], 4, "nothing.npz: no such file"),
        (["{chain}", "--inputs", "nothing.npz", "--price-list"], 2, "leave --price-list out"),
        (["{chain}", "--inputs", "x.npz", "--target", "eyeriss_12x14"], 2, "--inputs needs a program"),
        (["{chain}", "--samples", "none"], 2, "--samples 'none'"),
        (["{chain}", "--json", "nowhere/r.json"], 2, "a file in a folder that exists"),
        (["{chain}", "--csv", "nowhere/r.csv"], 2, "a file in a folder that exists"),
        (["{chain}", "--nonsense"], 2, "see --help"),
        (["{chain}.txt"], 2, "give a network (.onnx) or a program"),
        (["bad.onnx"], 4, "bad.onnx: cannot be read as an ONNX network"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    options: list[str],
    code: int,
    words: str,
    chain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{chain}.txt").write_text("text", encoding="utf-8")
    Path("bad.onnx").write_bytes(b"\x08\xff\xff nothing")
    np.savez("x.npz", x=np.zeros((1, 16, 8, 8), np.float32))
    assert call(*(option.replace("{chain}", str(chain)) for option in options)) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("done")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines


def test_a_program_of_another_machine_is_exit_4(chain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(chain, "--target", "gemmini_16x16", "-o", tmp_path / "out", "-q") == 0
    capfd.readouterr()
    assert call(tmp_path / "out" / "program.bin") == 4
    error = capfd.readouterr().err
    assert "is for another machine than asic" in error and "it fits gemmini_16x16" in error


def test_our_faults_are_exit_1(chain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(pipeline, "read_network", broken)
    assert call(chain) == 1
    assert "this is a fault in rankc: ZeroDivisionError: on purpose" in capfd.readouterr().err


def test_interrupted_is_exit_130_and_nothing_is_written(tmp_path: Path) -> None:
    sizes = ",".join(str(size) for size in range(4, 300))
    command = [sys.executable, str(ROOT / "tools" / "simulate.py"), str(DIGITS), "--sweep", f"rows={sizes}"]
    child = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert child.stderr is not None
    for line in child.stderr:
        if "simulate asic" in line:
            break
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGINT)
    with child.stderr:
        rest = child.stderr.read()
    assert child.wait(timeout=120) == 130, rest
    assert "interrupted: nothing was written" in rest
    assert list(tmp_path.iterdir()) == []


def test_one_image_may_be_given_without_a_name(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(1))
    np.savez(tmp_path / "named.npz", image=images(1))
    found = []
    for file in ("x.npy", "named.npz"):
        assert call(DIGITS, "--inputs", tmp_path / file, "--json", tmp_path / "r.json", "-q") == 0
        found.append(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["outputs"]["tensors"])
    assert found[0] == found[1]


def test_the_readme_shows_what_the_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- simulate output: begin -->", "<!-- simulate output: end -->"
    shown = text[text.index(begin) + len(begin) : text.index(end)]
    assert call(DIGITS) == 0
    printed = capfd.readouterr().out
    assert [line.strip() for line in shown.strip().splitlines()] == [line.strip() for line in printed.splitlines()]
