"""Compiles the C++ runner and lays TVM's runtime libraries beside it: ``python -m codegen.runner.build -o FOLDER``.

The folder is then complete: the runner looks for its libraries where it lies itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from codegen.runner.library import runtime_folder
from passes.errors import InputError, RankcError

RUNNER = "rankc_runner"
LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so")
SOURCES = Path(__file__).parent / "cpp"


@dataclass(frozen=True)
class Runtime:
    """Where headers and libraries lie. ``headers``: include folders; the libraries may be for another processor."""

    headers: tuple[Path, ...]
    ffi: Path
    runtime: Path


def installed() -> Runtime:
    """Those of the installed packages apache-tvm-ffi and apache-tvm, found without importing them. InputError."""
    found = importlib.util.find_spec("tvm_ffi")
    if found is None or not found.submodule_search_locations:
        raise InputError("the package apache-tvm-ffi is not installed: it has the headers that the runner needs")
    package = Path(next(iter(found.submodule_search_locations)))
    headers = package / "include", package / "3rdparty" / "dlpack" / "include"
    return Runtime(headers, package / "lib" / LIBRARIES[0], runtime_folder() / LIBRARIES[1])


def unpacked(folder: Path) -> Runtime:
    """Those of wheels of the two packages that were unpacked into ``folder``, for another processor. InputError."""
    package = folder / "tvm_ffi"
    headers = package / "include", package / "3rdparty" / "dlpack" / "include"
    runtime = Runtime(headers, package / "lib" / LIBRARIES[0], folder / "tvm" / "lib" / LIBRARIES[1])
    for path in (*headers, runtime.ffi, runtime.runtime):
        if not path.exists():
            raise InputError(f"{path} is missing: {folder} is no folder of the wheels' contents")
    return runtime


def command(output: Path, runtime: Runtime, compiler: Sequence[str]) -> list[str]:
    """How the runner is compiled. The libraries are taken from where ``output`` lies; it finds them there too."""
    return [
        *compiler,
        "-std=c++17",
        "-O2",
        *(word for folder in runtime.headers for word in ("-isystem", str(folder))),
        str(SOURCES / "main.cc"),
        "-o",
        str(output),
        "-Wl,--no-as-needed",  # libtvm_runtime.so works by being loaded: nothing refers to it
        *(str(output.parent / name) for name in LIBRARIES),
        "-ldl",
        "-Wl,-rpath,$ORIGIN",
    ]


def build_runner(
    folder: Path, runtime: Runtime | None = None, compiler: Sequence[str] = ("g++",), *, options: Sequence[str] = ()
) -> Path:
    """Compiles the runner into ``folder``, which is made, and copies its libraries there; returns its path.

    InputError without the compiler or where it fails, with its first complaint.
    """
    runtime = runtime or installed()
    if shutil.which(compiler[0]) is None:
        raise InputError(f"no compiler {compiler[0]} to build the runner with")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (runtime.ffi, runtime.runtime):
        shutil.copy2(path, folder / path.name)
    output = folder.absolute() / RUNNER
    done = subprocess.run([*command(output, runtime, compiler), *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
        raise InputError(f"{compiler[0]} cannot compile the runner: {complaint.strip()}")
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m codegen.runner.build", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder, made where it does not exist")
    parser.add_argument("--compiler", default="g++", help="such as aarch64-linux-gnu-g++")
    parser.add_argument("--wheels", type=Path, help="folder with the unpacked wheels of another processor")
    options = parser.parse_args(arguments)
    try:
        runtime = installed() if options.wheels is None else unpacked(options.wheels)
        build_runner(options.output, runtime, options.compiler.split())
    except RankcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name in (RUNNER, *LIBRARIES):
        print(f"{options.output / name}: {(options.output / name).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
