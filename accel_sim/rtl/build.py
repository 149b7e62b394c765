"""Builds the benches with Verilator or Icarus Verilog, whichever is installed, into a cache outside the sources.

An executable is named after the contents of all sources, the parameters and the simulator's version, so no edit can
leave a stale one behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SIMULATORS = {"verilator": ("verilator", "make", "g++"), "icarus": ("iverilog", "vvp")}
"""Simulators in the order of preference, with the programs that each of them takes."""

_ARRAY = ("delay", "gemm_unit", "output_sequencer", "processing_element", "skew", "systolic_array", "weight_sequencer")
_PIPELINE = ("memory_channel", "request_queue", "tile_pipeline")
BENCHES = {"gemm_bench": _ARRAY, "pipeline_bench": _PIPELINE, "machine_bench": (*_ARRAY, *_PIPELINE)}
"""Benches, and the modules that each of them takes."""

_SOURCES = Path(__file__).parent
_CLOCK = _SOURCES / "clock.cpp"
_TIMEOUT_S = 900


class CosimulationError(RuntimeError):
    """A simulator is missing, refused the sources, or did not answer as it should."""


def installed() -> tuple[str, ...]:
    """Which of :data:`SIMULATORS` can be used here."""
    return tuple(name for name, programs in SIMULATORS.items() if all(shutil.which(program) for program in programs))


def choose(simulator: str | None) -> str:
    """``simulator``, or the first one installed; :class:`CosimulationError` where there is none."""
    found = installed()
    if simulator is None and found:
        return found[0]
    if simulator in found:
        return str(simulator)
    wanted = simulator or " or ".join(SIMULATORS)
    raise CosimulationError(f"no {wanted} found on the path (Debian: apt-get install verilator, or iverilog)")


def run(command: list[str], what: str) -> str:
    """Standard output of ``command``, which has to succeed in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise CosimulationError(f"{what}: no end after {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise CosimulationError(f"{what}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def source_digest(bench: str) -> str:
    """Digest of what ``bench`` is made of, in 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for source in _verilog(bench):
        text = source.read_text(encoding="utf-8").encode()  # whatever the line ends of this checkout
        digest.update(source.name.encode() + b"\0" + text)
    return digest.hexdigest()[:16]


def _verilog(bench: str) -> list[Path]:
    return [_SOURCES / f"{name}.sv" for name in (*BENCHES[bench], bench)]


def executable(bench: str, parameters: Mapping[str, int], simulator: str | None = None) -> list[str]:
    """Command that runs ``bench`` (a module of this folder) with ``parameters``, built when it is not in the cache."""
    simulator = choose(simulator)
    version = run(["verilator", "--version"] if simulator == "verilator" else ["iverilog", "-V"], simulator)
    digest = hashlib.sha256(f"{simulator} {version} {bench} {sorted(parameters.items())}".encode())
    digest.update(source_digest(bench).encode() + _CLOCK.read_bytes() + Path(__file__).read_bytes())
    folder = _cache_folder()
    target = folder / f"{bench}-{digest.hexdigest()[:20]}"
    with _lock(folder / f"{target.name}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = _build(simulator, bench, parameters, Path(scratch))
                os.replace(built, target)
    return [str(target)] if simulator == "verilator" else ["vvp", "-n", str(target)]


def _build(simulator: str, bench: str, parameters: Mapping[str, int], scratch: Path) -> Path:
    verilog = [str(source) for source in _verilog(bench)]
    if simulator == "icarus":
        options = [f"-P{bench}.{name}={value}" for name, value in parameters.items()]
        run(["iverilog", "-g2012", "-s", bench, *options, "-o", str(scratch / "bench"), *verilog], f"iverilog, {bench}")
        return scratch / "bench"
    options = [f"-G{name}={value}" for name, value in parameters.items()]
    # Code that runs once is not worth optimising. Warnings of other versions than ours should stop nobody.
    speed = ["-O3", "-MAKEFLAGS", "OPT_FAST=-O1 OPT_SLOW=-O0 OPT_GLOBAL=-O0", "-Wno-fatal"]
    top = ["--prefix", "Vbench", "--top-module", bench, "-Mdir", str(scratch)]
    run(["verilator", "--cc", "--exe", "--build", *speed, *top, *options, str(_CLOCK), *verilog], f"verilator, {bench}")
    return scratch / "Vbench"


def _cache_folder() -> Path:
    """The user's cache, or a folder for temporary files where that cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "rankc" / "rtl", Path(tempfile.gettempdir()) / f"rankc-rtl-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue  # read-only place: the next one
    raise CosimulationError("neither the user's cache nor the folder for temporary files can be written")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time: the test workers build each bench once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
