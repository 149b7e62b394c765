"""The compiler that links a library: the host's, or one for another architecture."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from codegen.tune.device import Device
from codegen.tvm_kernels.imports import load_tvm
from codegen.tvm_network_onnx import Refused


def linker(device: Device) -> Callable[..., None]:
    """What TVM's ``export_library`` takes as ``fcompile``; Refused, saying what to install, where there is none.

    A compiler for another triple is the value of the variable ``CXX_<triple>`` (with ``_`` for ``-``), or
    ``<triple>-g++``, ``-c++`` or ``-clang++`` on the path, the triple with or without its vendor.
    """
    command = _command(str(device.target.get("mtriple", "")))

    def link(output: str, objects: str | Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        files = [objects] if isinstance(objects, str) else list(objects)
        call = [*command, "-shared", "-fPIC", "-O2", "-o", output, *files, *(options or ())]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-1000:]}")

    link.output_format = "so"  # type: ignore[attr-defined]
    return link


def _command(triple: str) -> list[str]:
    if not triple:
        load_tvm()  # the first import of TVM must not load torch with it
        from tvm.support import cc

        found = cc.get_cc()
        if found is None:
            raise Refused("no C++ compiler was found to link the library with: install g++ or set CXX")
        return shlex.split(str(found))
    variable = f"CXX_{triple.replace('-', '_')}"
    if os.environ.get(variable):
        return shlex.split(os.environ[variable])
    parts = triple.split("-")
    short = "-".join((parts[0], *parts[2:])) if len(parts) > 3 else triple
    for prefix in dict.fromkeys((triple, short)):
        for suffix in ("g++", "c++", "clang++"):
            found = shutil.which(f"{prefix}-{suffix}")
            if found:
                return [found]
    raise Refused(f"no cross compiler for {triple} was found: install {short}-g++ or set {variable}")
