"""Runs a compiled library: inputs by name in, outputs by name out.

Needs NumPy, the package apache-tvm-ffi and the file libtvm_runtime.so, which the package apache-tvm brings; TVM's
compiler is neither imported nor loaded, so a process is ready in a quarter of a second.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.runner.metadata import Metadata, is_for_machine_of, read_metadata
from passes.errors import InputError, RankcError, first_line

Array = NDArray[Any]

FOLDER_VARIABLE = "RANKC_TVM_RUNTIME"
"""Names the folder of libtvm_runtime.so, where the package apache-tvm is not installed."""

_DEVICES = {"llvm": "cpu", "c": "cpu", "cuda": "cuda"}
_POOLED = 2  # the allocator of the virtual machine that keeps what it has freed


class RunError(RankcError):
    """The library was loaded and refuses, or fails."""


@dataclass(frozen=True)
class CallTimes:
    """Seconds of ``calls`` single calls: the least, the lowest tenth, and the middle."""

    min: float
    p10: float
    median: float
    calls: int


class Library:
    """A loaded library. Not to be used by two threads at once.

    ``threads``: of TVM's thread pool, for code that was compiled for several; 0 leaves them as they are. The pool
    belongs to the process.

    InputError for a file that is no library of rankc or is for another processor, or where the runtime is not
    found; RunError where the library cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self.path = path
        self.metadata: Metadata = read_metadata(path)
        kind = str(self.metadata.target.get("kind"))
        if kind not in _DEVICES:
            raise InputError(f"{path}: is for the target kind {kind!r}; this runner knows {', '.join(_DEVICES)}")
        if not is_for_machine_of(path, runtime_folder() / "libtvm_runtime.so"):
            triple = self.metadata.target.get("mtriple", "another processor")
            raise InputError(f"{path}: is for {triple}, and this machine's runtime is not")
        self.device = _DEVICES[kind]
        self._ffi = _load_runtime(self.device)
        allocate, copy_in, copy_out = "TVMTensorAllocWithScope", "TVMTensorCopyFromBytes", "TVMTensorCopyToBytes"
        self._allocate, self._copy_in, self._copy_out = [
            self._ffi.get_global_func(f"runtime.{name}") for name in (allocate, copy_in, copy_out)
        ]
        if threads:
            self._ffi.get_global_func("runtime.config_threadpool")(-1, threads)
        device = self._ffi.device(self.device, 0)
        try:
            machine = self._ffi.load_module(str(path.absolute()))["vm_load_executable"]()
            devices = [device] if self.device == "cpu" else [device, self._ffi.device("cpu", 0)]
            machine["vm_initialization"](*(v for d in devices for v in (d.dlpack_device_type(), d.index, _POOLED)))
            self._main = machine["main"]
        except Exception as error:  # the runtime raises whatever the failing part is called
            raise RunError(f"{path}: cannot be loaded: {first_line(error)}") from error
        self._where = device

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. InputError for missing, unknown or unfitting inputs, RunError where a kernel fails."""
        made = self._call(self._placed(inputs))
        return {info.name: self._fetched(value) for info, value in zip(self.metadata.outputs, made, strict=True)}

    def bound(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        """A call on these inputs, which lie on the device from now on; it returns when the device is done."""
        placed = self._placed(inputs)
        return lambda: self._call(placed)

    def time(self, inputs: Mapping[str, Array], calls: int, *, warmups: int = 3) -> CallTimes:
        """Times single calls on inputs that already lie on the device; errors as in :meth:`run`.

        The minimum is what the machine can do; on a busy one it is the only number that repeats.
        """
        if calls < 1:
            raise InputError(f"{calls} calls cannot be timed")
        call = self.bound(inputs)
        for _ in range(warmups):
            call()
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter_ns()
            call()
            seconds.append((time.perf_counter_ns() - begin) * 1e-9)
        p10, median = np.quantile(seconds, (0.1, 0.5)).tolist()
        return CallTimes(min(seconds), p10, median, calls)

    def _placed(self, inputs: Mapping[str, Array]) -> list[Any]:
        """The inputs in the library's order as tensors on its device, in memory aligned as its code wants it."""
        wanted = {info.name: info for info in self.metadata.inputs}
        for problem, names in (("no input", wanted.keys() - inputs.keys()), ("unknown input", inputs.keys() - wanted)):
            if names:
                known = "; ".join(info.text for info in self.metadata.inputs)
                raise InputError(f"{self.path.name}: {problem} {', '.join(sorted(names))}; it takes {known}")
        sizes: dict[str, int] = {}
        placed = []
        for name, info in wanted.items():
            array = np.asarray(inputs[name])
            misfit = info.misfit(array.dtype.name, array.shape, sizes)
            if misfit:
                raise InputError(f"{self.path.name}: {misfit}")
            tensor = self._allocate(self._ffi.Shape(array.shape), self._ffi.dtype(info.dtype), self._where, None)
            if array.size:
                dense = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
                self._copy_in(tensor, ctypes.c_void_p(dense.ctypes.data), dense.nbytes)
            placed.append(tensor)
        return placed

    def _call(self, placed: list[Any]) -> list[Any]:
        try:
            made = self._main(*placed)
            if self.device != "cpu":  # kernels run behind the call
                self._ffi.get_global_func("runtime.Device_StreamSync")(self._where, 0)
        except Exception as error:
            raise RunError(f"{self.path.name}: failed: {first_line(error)}") from error
        return [made] if hasattr(made, "shape") else list(made)

    def _fetched(self, tensor: Any) -> Array:
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        if array.size:
            self._copy_out(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array


def runtime_folder() -> Path:
    """The folder of libtvm_runtime.so: that of $RANKC_TVM_RUNTIME, or of the package apache-tvm. InputError."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        folders = [Path(given)]
    else:
        found = importlib.util.find_spec("tvm")  # does not import it
        folders = [Path(place) / "lib" for place in (found.submodule_search_locations or ())] if found else []
    for folder in folders:
        if (folder / "libtvm_runtime.so").is_file():
            return folder
    place = f"{FOLDER_VARIABLE}={given}" if given else f"install apache-tvm, or set {FOLDER_VARIABLE} to its folder"
    raise InputError(f"libtvm_runtime.so is not found: {place}")


def _load_runtime(device: str) -> Any:
    """The module tvm_ffi, with TVM's runtime loaded behind it. Loading it again is no work."""
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi would load it for interchange, in seconds
    try:
        import tvm_ffi
    except ImportError as error:
        raise InputError(f"the package apache-tvm-ffi is not installed: {first_line(error)}") from error
    finally:
        if absent:
            del sys.modules["torch"]
    folder = runtime_folder()
    libraries = {"libtvm_runtime.so": True, "libtvm_runtime_extra.so": False}  # the second one sorts
    if device == "cuda":
        libraries["libtvm_runtime_cuda.so"] = True
    for name, needed in libraries.items():
        if needed or (folder / name).is_file():
            try:
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise InputError(f"{name} cannot be loaded: {first_line(error)}") from error
    return tvm_ffi
