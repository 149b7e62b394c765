"""The Python runner against onnxruntime, and what it says to those who misuse it."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.runner.build import installed
from codegen.runner.inputs import random_inputs
from codegen.runner.library import FOLDER_VARIABLE, Library, RunError, runtime_folder
from passes.errors import InputError
from tests.codegen.runner.conftest import DIGITS, DTYPES, in_onnxruntime

ROOT = Path(__file__).resolve().parents[3]


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).standard_normal((count, 1, 16, 16)).astype(np.float32)


def test_outputs_are_those_of_onnxruntime_for_any_batch(digits: Path) -> None:
    library = Library(digits)
    for count in (1, 3):
        made = library.run({"image": images(count)})
        want = in_onnxruntime(DIGITS, {"image": images(count)})
        assert made.keys() == want.keys()
        np.testing.assert_allclose(made["logits"], want["logits"], rtol=1e-4, atol=1e-4)


def test_every_type_and_layout_of_memory_is_taken(types: tuple[Path, Path]) -> None:
    model, path = types
    library = Library(path)
    feeds = random_inputs(library.metadata, {"in/float32": (5, 3)}, seed=1)
    assert {value.shape for value in feeds.values()} == {(5, 3)}
    plain = library.run(feeds)
    for name, value in in_onnxruntime(model, feeds).items():
        np.testing.assert_array_equal(plain[name], value)
        assert plain[name].dtype == value.dtype
    odd = {name: np.asfortranarray(value) for name, value in feeds.items()}
    odd["in/float64"] = feeds["in/float64"].astype(">f8")
    odd["in/int16"] = np.repeat(feeds["in/int16"], 2, axis=0)[::2]
    for name, value in library.run(odd).items():
        np.testing.assert_array_equal(plain[name], value)


def test_an_empty_batch_is_a_batch(types: tuple[Path, Path]) -> None:
    library = Library(types[1])
    made = library.run({f"in/{name}": np.zeros((0, 3), name) for name in DTYPES})
    assert {value.shape for value in made.values()} == {(3, 0)}


def test_outputs_stay_what_they_were(digits: Path) -> None:
    library = Library(digits)
    first = library.run({"image": images(1)})["logits"]
    before = first.copy()
    library.run({"image": images(1) + 1})
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({}, "model.so: no input image; it takes image: float32[batch, 1, 16, 16]"),
        (
            {"image": images(1), "mask": images(1)},
            "model.so: unknown input mask; it takes image: float32[batch, 1, 16, 16]",
        ),
        ({"image": images(1).astype(np.float64)}, "model.so: image has dtype float64, expected float32"),
        ({"image": images(1)[0]}, "model.so: image has shape [1, 16, 16], expected [batch, 1, 16, 16]"),
        ({"image": images(1)[:, :, 1:]}, "model.so: image has shape [1, 1, 15, 16], expected [batch, 1, 16, 16]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(digits: Path, inputs: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as caught:
        Library(digits).run(inputs)
    assert str(caught.value) == line


def test_inputs_that_contradict_each_other_are_named(types: tuple[Path, Path]) -> None:
    feeds = {f"in/{name}": np.zeros((2, 3), name) for name in DTYPES}
    feeds["in/bool"] = np.zeros((4, 3), bool)
    with pytest.raises(InputError, match=re.escape("in/bool has shape [4, 3], expected [rows=2, 3]")):
        Library(types[1]).run(feeds)


def test_times_are_those_of_the_calls(digits: Path) -> None:
    times = Library(digits).time({"image": images(1)}, 5)
    assert 0 < times.min <= times.p10 <= times.median and times.calls == 5
    with pytest.raises(InputError, match="0 calls"):
        Library(digits).time({"image": images(1)}, 0)


def test_files_that_are_no_library_of_ours(tmp_path: Path, digits: Path) -> None:
    text, cut, foreign = tmp_path / "text.so", tmp_path / "cut.so", tmp_path / "foreign.so"
    text.write_text("hello")
    data = digits.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    foreign.write_bytes(data[:18] + struct.pack("<H", 243) + data[20:])
    for path, words in [
        (tmp_path / "none.so", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (text, "no shared library (ELF)"),
        (cut, "a damaged library: its table of sections cannot be read"),
        (foreign, "is for another processor, and this machine's runtime is not"),
        (installed().ffi, "a library without the section .rankc_metadata: not written by rankc, or stripped of it"),
    ]:
        with pytest.raises(InputError) as caught:
            Library(path)
        assert str(caught.value) == f"{path}: {words}"


def test_a_library_that_the_loader_refuses(tmp_path: Path, digits: Path) -> None:
    broken = tmp_path / "broken.so"
    data = bytearray(digits.read_bytes())
    data[54:56] = b"\0\0"  # the size of an entry in the table of segments, which only the loader reads
    broken.write_bytes(data)
    with pytest.raises(RunError, match=r"broken\.so: cannot be loaded: \S+"):
        Library(broken)


def test_the_runtime_is_found_or_missed_with_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (runtime_folder() / "libtvm_runtime.so").is_file()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=re.escape(f"libtvm_runtime.so is not found: {FOLDER_VARIABLE}={tmp_path}")):
        runtime_folder()


PROCESS = """
import sys
from pathlib import Path
from codegen.runner.library import Library
from codegen.runner.inputs import random_inputs
library = Library(Path(sys.argv[1]))
library.run(random_inputs(library.metadata, {}, 0))
print(*sorted({"tvm", "torch", "onnx", "onnxruntime", "scipy", "numba", "typer", "rich"} & set(sys.modules)))
print(*sorted(line.split("/")[-1].strip() for line in open("/proc/self/maps") if "libtvm_compiler" in line))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_runs_a_library_holds_no_compiler(digits: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESS, str(digits)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
