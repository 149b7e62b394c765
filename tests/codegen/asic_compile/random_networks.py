"""Random quantized networks of everything that a program can hold."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from codegen.quantized.graph import (
    Piece,
    Pool,
    QConv,
    QMove,
    QOperation,
    QPool,
    QProduct,
    QReshape,
    QSum,
    QTable,
    QTensor,
    QuantizedGraph,
)
from passes.core.site import Geometry


class Network:
    """A network in the making: each method adds an operation and gives the name of its output."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, QTensor] = {}
        self.operations: list[QOperation] = []
        self.input = self._tensor(shape, signed=bool(self.rng.integers(0, 2)))

    def graph(self, *outputs: str) -> QuantizedGraph:
        names = tuple(outputs)
        floats = (True,) * len(names)
        return QuantizedGraph(
            self.tensors, tuple(self.operations), (self.input,), names, (True,), floats, (self.input,), names
        )

    def values(self, samples: int) -> np.ndarray:
        tensor = self.tensors[self.input]
        low, high = tensor.limits
        shape = (samples * tensor.shape[0], *tensor.shape[1:])
        return self.rng.integers(low, high + 1, shape).astype(np.int8 if tensor.signed else np.uint8)

    def conv(self, x: str, filters: int, kernel: tuple[int, ...], **how: Any) -> str:
        """``how`` as in Geometry, and ``bias``; filters and channels must divide into the groups."""
        bias, op = how.pop("bias", True), "Conv" if kernel else "Gemm"
        geometry = Geometry(kernel, **how)
        source = self.tensors[x]
        channels = source.shape[1] if kernel else source.shape[-1]
        weight = self.rng.integers(-127, 128, (filters, channels // geometry.groups, *kernel)).astype(np.int8)
        shape = source.shape
        out = (shape[0], filters, *geometry.output_spatial(shape[2:])) if kernel else (*shape[:-1], filters)
        y = self._tensor(out)
        reach = 74 * 74 * prod(weight.shape[1:]) ** 0.5 / 50
        count = filters if self.rng.integers(0, 2) else 1
        multipliers = (self.rng.uniform(0.5, 2, count) / reach).astype(np.float32)
        words = self.rng.integers(-3000, 3000, filters).astype(np.int32) if bias else None
        low, high = self.tensors[y].limits
        low = self.tensors[y].zero_point if self.rng.integers(0, 2) else low
        self.operations.append(QConv(f"conv {y}", op, x, y, geometry, weight, words, multipliers, low, high))
        return y

    def table(self, x: str) -> str:
        y = self._tensor(self.tensors[x].shape)
        self.operations.append(QTable(f"table {y}", "Tanh", x, y, self.rng.bytes(256)))
        return y

    def sum(self, a: str, b: str) -> str:
        shape = np.broadcast_shapes(self.tensors[a].shape, self.tensors[b].shape)
        y = self._tensor(tuple(shape))
        ratios = self.rng.uniform(-0.9, 0.9, 3).astype(np.float32)
        limits = self.tensors[y].limits
        add = QSum(f"sum {y}", "Add", a, b, y, float(ratios[0]), float(ratios[1]), float(ratios[2] * 9), *limits)
        self.operations.append(add)
        return y

    def product(self, a: str, b: str) -> str:
        y = self._tensor(tuple(np.broadcast_shapes(self.tensors[a].shape, self.tensors[b].shape)))
        self.operations.append(QProduct(f"product {y}", "Mul", a, b, y, float(np.float32(0.013))))
        return y

    def pool(self, x: str, kind: Pool, kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...]) -> str:
        source = self.tensors[x]
        out = Geometry(kernel, strides, pads=pads).output_spatial(source.shape[2:])
        like = source if kind is Pool.MAX else None
        y = self._tensor((*source.shape[:2], *out), like)
        count = bool(self.rng.integers(0, 2))
        ones = (1,) * len(kernel)
        self.operations.append(QPool(f"pool {y}", "Pool", kind, x, y, kernel, strides, pads, ones, count_padding=count))
        return y

    def slice(self, x: str, axis: int, begin: int, count: int, step: int = 1) -> str:
        source = self.tensors[x]
        shape = tuple(count if a == axis else n for a, n in enumerate(source.shape))
        zeros, ones = (0,) * len(shape), (1,) * len(shape)
        from_ = tuple(begin if a == axis else 0 for a in range(len(shape)))
        steps = tuple(step if a == axis else 1 for a in range(len(shape)))
        y = self._tensor(shape, source)
        self.operations.append(QMove(f"slice {y}", "Slice", y, (Piece(x, zeros, shape, from_, steps, ones),)))
        return y

    def pad(self, x: str, axis: int, before: int, after: int) -> str:
        source = self.tensors[x]
        shape = tuple(n + before + after if a == axis else n for a, n in enumerate(source.shape))
        begin = tuple(before if a == axis else 0 for a in range(len(shape)))
        piece = Piece(x, begin, source.shape, (0,) * len(shape), (1,) * len(shape))
        y = self._tensor(shape, source)
        self.operations.append(QMove(f"pad {y}", "Pad", y, (piece,), fill=source.zero_point))
        return y

    def transpose(self, x: str, order: tuple[int, ...]) -> str:
        source = self.tensors[x]
        shape = tuple(source.shape[a] for a in order)
        piece = Piece(x, (0,) * len(shape), shape, (0,) * len(shape), (1,) * len(shape))
        y = self._tensor(shape, source)
        self.operations.append(QMove(f"transpose {y}", "Transpose", y, (piece,), order))
        return y

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        y = self._tensor(shape, self.tensors[x])
        self.operations.append(QReshape(f"reshape {y}", "Reshape", x, y))
        return y

    def _tensor(self, shape: tuple[int, ...], like: QTensor | None = None, signed: bool = True) -> str:
        name = f"t{len(self.tensors)}"
        if like is not None:
            self.tensors[name] = QTensor(name, shape, like.scale, like.zero_point, like.signed)
            return name
        zero = int(self.rng.integers(-20, 20)) if signed else int(self.rng.integers(0, 200))
        scale = float(np.float32(self.rng.uniform(0.01, 0.1)))
        self.tensors[name] = QTensor(name, shape, scale, zero, signed)
        return name


def residual_network(seed: int, batch: int, channels: int, size: int) -> QuantizedGraph:
    """Chains, sums on the way out and on the vector unit, a table, pools, moves, a product, a linear layer."""
    n = Network(seed, (batch, 3, size, size))
    pads = (1,) * 4
    stem = n.table(n.conv(n.input, channels, (3, 3), pads=pads))
    inner = n.conv(n.conv(stem, 5, (1, 1), bias=False), channels, (3, 3), pads=pads)
    first = n.sum(inner, stem) if seed % 2 else n.sum(stem, inner)
    down = n.conv(first, 2 * channels, (3, 3), strides=(2, 2), pads=pads)
    short = n.pad(
        n.slice(n.slice(first, 2, 0, -(-size // 2), 2), 3, 0, -(-size // 2), 2), 1, channels // 2, -(-channels // 2)
    )
    second = n.table(n.sum(down, short))
    wide = n.conv(second, 2 * channels, (3, 3), pads=pads, groups=2 * channels)
    pooled = n.pool(wide, Pool.MAX, (3, 3), (1, 1), pads)
    gate = n.conv(n.pool(wide, Pool.AVERAGE, tuple(n.tensors[wide].shape[2:]), (1, 1), (0,) * 4), 2 * channels, (1, 1))
    gated = n.product(pooled, gate)
    swapped = n.transpose(n.transpose(gated, (0, 1, 3, 2)), (0, 1, 3, 2))
    mean = n.pool(n.sum(swapped, pooled), Pool.AVERAGE, (2, 2), (2, 2), (0, 0, 1, 1))
    flat = n.reshape(mean, (batch, prod(n.tensors[mean].shape[1:])))
    y = n.conv(n.conv(flat, 7, ()), 10, (), bias=False)
    return n.graph(y, second)
