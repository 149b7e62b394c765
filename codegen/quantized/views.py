"""What the frontend knows of a tensor of the ONNX network while it walks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Refusal(Exception):
    """Why a node is left to the host; the message is a sentence without subject for a person."""


@dataclass(frozen=True)
class View:
    """A tensor that is a function of one byte tensor, element by element.

    ``nodes``: indices of the nodes that compute it from the bytes: DequantizeLinear, functions of one element, and
    moves, which ``tensor`` has already been through. ``floating``: dequantized, or else the bytes themselves.
    """

    tensor: str
    nodes: tuple[int, ...] = ()
    floating: bool = False

    def then(self, index: int, tensor: str | None = None) -> View:
        nodes = self.nodes if index in self.nodes else (*self.nodes, index)
        return View(tensor or self.tensor, nodes, self.floating)


@dataclass(frozen=True, eq=False)
class QuantizedConstant:
    """Integers behind DequantizeLinear: ``scale * (values - zero)``. ``axis`` is None for one scale."""

    values: Array
    scale: NDArray[np.float32]
    zero: Array
    axis: int | None


@dataclass(frozen=True)
class Scaling:
    """Scale, zero point and signedness of bytes."""

    scale: float
    zero: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        return (-128, 127) if self.signed else (0, 255)

    def byte(self, value: float) -> int:
        """What QuantizeLinear makes of ``value``."""
        low, high = self.limits
        quotient = float(np.rint(np.float32(value) / np.float32(self.scale))) if np.isfinite(value) else value
        return int(min(max(quotient + self.zero, low), high))


@dataclass(frozen=True)
class Tail:
    """What follows a node up to its bytes: clamps, then QuantizeLinear nodes of one scaling.

    ``low`` and ``high`` are the clamps in bytes. ``nodes`` are the names of all of them.
    """

    scaling: Scaling
    low: int
    high: int
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def clamps(self) -> bool:
        return (self.low, self.high) != self.scaling.limits
