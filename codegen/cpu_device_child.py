"""Asks LLVM about processors: ``python -m codegen.cpu_device_child REQUEST ANSWER``; see :mod:`codegen.cpu_device`.

It loads the compiler's library without TVM's Python package, which takes a fifth of the time. LLVM crashes on an
architecture that it does not know, which is why it is asked in a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen.child_process import reply


def _processor(request: Mapping[str, Any]) -> dict[str, Any]:
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi would load it for interchange
    import tvm_ffi

    found = importlib.util.find_spec("tvm")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("TVM is not installed")
    folder = Path(found.submodule_search_locations[0]) / "lib"
    for name in ("libtvm_runtime.so", "libtvm_compiler.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    function = tvm_ffi.get_global_func
    make, features = function("target.Target"), function("target.llvm_get_cpu_features")
    asked = {name: value for name, value in request.items() if value}
    if asked.get("mcpu") == "host":
        asked["mcpu"] = str(function("target.llvm_get_system_cpu")())
    target = make({"kind": "llvm", **asked})
    unknown = []
    for attribute in request["mattr"]:  # a name that LLVM does not know is ignored with a warning
        with_it = make({"kind": "llvm", **asked, "mattr": [f"+{attribute[1:]}"]})
        if attribute[1:] not in {str(name) for name in features(with_it)}:
            unknown.append(attribute)
    return {
        "cpu": asked.get("mcpu", ""),
        "triple": str(asked.get("mtriple") or function("target.llvm_get_system_triple")()),
        "features": sorted(str(name) for name in features(target)),
        "processors": sorted(str(name) for name in function("target.llvm_get_cpu_archlist")(target)),
        "unknown": unknown,
    }


if __name__ == "__main__":
    reply(_processor)
