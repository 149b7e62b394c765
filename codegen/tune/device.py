"""What a kernel is compiled for, and what its times are kept under."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Device:
    """A processor as the code generator and the database see it.

    ``target``: TVM's target as JSON values, such as ``{"kind": "llvm", "mcpu": "znver4", "num-cores": 1}``.
    ``model``: the processor's own name; the same code runs at another speed on another one. ``threads``: cores that a
    kernel is compiled for and measured on. ``vector_bits`` and ``vector_registers`` of the instruction set.
    """

    target: dict[str, Any] = field(hash=False)
    model: str
    threads: int
    vector_bits: int
    vector_registers: int

    @property
    def key(self) -> str:
        """Names the device in the database."""
        return f"{self.model}; {json.dumps(self.target, sort_keys=True)}; {self.threads} threads"

    @property
    def lanes(self) -> int:
        """float32 values of a vector."""
        return self.vector_bits // 32
