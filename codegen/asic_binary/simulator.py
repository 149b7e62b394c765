"""The simulator as the driver behind model.so: :func:`install` in the process that runs it.

import codegen.asic_binary.simulator as simulator
simulator.install("edge_16x16")
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from accel_sim.engine import run
from accel_sim.program.container import decode
from accel_sim.program.isa import Program, Tensor
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec

VERSION = 1
GLOBAL_NAME = "rankc.driver"


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


_LOAD = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p))
_RUN = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.POINTER(_Tensor),
    ctypes.c_int32,
    ctypes.POINTER(_Tensor),
    ctypes.c_int32,
    ctypes.POINTER(ctypes.c_int64),
)
_UNLOAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_MESSAGE = ctypes.CFUNCTYPE(ctypes.c_void_p)


class _Table(ctypes.Structure):
    """``rankc_driver`` of rankc_driver.h."""

    _fields_ = (
        ("version", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("load", _LOAD),
        ("run", _RUN),
        ("unload", _UNLOAD),
        ("message", _MESSAGE),
    )


class SimulatorDriver:
    """Programs on the engine of :mod:`accel_sim.engine`, behind the table of rankc_driver.h.

    Must outlive whatever holds :attr:`address`.
    """

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self._programs: dict[int, Program] = {}
        self._message = ctypes.create_string_buffer(b"")
        self._table = _Table(
            VERSION, 0, _LOAD(self._load), _RUN(self._run), _UNLOAD(self._unload), _MESSAGE(self._last_message)
        )

    @property
    def address(self) -> int:
        """Of the table."""
        return ctypes.addressof(self._table)

    def _guarded(self, work: Callable[[], None]) -> int:
        try:
            work()
        except Exception as error:  # an exception must not pass through C
            self._message = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return 1
        return 0

    def _load(self, data: int, size: int, handle: Any) -> int:
        def work() -> None:
            program = decode(ctypes.string_at(data, size), self.spec)
            if program.calls:
                raise ValueError("the program calls the host; only whole subgraphs stand in a library")
            name = max(self._programs, default=0) + 1
            self._programs[name] = program
            handle[0] = name

        return self._guarded(work)

    def _run(self, handle: int, inputs: Any, input_count: int, outputs: Any, output_count: int, cycles: Any) -> int:
        def work() -> None:
            program = self._programs[handle]
            wanted = [t for t in program.tensors if t.role == "input"]
            made = [t for t in program.tensors if t.role == "output"]
            if (len(wanted), len(made)) != (input_count, output_count):
                raise ValueError(f"the program has {len(wanted)} inputs and {len(made)} outputs")
            feeds = {t.name: _view(inputs[i], t) for i, t in enumerate(wanted)}
            result = run(program, self.spec, feeds)
            for i, tensor in enumerate(made):
                _view(outputs[i], tensor)[...] = result.outputs[tensor.name]
            cycles[0] = result.cycles

        return self._guarded(work)

    def _unload(self, handle: int) -> None:
        self._programs.pop(handle, None)

    def _last_message(self) -> int:
        return ctypes.addressof(self._message)


def _view(tensor: Any, known: Tensor) -> np.ndarray[Any, Any]:
    kind = np.dtype(np.int8 if known.signed else np.uint8)
    if tensor.bytes != int(np.prod(known.shape)):
        raise ValueError(f"{known.name} has {tensor.bytes} bytes, expected {known.shape}")
    buffer = (ctypes.c_byte * tensor.bytes).from_address(tensor.data or 0)
    return np.frombuffer(buffer, dtype=kind).reshape(known.shape)


_installed: list[SimulatorDriver] = []


def install(machine: str, options: Mapping[str, str] | None = None) -> SimulatorDriver:
    """Registers a simulator for every model.so of this process, in the place of one that was there.

    ``machine``: a preset's name or a TOML file; ``options``: overrides, as :func:`accel_sim.spec_file.load_spec` takes
    them.
    """
    import tvm_ffi

    driver = SimulatorDriver(load_spec(machine, options or {}))
    _installed.append(driver)  # the libraries keep its address
    tvm_ffi.register_global_func(GLOBAL_NAME, lambda: driver.address, override=True)
    return driver
