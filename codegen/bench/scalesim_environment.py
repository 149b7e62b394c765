"""SCALE-Sim 3.0.0 in an environment of its own, and its answers. It is never a dependency of rankc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codegen.closing import Closing
from passes.errors import InputError

VERSION = "3.0.0"
REQUIREMENTS = (f"scalesim=={VERSION}", "numpy==1.26.4")
"""numpy: newer ones end SCALE-Sim's runs in a TypeError."""

_CHILD = Path(__file__).with_name("scalesim_child.py")
_DONE = "rankc-complete"


def default_folder() -> Path:
    """Where the environment is made: in the user's cache, one per Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rankc" / f"scalesim-{VERSION}-python{sys.version_info[0]}.{sys.version_info[1]}"


def make_environment(folder: Path, index_options: Sequence[str] = ()) -> Path:
    """The interpreter of the environment in ``folder``, which is made first unless it is complete.

    ``index_options``: further options of pip. InputError where SCALE-Sim cannot be installed, as without a network.
    """
    python = folder / "bin" / "python"
    if (folder / _DONE).is_file() and python.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--retries", "1", *index_options, *REQUIREMENTS]
    for command in ([sys.executable, "-m", "venv", str(folder)], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise InputError(
                f"{' and '.join(REQUIREMENTS)} cannot be installed into {folder} "
                f"({lines[-1] if lines else f'exit code {done.returncode}'}): make an environment that has them, and "
                "give its interpreter with --scalesim-python PATH"
            )
    (folder / _DONE).touch()
    return python


class ScaleSim(Closing):
    """A process of SCALE-Sim, asked for one layer at a time; a context manager."""

    def __init__(self, python: Path) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [str(python), "-I", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise InputError(f"--scalesim-python {python}: {error}") from error
        self.versions: dict[str, str] = self._answer(f"{python} has no {' and '.join(REQUIREMENTS)}")
        if self.versions["scalesim"] != VERSION:
            self.close()
            raise InputError(f"{python} has scalesim {self.versions['scalesim']}, the comparison is with {VERSION}")

    def run(self, rows: int, columns: int, dataflow: str, layer: Sequence[str | int]) -> dict[str, Any]:
        """Cycles, stall cycles among them, and CPU seconds of ``layer``: name, height, width, kernel height, kernel
        width, channels, filters, stride."""
        request = {"rows": rows, "columns": columns, "dataflow": dataflow, "layer": list(layer)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer(f"SCALE-Sim ended on {layer[0]}")

    def _answer(self, failure: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise InputError(f"{failure}: {lines[-1] if lines else f'exit code {self._process.returncode}'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()
