"""A library for aarch64 and the C++ runner, run under qemu: the outputs are the host's.

The wheels of TVM's runtime for aarch64 are large (98 MB), so they are only fetched when asked for:
``make aarch64``, or RANKC_AARCH64_WHEELS=FOLDER with the two wheels, which the folder may also come to hold.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from codegen.cpu_device import device_for
from codegen.runner.build import build_runner, unpacked
from codegen.runner.library import Library
from codegen.runner.metadata import read_metadata
from codegen.tvm_build import Binary, build
from codegen.tvm_versions import REQUIRED
from passes.errors import InputError
from tests.codegen.runner.conftest import DIGITS, in_onnxruntime

TRIPLE = "aarch64-linux-gnu"
VARIABLE = "RANKC_AARCH64_WHEELS"
ROOT_OF_TARGET = Path("/usr") / TRIPLE

needs_compiler = pytest.mark.skipif(shutil.which(f"{TRIPLE}-g++") is None, reason=f"no {TRIPLE}-g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cross") / "model.so"
    device = device_for({"mtriple": TRIPLE, "mcpu": "cortex-a72"})
    binary = build(DIGITS, path, {"image": (2, 1, 16, 16)}, device=device, bind=True)
    assert isinstance(binary, Binary), binary
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheels of TVM's runtime for aarch64."""
    given = os.environ.get(VARIABLE)
    if not given:
        pytest.skip(f"{VARIABLE} is not set: run `make aarch64`")
    folder, target = Path(given), tmp_path_factory.mktemp("wheels")
    if len(list(folder.glob("*aarch64.whl"))) < len(REQUIRED):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", "manylinux_2_28_aarch64", "--python-version", "3.11", "--dest", str(folder)]
        subprocess.run([*command, *(f"{name}=={number}" for name, number in REQUIRED.items())], check=True)
    for wheel in folder.glob("*aarch64.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [name for name in archive.namelist() if "libtvm_compiler" not in name])
    return target


@needs_compiler
def test_its_metadata_are_read_here_though_it_does_not_run_here(library: Path) -> None:
    metadata = read_metadata(library)
    assert metadata.target["mtriple"] == TRIPLE and metadata.target["mcpu"] == "cortex-a72"
    assert [info.text for info in metadata.inputs] == ["image: float32[2, 1, 16, 16]"]
    if os.uname().machine != "aarch64":
        with pytest.raises(InputError, match=rf"model\.so: is for {TRIPLE}, and this machine's runtime is not"):
            Library(library)


@needs_compiler
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="no qemu-aarch64-static")
@pytest.mark.slow  # compiles the runner and emulates a processor
def test_under_qemu_it_computes_what_the_host_does(library: Path, wheels: Path, digits: Path, tmp_path: Path) -> None:
    runner = build_runner(tmp_path / "runner", unpacked(wheels), (f"{TRIPLE}-g++",))
    image = np.random.default_rng(5).standard_normal((2, 1, 16, 16)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    words = [library, "--input", f"image={tmp_path / 'image.npy'}", "--output", tmp_path]
    command = ["qemu-aarch64-static", "-L", str(ROOT_OF_TARGET), str(runner), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made = np.load(tmp_path / "logits.npy", allow_pickle=False)
    np.testing.assert_allclose(made, in_onnxruntime(DIGITS, {"image": image})["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made, Library(digits).run({"image": image})["logits"], rtol=1e-4, atol=1e-4)
