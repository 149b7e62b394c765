"""The checking process: ``python -m codegen.tvm_check_child REQUEST ANSWER``; see :mod:`codegen.tvm_check`.

Of libraries it imports NumPy and TVM's runtime, nothing else: what a deployment has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from codegen.child_process import reply


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi would load it for interchange
    import tvm
    from tvm.runtime.vm import VirtualMachine

    machine = VirtualMachine(tvm.runtime.load_module(request["library"]), tvm.cpu())
    results = {}
    count = 0
    with np.load(request["given"], allow_pickle=False) as given:
        for run in range(request["runs"]):
            values = [tvm.runtime.tensor(given[f"{run}/{i}"]) for i in range(request["inputs"])]
            made = machine["main"](*values)
            outputs = [made] if hasattr(made, "numpy") else list(made)
            count = len(outputs)
            results.update({f"{run}/{i}": output.numpy() for i, output in enumerate(outputs)})
    np.savez(request["made"], allow_pickle=False, **results)
    return {"outputs": count}


if __name__ == "__main__":
    reply(_run)
