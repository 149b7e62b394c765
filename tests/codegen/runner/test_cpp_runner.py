"""The C++ runner: the same outputs as onnxruntime and the Python runner, and exit codes with a line of words."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from codegen.runner.build import LIBRARIES, RUNNER, build_runner, installed, main, unpacked
from codegen.runner.inputs import random_inputs
from codegen.runner.library import Library
from codegen.runner.metadata import read_metadata
from passes.errors import InputError
from tests.codegen.runner.conftest import DIGITS, DTYPES, in_onnxruntime

IMAGE = np.random.default_rng(7).standard_normal((2, 1, 16, 16)).astype(np.float32)


def run(runner: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(runner), *map(str, words)], capture_output=True, text=True, timeout=120)


def test_the_folder_is_all_that_it_needs(runner: Path, digits: Path, tmp_path: Path) -> None:
    """It runs without our environment and without Python's packages on any path."""
    names = {path.name for path in runner.parent.iterdir()}
    assert names == {RUNNER, *LIBRARIES}
    np.save(tmp_path / "image.npy", IMAGE)
    command = [str(runner), str(digits), "--input", f"image={tmp_path / 'image.npy'}", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={}, cwd="/")
    assert done.returncode == 0, done.stderr
    want = in_onnxruntime(DIGITS, {"image": IMAGE})["logits"]
    made = np.load(tmp_path / "logits.npy", allow_pickle=False)
    np.testing.assert_allclose(made, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(made, Library(digits).run({"image": IMAGE})["logits"])
    assert done.stdout == f"logits: float32[2, 10] -> {tmp_path / 'logits.npy'}\n"


def test_every_type_passes_through_npy_files(runner: Path, types: tuple[Path, Path], tmp_path: Path) -> None:
    model, library = types
    feeds = random_inputs(read_metadata(library), {"in/float32": (4, 3)}, seed=2)
    words: list[str | Path] = []
    for name, value in feeds.items():
        path = tmp_path / f"{name.replace('/', '-')}.npy"
        np.save(path, value)
        words += ["--input", f"{name}={path}"]
    done = run(runner, library, *words, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for name, value in in_onnxruntime(model, feeds).items():
        made = np.load(tmp_path / f"{name.replace('/', '_')}.npy", allow_pickle=False)
        assert made.dtype == value.dtype
        np.testing.assert_array_equal(made, value)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_npy_are_read(runner: Path, digits: Path, tmp_path: Path, version: tuple[int, int]) -> None:
    path = tmp_path / "image.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, IMAGE, version=version)
    done = run(runner, digits, "--input", f"image={path}", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    made = np.load(tmp_path / "logits.npy", allow_pickle=False)
    np.testing.assert_array_equal(made, Library(digits).run({"image": IMAGE})["logits"])


def test_metadata_are_printed_as_they_are(runner: Path, digits: Path) -> None:
    done = run(runner, digits, "--metadata")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == read_metadata(digits).to_json() + "\n"
    assert json.loads(done.stdout)["plan"] == "abc123"


def test_calls_are_timed(runner: Path, digits: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", IMAGE)
    done = run(runner, digits, "--input", f"image={tmp_path / 'image.npy'}", "--repeat", "4", "--threads", "1")
    found = re.search(r"^4 calls: min ([0-9.]+) ms, median ([0-9.]+) ms$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout + done.stderr
    assert 0 < float(found[1]) <= float(found[2])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, digits: Path, runner: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    arrays = {
        "good": IMAGE,
        "wide": IMAGE.astype(np.float64),
        "fortran": np.asfortranarray(IMAGE[0, 0]),
        "flat": IMAGE[0],
        "scalar": np.float32(1),
        "swapped": IMAGE.astype(">f4"),
        "complex": IMAGE.astype(np.complex64),
    }
    for name, value in arrays.items():
        np.save(folder / name, value)
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:-4])
    (folder / "head.npy").write_bytes((folder / "good.npy").read_bytes()[:40])
    (folder / "huge.npy").write_bytes((folder / "good.npy").read_bytes().replace(b"(2, 1, 16, 16)", b"(9999999999,) "))
    (folder / "text.so").write_text("hello")
    (folder / "f.cc").write_text('extern "C" int f() { return 1; }')
    command = ["g++", "-shared", "-fPIC", str(folder / "f.cc"), "-o", str(folder / "foreign.so")]
    subprocess.run(command, check=True)
    found = {path.name.removesuffix(".npy"): path for path in folder.iterdir()}
    return found | {"model": digits, "folder": folder}


MODEL, SHAPE = "{model}", "expected [batch, 1, 16, 16]"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ("", 2, "which library?"),
        (f"{MODEL} {MODEL}", 2, "one library at a time"),
        (f"{MODEL} --input", 2, "--input: its value is missing"),
        (f"{MODEL} --input image", 2, "--input image: write NAME=FILE.npy"),
        (f"{MODEL} --input image={{good}} --input image={{good}}", 2, "--input image is given twice"),
        (f"{MODEL} --repeat 0", 2, "--repeat 0: write a number above zero"),
        (f"{MODEL} --repeat 1x", 2, "--repeat 1x: write a number above zero"),
        (f"{MODEL} --wrong 1", 2, "no such option: --wrong"),
        (f"{MODEL} --input image={{good}} --output {{model}}", 2, "is no folder"),
        ("{folder}/none.so", 4, "none.so: cannot be read"),
        ("{text.so}", 4, "text.so: cannot be loaded"),
        ("{foreign.so} --metadata", 4, "a library without metadata: not written by rankc"),
        (MODEL, 4, "no --input image=FILE.npy; it is image: float32[batch, 1, 16, 16]"),
        (f"{MODEL} --input image={{good}} --input x={{good}}", 4, "unknown input x; the library takes image: float32"),
        (f"{MODEL} --input image={{wide}}", 4, "image has dtype float64, expected float32"),
        (f"{MODEL} --input image={{flat}}", 4, f"image has shape [1, 16, 16], {SHAPE}"),
        (f"{MODEL} --input image={{scalar}}", 4, f"image has shape [], {SHAPE}"),
        (f"{MODEL} --input image={{folder}}/none.npy", 4, "none.npy: cannot be read"),
        (f"{MODEL} --input image={{model}}", 4, "no .npy file"),
        (f"{MODEL} --input image={{fortran}}", 4, "is in Fortran order, not in C's"),
        (f"{MODEL} --input image={{swapped}}", 4, "dtype '>f4' is not supported"),
        (f"{MODEL} --input image={{complex}}", 4, "dtype '<c8' is not supported"),
        (f"{MODEL} --input image={{cut}}", 4, "ends early"),
        (f"{MODEL} --input image={{head}}", 4, "a .npy header that is not understood"),
        (f"{MODEL} --input image={{huge}}", 4, "ends early"),
        (f"{MODEL} --load {{folder}}/none.so", 4, "none.so"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    runner: Path, files: dict[str, Path], words: str, code: int, line: str
) -> None:
    filled = [re.sub(r"\{([\w.]+)\}", lambda found: str(files[found[1]]), word) for word in words.split()]
    done = run(runner, *filled)
    assert done.returncode == code, done.stderr
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ") and line in first
    assert rest[0].startswith("usage: ") if rest else code != 2, rest
    assert done.stdout == ""


def test_a_compiler_or_its_headers_may_be_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no compiler none-g\\+\\+"):
        build_runner(tmp_path / "a", compiler=("none-g++",))
    with pytest.raises(InputError, match="is no folder of the wheels' contents"):
        unpacked(tmp_path)
    assert main(["-o", str(tmp_path / "b"), "--compiler", "none-g++"]) == 4
    assert not (tmp_path / "b").exists()


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    wrong = installed().__class__((), installed().ffi, installed().runtime)
    with pytest.raises(InputError, match=r"g\+\+ cannot compile the runner: .*error"):
        build_runner(tmp_path, wrong)


def test_the_types_of_numpy_are_all_there() -> None:
    assert len(DTYPES) == len(set(DTYPES)) == 11
