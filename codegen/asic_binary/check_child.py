"""A fresh process that runs model.so with the simulator behind it: ``python -m codegen.asic_binary.check_child``."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from codegen.child_process import reply


def _prepare() -> None:
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi would load it for interchange
    import tvm.runtime.vm  # noqa: F401

    import codegen.asic_binary.simulator  # noqa: F401


def _check(request: Mapping[str, Any]) -> dict[str, Any]:
    import tvm
    from tvm.runtime.vm import VirtualMachine

    from codegen.asic_binary.simulator import install

    install(request["machine"], request["options"])
    machine = VirtualMachine(tvm.runtime.load_module(request["library"]), tvm.cpu())
    library = ctypes.CDLL(request["library"])
    library.rankc_cycles.restype = ctypes.c_int64
    results = {}
    cycles = []
    count = 0
    with np.load(request["given"], allow_pickle=False) as given:
        for run in range(request["runs"]):
            values = [tvm.runtime.tensor(given[f"{run}/{i}"]) for i in range(request["inputs"])]
            library.rankc_reset_cycles()
            made = machine["main"](*values)
            cycles.append(int(library.rankc_cycles()))
            outputs = [made] if hasattr(made, "numpy") else list(made)
            count = len(outputs)
            results.update({f"{run}/{i}": output.numpy() for i, output in enumerate(outputs)})
    np.savez(request["made"], allow_pickle=False, **results)
    return {"outputs": count, "cycles": cycles}


if __name__ == "__main__":
    reply(_check, prepare=_prepare)
