"""A quantized network as operations on bytes: what stands between a QDQ graph and a program.

Every tensor is int8 or uint8 with one scale and one zero point; real value = scale * (byte - zero_point). Every
operation is the exact integer function that onnxruntime computes for the node between its DequantizeLinear and
QuantizeLinear: one node, one operation, its output already quantized. What is fused on a machine is decided later.
Shapes are the network's: (N, C, axes...) for maps, (rows, features) for matrices; all are concrete.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from passes.core.site import Geometry


@dataclass(frozen=True)
class QTensor:
    """A tensor of bytes."""

    name: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        return (-128, 127) if self.signed else (0, 255)


@dataclass(frozen=True, eq=False)
class QConv:
    """Conv, ConvTranspose, Gemm or MatMul with constant weights.

    ``acc = bias + sum of weight * (x - x_zero)`` in int32; ``y = clamp(rint(float32(acc) * multiplier) + y_zero)``,
    rint to even, one float32 product. ``weight``: int8, (O, I/g, *kernel) with ``geometry``'s conventions;
    ``bias``: int32 (O,) or None; ``multipliers``: float32, (O,) or (1,).
    """

    name: str
    op: str
    input: str
    output: str
    geometry: Geometry
    weight: NDArray[np.int8]
    bias: NDArray[np.int32] | None
    multipliers: NDArray[np.float32]
    low: int
    high: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QSum:
    """``y = clamp(rint(a_ratio * (a - a_zero) + b_ratio * (b - b_zero)) + y_zero, low, high)``, in float32."""

    name: str
    op: str
    a: str
    b: str
    output: str
    a_ratio: float
    b_ratio: float
    low: int
    high: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QProduct:
    """``y = clamp(rint(ratio * (a - a_zero) * (b - b_zero)) + y_zero)``, in float32."""

    name: str
    op: str
    a: str
    b: str
    output: str
    ratio: float
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QTable:
    """Any function of one byte: ``y = table[x as uint8]``; ReLU between different scales, Sigmoid, HardSwish, ..."""

    name: str
    op: str
    input: str
    output: str
    table: bytes
    nodes: tuple[str, ...] = ()


class Pool(StrEnum):
    MAX = "max"
    AVERAGE = "average"


@dataclass(frozen=True)
class QPool:
    """A pool over (N, C, axes); global pools have the whole map as their kernel. ``pads``: begins, then ends.

    Average: ``clamp(rint(ratio * float32(sum of (x - x_zero)) / count) + y_zero)`` in the form that the oracle proves;
    ``count_padding``: count is the kernel's size even where taps are padding.
    """

    name: str
    op: str
    kind: Pool
    input: str
    output: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    ratio: float = 1.0
    count_padding: bool = False
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A box of the output that comes from ``input``: ``output[begin + i] = input[source_begin + i * source_step]``.

    All per axis of the output; i runs over ``shape``. The input has as many axes (see ``QMove.permutation``).
    """

    input: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    source_begin: tuple[int, ...]
    source_step: tuple[int, ...]


@dataclass(frozen=True)
class QMove:
    """Bytes that only change place: Slice, Pad, Concat, Split, Transpose, DepthToSpace is none.

    ``permutation``: the inputs' axes are permuted first (Transpose). What no piece covers is ``fill``.
    All inputs have the output's scale and zero point.
    """

    name: str
    op: str
    output: str
    pieces: tuple[Piece, ...]
    permutation: tuple[int, ...] | None = None
    fill: int | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QReshape:
    """Another shape of the same elements in the network's (row-major) order: Reshape, Flatten, Squeeze, Unsqueeze."""

    name: str
    op: str
    input: str
    output: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QHost:
    """What is no integer operation: a float ONNX graph (serialized) from dequantized inputs to outputs."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reason: str
    model: bytes
    nodes: tuple[str, ...] = ()


QOperation = QConv | QSum | QProduct | QTable | QPool | QMove | QReshape | QHost


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """Operations in an order in which they can run. ``tensors`` by name; inputs and outputs of the network by name.

    ``float_inputs``/``float_outputs``: for each of ``inputs``/``outputs``, whether the network itself takes or gives
    floats there (QuantizeLinear and DequantizeLinear at the border are the host's).
    """

    tensors: dict[str, QTensor]
    operations: tuple[QOperation, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_inputs: tuple[bool, ...]
    float_outputs: tuple[bool, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
