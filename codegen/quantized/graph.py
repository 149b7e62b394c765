"""A quantized network as operations on bytes: what stands between a QDQ graph and a program.

Every tensor is int8 or uint8 with one scale and one zero point; real value = scale * (byte - zero_point). Every
operation is the exact integer function that onnxruntime computes for the node between its DequantizeLinear and
QuantizeLinear: one node, one operation, its output already quantized. What is fused on a machine is decided later.
Shapes are the network's: (N, C, axes...) for maps, (..., features) for matrices; all are concrete.

In the formulas, rint rounds half to even, clamp is to the limits of the output's type where nothing else is said,
every scale, ratio and multiplier is a float32, each product and sum is rounded to float32, and fma(a, b, c) is
a * b + c rounded once. :mod:`codegen.quantized.reference` is their executable form, docs/quantized.md counts how
they compare with onnxruntime's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

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

    ``acc = bias + sum of weight * (x - x_zero)`` in int32;
    ``y = clamp(rint(float32(acc) * multiplier) + y_zero, low, high)``, one float32 product. ``weight``: int8,
    (O, I/g, *kernel) with ``geometry``'s conventions; ``bias``: int32 (O,) or None; ``multipliers``: float32, (O,) or
    (1,), ``x_scale * weight_scale / y_scale`` in that order. Padding is x_zero. A matrix keeps its leading axes: the
    layer acts on the last one.
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
    """``y = clamp(rint(fma(a, a_ratio, fma(b, b_ratio, offset))), low, high)`` on the bytes a and b as they are.

    ``offset = y_zero - fma(a_ratio, a_zero, b_ratio * b_zero)``, which onnxruntime computes beforehand and in float32;
    the ratios are ``a_scale / y_scale`` and ``b_scale / y_scale``, negative for a difference. Shapes broadcast as
    NumPy's do.
    """

    name: str
    op: str
    a: str
    b: str
    output: str
    a_ratio: float
    b_ratio: float
    offset: float
    low: int
    high: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QProduct:
    """``y = clamp(rint(float32((a - a_zero) * (b - b_zero)) * ratio + y_zero))``: y_zero is added before rounding.

    ``ratio = a_scale * b_scale / y_scale`` in that order. Shapes broadcast as NumPy's do.
    """

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

    Average: ``clamp(rint(float32(sum of (x - x_zero)) * multiplier) + y_zero)``, the multiplier being
    ``average_multiplier(x, y, count)``; count is the number of taps that are no padding, or the kernel's size with
    ``count_padding``. ``ratio`` is the multiplier of a full window. Maximum: of the bytes, padding is less than all;
    scale and zero point do not change.
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
    """A box of the output: ``output[begin + i * step] = input[source_begin + i * source_step]``.

    All per axis of the output; i runs over ``shape``. The input has as many axes (see ``QMove.permutation``).
    ``step`` is all ones for () and above one where pieces interleave (Resize). ``source_step`` is 0 where one element
    is repeated, negative where the order is reversed.
    """

    input: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    source_begin: tuple[int, ...]
    source_step: tuple[int, ...]
    step: tuple[int, ...] = ()


@dataclass(frozen=True)
class QMove:
    """Bytes that only change place: Slice, Pad, Concat, Split, Transpose, Gather, Expand, Resize to the nearest.

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
    """What is no integer operation: a float ONNX graph (serialized) from dequantized inputs to outputs.

    The model's inputs and outputs stand in the order of ``inputs`` and ``outputs``, with their shapes. Bytes are
    dequantized before it and quantized behind it; what ``QuantizedGraph.host_tensors`` names goes in and out as it is.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reason: str
    model: bytes
    nodes: tuple[str, ...] = ()


QOperation = QConv | QSum | QProduct | QTable | QPool | QMove | QReshape | QHost


@dataclass(frozen=True)
class HostTensor:
    """A tensor that is no bytes with a scale: only the host reads or writes it. ``dtype`` is NumPy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """Operations in an order in which they can run. ``tensors`` by name; inputs and outputs of the network by name.

    ``constants``: values of the byte tensors that no operation writes. ``host_tensors``: what is no byte tensor;
    networks that are quantized throughout have none.
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
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    host_tensors: dict[str, HostTensor] = field(default_factory=dict)

    @property
    def signed(self) -> bool:
        """Whether any of its bytes are int8."""
        return any(tensor.signed for tensor in self.tensors.values())


def average_multiplier(x: QTensor, y: QTensor, count: int) -> np.float32:
    """What the sum of ``count`` taps is multiplied by: x_scale / (y_scale * count), in float32."""
    return np.float32(np.float32(x.scale) / np.float32(np.float32(y.scale) * np.float32(count)))
