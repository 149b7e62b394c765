"""rankc run, as it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from codegen.cli import main
from tests.codegen.runner.conftest import DIGITS, DTYPES, in_onnxruntime

ROOT = Path(__file__).resolve().parents[3]
IMAGE = np.random.default_rng(3).standard_normal((2, 1, 16, 16)).astype(np.float32)


def called(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *map(str, words)])
    return int(ended.value.code or 0)


def test_files_in_and_files_out(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", image=IMAGE, labels=np.zeros(2))
    np.save(tmp_path / "in.npy", IMAGE)
    want = in_onnxruntime(DIGITS, {"image": IMAGE})["logits"]
    for given in ("in.npz", "in.npy"):
        out = tmp_path / "out.npz"
        assert called(digits, "--inputs", tmp_path / given, "-o", out, "--repeat", 2, "--json", "-") == 0
        report = json.loads(capfd.readouterr().out)
        with np.load(out, allow_pickle=False) as made:
            assert list(made) == ["logits"]
            np.testing.assert_allclose(made["logits"], want, rtol=1e-4, atol=1e-4)
        assert report["outputs"]["logits"]["shape"] == [2, 10]
        assert report["outputs"]["logits"]["max"] == pytest.approx(want.max(), rel=1e-4)
        assert report["seconds"]["calls"] == 2 and 0 < report["seconds"]["min"] <= report["seconds"]["median"]
        assert report["metadata"]["inputs"][0]["shape"] == ["batch", 1, 16, 16]


def test_random_inputs_have_the_shapes_asked_for(digits: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert called(digits, "--shape", "image=5,1,16,16") == 0
    text = capfd.readouterr().out
    assert "output logits: float32[batch, 10] = [5, 10], values from" in text
    assert "input image: float32[batch, 1, 16, 16]" in text


def test_names_with_slashes_are_names(types: tuple[Path, Path], tmp_path: Path) -> None:
    assert called(types[1], "-o", tmp_path / "out.npz", "-q") == 0
    with np.load(tmp_path / "out.npz", allow_pickle=False) as made:
        assert set(made) == {f"out/{name}" for name in DTYPES}


def test_metadata_alone_runs_nothing(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert called(digits, "--metadata", "--json", tmp_path / "m.json") == 0
    assert json.loads((tmp_path / "m.json").read_text())["metadata"]["plan"] == "abc123"
    assert "rank plan sha256 abc123" in capfd.readouterr().out


def test_mistakes_end_in_a_code_and_a_line(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], types: tuple[Path, Path]
) -> None:
    np.save(tmp_path / "in.npy", IMAGE)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("hello")
    for words, code, line in [
        ((digits, "--shape", "x=1"), 2, "--shape x: there is no such input, but image"),
        ((digits, "--shape", "image=1,2,3"), 2, "--shape: image has shape [1, 2, 3], expected [batch, 1, 16, 16]"),
        ((digits, "--inputs", tmp_path / "in.npy", "--shape", "image=1,1,16,16"), 2, "--shape is for random inputs"),
        ((digits, "-o", tmp_path / "out.npy"), 2, "give a .npz in a folder that exists"),
        ((digits, "--inputs", tmp_path / "none.npz"), 4, "none.npz: cannot be read: No such file or directory"),
        ((digits, "--inputs", tmp_path / "text.npz"), 4, "text.npz: no .npz or .npy file of plain arrays"),
        ((digits, "--inputs", tmp_path / "objects.npy"), 4, "objects.npy: no .npz or .npy file of plain arrays"),
        ((types[1], "--inputs", tmp_path / "in.npy"), 4, "one array for 11 inputs: give a .npz with in/float32"),
        ((tmp_path / "none.so",), 4, "none.so: cannot be read: No such file or directory"),
    ]:
        assert called(*words) == code, words
        captured = capfd.readouterr()
        assert captured.out == "" and line in captured.err, captured.err
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_the_tool_runs_from_the_checkout(digits: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "run.py"), str(digits), "-q", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["inputs"] == "random"
