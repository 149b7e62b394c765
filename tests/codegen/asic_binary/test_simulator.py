"""The simulator behind the driver's table, called as C calls it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from accel_sim.engine import run
from accel_sim.program.container import encode
from accel_sim.program.isa import Program
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from codegen.asic_binary.simulator import SimulatorDriver, _Table, _Tensor
from codegen.asic_compile.compile import compile_graph
from codegen.asic_latency import AsicLatency
from codegen.quantized.graph import QTable, QTensor, QuantizedGraph

SHAPE = (1, 3, 5, 4)
TABLE = bytes((7 * i + 3) % 256 for i in range(256))


@pytest.fixture(scope="module")
def spec() -> MachineSpec:
    return load_spec()


@pytest.fixture(scope="module")
def program(spec: MachineSpec) -> Program:
    tensors = {name: QTensor(name, SHAPE, 0.5, 0, True) for name in ("x", "y")}
    operation = QTable("f", "Table", "x", "y", TABLE)
    graph = QuantizedGraph(tensors, (operation,), ("x",), ("y",), (False,), (False,), ("x",), ("y",))
    return compile_graph(graph, spec, AsicLatency(spec)).program


class Caller:
    """The driver's functions, with bytes in and out."""

    def __init__(self, spec: MachineSpec) -> None:
        self.driver = SimulatorDriver(spec)
        self.table = _Table.from_address(self.driver.address)

    def load(self, data: bytes) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.refused = self.table.load(ctypes.cast(data, ctypes.c_void_p), len(data), ctypes.byref(handle))
        return handle

    def run(self, handle: ctypes.c_void_p, x: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        out = np.zeros(size, np.int8)
        tensors = [(_Tensor * 1)(_Tensor(array.ctypes.data, array.size)) for array in (x, out)]
        cycles = ctypes.c_int64()
        self.refused = self.table.run(handle, tensors[0], 1, tensors[1], 1, ctypes.byref(cycles))
        return out, cycles.value

    @property
    def message(self) -> str:
        return ctypes.string_at(self.table.message()).decode()


def test_a_program_runs_through_the_table(spec: MachineSpec, program: Program) -> None:
    caller = Caller(spec)
    assert caller.table.version == 1
    handle = caller.load(encode(program))
    assert caller.refused == 0
    x = np.random.default_rng(0).integers(-128, 128, SHAPE, dtype=np.int8)
    out, cycles = caller.run(handle, x, x.size)
    assert caller.refused == 0
    np.testing.assert_array_equal(out.view(np.uint8), np.frombuffer(TABLE, np.uint8)[x.reshape(-1).view(np.uint8)])
    assert cycles == run(program, spec, {}, values=False).cycles > 0


def test_what_is_wrong_comes_back_as_a_message(spec: MachineSpec, program: Program) -> None:
    caller = Caller(spec)
    damaged = bytearray(encode(program))
    damaged[len(damaged) // 2] ^= 1
    caller.load(bytes(damaged))
    assert caller.refused and caller.message.startswith("ProgramError: ")
    handle = caller.load(encode(program))
    caller.run(handle, np.zeros(4, np.int8), 60)
    assert caller.refused and "has 4 bytes, expected (1, 3, 5, 4)" in caller.message
    caller.table.unload(handle)
    caller.run(handle, np.zeros(60, np.int8), 60)
    assert caller.refused and caller.message.startswith("KeyError")


def test_a_program_for_another_machine_is_refused(spec: MachineSpec, program: Program, tmp_path: Path) -> None:
    caller = Caller(load_spec("edge_16x16", {"rows": "8"}))
    caller.load(encode(program))
    assert caller.refused and "machine" in caller.message
