"""Small valid programs for the default machine, written by hand: what a compiler would emit for one or two layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from accel_sim.program.isa import (
    Halt,
    Host,
    HostCall,
    Instruction,
    Load,
    Loops,
    Marker,
    Matmul,
    Output,
    Preload,
    Program,
    Space,
    Store,
    Sum,
    Sync,
    Tensor,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
    Window,
)
from accel_sim.program.machine_hash import spec_hash
from accel_sim.spec_file import load_spec

SPEC = load_spec("edge_16x16")
LOADED, FREED, COMPUTED, STORED = Token.LOADED, Token.FREED, Token.COMPUTED, Token.STORED

EMPTY = Program(
    spec_hash=spec_hash(SPEC),
    columns=16,
    code=(Halt(),),
    windows=(),
    outputs=(),
    sums=(),
    vectors=(),
    scales=(),
    tables=(),
    tensors=(),
    markers=(),
    calls=(),
    constants=b"",
    constants_address=0,
    dram_bytes=0,
)


def one_tile() -> Program:
    """A 3x3 convolution, 8 -> 4 channels at 4x4, padded by 1, in one tile. Weights and biases: 288 + 16 bytes."""
    constants = np.random.default_rng(0).integers(0, 256, 304, np.uint8).tobytes()
    window = Window(1, 8, (1, 4, 4), (1, 4, 4), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, -1, -1), 0, True)
    code: tuple[Instruction, ...] = (
        Sync(0),
        Load(0, 0, Loops(128)),
        Load(192, 128, Loops(304), chained=True, post=LOADED),
        Preload(wait=LOADED),
        Matmul(0, 0, 128, 0, 8, 4, bias_address=416, post=COMPUTED),
        Store(128, 0, Loops(64), lanes=4, output=0, wait=COMPUTED),
        Halt(),
    )
    return replace(
        EMPTY,
        code=code,
        windows=(window,),
        outputs=(Output(0, True, 3, -128, 127, True),),
        scales=(0.5, 0.25, 0.0009765625, 0.125),
        tensors=(
            Tensor("x", (1, 8, 4, 4), 0, 0.5, 0, True, "input"),
            Tensor("y", (1, 4, 4, 4), 128, 0.25, 3, True, "output"),
        ),
        markers=(Marker("conv", "Conv", ("conv", "relu"), 123, 8 * 4 * 9 * 16),),
        constants=constants,
        constants_address=192,
        dram_bytes=496,
    )


def two_layers() -> Program:
    """A 1x1 convolution 32 -> 16 at 8x8 in four double-buffered tiles with a residual; a pool; a host call.

    DRAM: x 2048 at 0, r 1024 at 2048, y 1024 at 3072, p 16 at 4096, q 16 at 4112, weights 512 + 64 at 4160.
    Scratchpad: tiles of x, 512 each, at 0 and 512; weights at 1024. Accumulators: tiles of 16 positions x 16 filters
    at 0 and 1024; tiles of r at 2048 and 2304.
    """
    constants = np.random.default_rng(1).integers(0, 256, 576, np.uint8).tobytes()
    tile = Window(1, 32, (1, 2, 8), (1, 2, 8), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), -3, True)
    pool = Window(1, 16, (1, 8, 8), (1, 1, 1), (1, 8, 8), (1, 1, 1), (1, 1, 1), (0, 0, 0), 0, True)
    code: list[Instruction] = [Sync(0), Load(4160, 1024, Loops(576))]
    for step in range(4):
        # Two blocks of 16 channels, 256 contiguous bytes of each; block to block 1024 bytes in DRAM, 256 on chip.
        loops = Loops(256, (1, 1, 2), (0, 0, 1024), (0, 0, 256))
        half = step % 2
        wait = FREED if step >= 2 else Token.NONE
        code += [
            Load(256 * step, 512 * half, loops, wait=wait),
            Load(2048 + 256 * step, 2048 + 256 * half, Loops(256), Space.ACCUMULATOR, chained=True, post=LOADED),
        ]
        # The residual's buffer is free once its tile is stored, and it is loaded on the word of the execute queue.
        free = STORED if step >= 1 else Token.NONE
        code += [
            Preload(wait=LOADED | free, post=FREED if 1 <= step < 3 else Token.NONE),
            Matmul(0, 512 * half, 1024, 1024 * half, 32, 16, bias_address=1536, post=COMPUTED),
            Store(
                *(3072 + 256 * step, 1024 * half, Loops(256)),
                lanes=16,
                output=0,
                residual_address=2048 + 256 * half,
                wait=COMPUTED,
                post=STORED if step < 3 else Token.NONE,
            ),
        ]
    code += [
        Sync(1),
        Load(3072, 0, Loops(1024), post=LOADED),
        Vector(0, 0, 4096, 16, 1024, wait=LOADED, post=COMPUTED),
        Store(4096, 4096, Loops(16), lanes=16, wait=COMPUTED),
        Host(0),
        Halt(),
    ]
    return replace(
        EMPTY,
        code=tuple(code),
        windows=(tile, pool),
        outputs=(Output(0, False, 1, -128, 127, True, table=0, sum=0),),
        sums=(Sum(0.75, 1.25, 5.0, -128, 127, True, True, True, True),),
        vectors=(VectorSpec(VectorFunction.AVERAGE_POOL, window=1, ratio=0.875, a_zero=5, zero_point=-1),),
        scales=(0.001953125,),
        tables=(bytes(range(256)),),
        tensors=(
            Tensor("x", (1, 32, 8, 8), 0, 0.5, -3, True, "input"),
            Tensor("r", (1, 16, 8, 8), 2048, 0.5, -2, True, "input"),
            Tensor("y", (1, 16, 8, 8), 3072, 0.25, 5, True, "output"),
            Tensor("p", (1, 16), 4096, 0.125, -1, True, "internal"),
            Tensor("q", (1, 16), 4112, 0.00390625, -128, True, "output"),
        ),
        markers=(
            Marker("conv", "Conv", ("conv", "add"), 500, 32 * 16 * 64),
            Marker('pool "a"\n', "GlobalAveragePool", ("gap",)),
        ),
        calls=(HostCall("softmax", "not an operation of the machine", ("p",), ("q",), b"\x08\x08no model"),),
        constants=constants,
        constants_address=4160,
        dram_bytes=4736,
    )


SAMPLES = {"one_tile": one_tile, "two_layers": two_layers}
