"""What the compiler emits passes all checks of programs, and survives the container and the listing."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.pricing.layer import Layer
from accel_sim.program.assembler import assemble
from accel_sim.program.check import check_program
from accel_sim.program.container import decode, encode
from accel_sim.program.isa import Program
from accel_sim.program.listing import disassemble
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from codegen.asic_compile.compile import compile_graph
from codegen.asic_latency import AsicLatency
from codegen.quantized.frontend import read_qdq

HERE = Path(__file__)
lp = SimpleNamespace(**run_path(str(HERE.with_name("layer_programs.py"))))
drawn = SimpleNamespace(**run_path(str(HERE.with_name("test_layer.py"))))
MODEL = HERE.parents[4] / "shared" / "models" / "resnet20_cifar10_qdq.onnx"


def check(program: Program, spec: MachineSpec) -> None:
    check_program(program, spec)
    data = encode(program)
    assert decode(data, spec) == program
    assert encode(assemble(disassemble(program, spec))) == data


@settings(max_examples=8, deadline=None)
@given(drawn.layers(), drawn.machines(), st.integers(0, 2**32 - 1))
def test_any_tiling_of_any_layer(
    layer_drawn: tuple[Layer, tuple[int, int, int], tuple[int, int, int]], spec: MachineSpec, seed: int
) -> None:
    """Not the best tiling alone: no tiling's buffers are used twice at a time, whatever the machine's timing."""
    layer, kernel, dilations = layer_drawn
    values = lp.random_values(layer, kernel, dilations, seed)
    found = lp.tilings(layer, spec)
    for tiling in found[np.random.default_rng(seed).integers(0, len(found), 2)]:
        check(lp.chain_program(spec, [lp.priced(layer, spec, tiling)], [values]), spec)


@pytest.mark.skipif(not MODEL.exists(), reason="no ../shared/models/resnet20_cifar10_qdq.onnx")
@pytest.mark.parametrize("preset", ["edge_16x16", "gemmini_16x16", "tpu_256x256"])
def test_resnet20(preset: str) -> None:
    spec = load_spec(preset)
    check(compile_graph(read_qdq(MODEL), spec, AsicLatency(spec)).program, spec)
