"""The timing process: ``python -m codegen.tvm_time_child REQUEST ANSWER``; see :mod:`codegen.library_timing`."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.child_process import reply

_WARM_UP_NS = 100_000_000
_LOOK_S = 0.05


def _timed(request: Mapping[str, Any]) -> dict[str, Any]:
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi would load it for interchange
    pin(request["threads"])
    return _kernels(request) if "kernels" in request else _contenders(request)


def pin(threads: int) -> None:
    """Keeps the process on the ``threads`` processors that others use least; where a system cannot do that, not."""
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    if threads < len(allowed):
        before = _idle()
        time.sleep(_LOOK_S)
        gained = {cpu: idle - before.get(cpu, idle) for cpu, idle in _idle().items()}
        os.sched_setaffinity(0, sorted(allowed, key=lambda cpu: -gained.get(cpu, 0))[:threads])


def _idle() -> dict[int, int]:
    """Ticks that each processor was idle for, of /proc/stat."""
    stat = Path("/proc/stat")
    lines = stat.read_text(encoding="ascii").splitlines() if stat.is_file() else []
    return {int(line.split()[0][3:]): int(line.split()[4]) for line in lines if line[:3] == "cpu" and line[3].isdigit()}


def _contenders(request: Mapping[str, Any]) -> dict[str, Any]:
    runs: list[Callable[[], Any]] = []
    reads: list[Callable[[], list[NDArray[Any]]]] = []
    with np.load(request["given"], allow_pickle=False) as given:
        for index, contender in enumerate(request["contenders"]):
            values = [given[f"{index}/{i}"] for i in range(len(contender["inputs"]))]
            path = Path(contender["path"])
            start = _onnxruntime if path.suffix == ".onnx" else _library
            run, read = start(path, contender["inputs"], values, request["threads"])
            runs.append(run)
            reads.append(read)
    outputs = [read() for read in reads]
    for run in runs:
        begin = time.perf_counter_ns()
        while time.perf_counter_ns() - begin < _WARM_UP_NS:
            run()
    seconds = _interleaved(runs, request["blocks"], request["calls"])
    arrays: dict[str, Any] = {f"{index}/seconds": rows for index, rows in enumerate(seconds)}
    arrays |= {f"{index}/{i}": value for index, made in enumerate(outputs) for i, value in enumerate(made)}
    np.savez(request["made"], allow_pickle=False, **arrays)
    return {"outputs": [len(made) for made in outputs]}


def _interleaved(runs: Sequence[Callable[[], Any]], blocks: int, calls: int) -> NDArray[np.float64]:
    """Seconds, (contenders, blocks, calls)."""
    clock = time.perf_counter_ns
    nanoseconds = np.zeros((len(runs), blocks, calls), np.int64)
    gc.collect()
    gc.disable()
    try:
        for block in range(blocks):
            for turn in range(len(runs)):
                index = (turn + block) % len(runs)
                run, row = runs[index], nanoseconds[index, block]
                run()  # the others' weights leave the cache
                for position in range(calls):
                    begin = clock()
                    run()
                    row[position] = clock() - begin
    finally:
        gc.enable()
    return np.asarray(nanoseconds * 1e-9, np.float64)


def _library(
    path: Path, names: Sequence[str], values: Sequence[NDArray[Any]], threads: int
) -> tuple[Callable[[], Any], Callable[[], list[NDArray[Any]]]]:
    import tvm
    from tvm.runtime.vm import VirtualMachine

    entry = VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())["main"]
    tensors = [tvm.runtime.tensor(value) for value in values]

    def read() -> list[NDArray[Any]]:
        made = entry(*tensors)
        return [output.numpy() for output in ([made] if hasattr(made, "numpy") else list(made))]

    return lambda: entry(*tensors), read


def _onnxruntime(
    path: Path, names: Sequence[str], values: Sequence[NDArray[Any]], threads: int
) -> tuple[Callable[[], Any], Callable[[], list[NDArray[Any]]]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in zip(names, values, strict=True):
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")

    def read() -> list[NDArray[Any]]:
        session.run_with_iobinding(binding)
        return [np.asarray(value) for value in binding.copy_outputs_to_cpu()]

    return lambda: session.run_with_iobinding(binding), read


def _kernels(request: Mapping[str, Any]) -> dict[str, Any]:
    import tvm

    module = tvm.runtime.load_module(request["library"])
    parts = [module, *module.imports]
    rng = np.random.default_rng(0)
    times: list[list[float]] = []
    for kernel in request["kernels"]:
        part = next((part for part in parts if part.implements_function(kernel["name"])), None)
        if part is None:  # a reshape that the virtual machine makes a view of
            times.append([])
            continue
        arguments = [tvm.runtime.tensor(_random(rng, shape, dtype)) for shape, dtype in kernel["arguments"]]
        timed = part.time_evaluator(kernel["name"], tvm.cpu(), number=1, repeat=request["repeats"])
        times.append([float(value) for value in timed(*arguments).results])
    return {"seconds": times}


def _random(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """Values that are no subnormal floats; integers are 0, which every table has an entry for."""
    if np.issubdtype(np.dtype(dtype), np.floating):
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    return np.zeros(shape, dtype)


if __name__ == "__main__":
    reply(_timed)
