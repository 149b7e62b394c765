"""The smallest frontend: a straight line of named steps on one tensor, computed by the float64 reference.

It implements passes.graph.Graph on Python lists, so that passes and the manager are tested without any file format, and
so that the contract suite has a second implementation to agree with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from passes.core.cost import OpWork, StageWork
from passes.core.reference import apply_stage
from passes.core.site import Array, Chain, Site, Stage
from passes.errors import VerificationError
from passes.graph import Affine, Note, SiteScan, TensorSpec


@dataclass(frozen=True, eq=False)
class Step:
    """``op``: Layer (``stage``), Affine (``scale``, ``shift``), Relu, Identity, or Dead (nothing reads it).

    ``tensor`` names what it writes, where that is not the step's own name.
    """

    name: str
    op: str
    stage: Stage | None = None
    scale: Array | None = None
    shift: Array | None = None
    tensor: str = ""

    @property
    def output(self) -> str:
        return self.tensor or self.name

    def apply(self, x: Array) -> Array:
        if self.op == "Layer":
            return apply_stage(self.stage, x)
        if self.op == "Affine":
            wide = (-1, *(1,) * (x.ndim - 2))
            return x * self.scale.reshape(wide) + self.shift.reshape(wide)
        return np.maximum(x, 0) if self.op == "Relu" else x

    def text(self) -> str:
        arrays = [self.scale, self.shift]
        arrays += [] if self.stage is None else [self.stage.weight, self.stage.bias]
        state = hashlib.sha256()
        for array in arrays:
            state.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        geometry = "" if self.stage is None else f" {self.stage.geometry}"
        return f"{self.name} {self.op}{geometry} {state.hexdigest()[:12]}"


@dataclass(eq=False)
class SequentialGraph:
    """``shape``: (N, C, *spatial) of the input "x"; the output is "y"."""

    steps: list[Step]
    shape: tuple[int, ...]
    inputs: tuple[TensorSpec, ...] = field(init=False)
    outputs: tuple[TensorSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = (TensorSpec("x", "float64", self.shape),)
        self.outputs = (TensorSpec("y", "float64", self._shapes()[-1]),)

    def _shapes(self) -> list[tuple[int, ...]]:
        shapes = [self.shape]
        for step in self.steps:
            shape = shapes[-1]
            if step.stage is not None and step.op == "Layer":
                spatial = step.stage.geometry.output_spatial(shape[2:]) if step.stage.geometry.ndim else ()
                shape = (shape[0], step.stage.out_channels, *spatial)
            shapes.append(shape)
        return shapes

    def _tensors(self) -> list[str]:
        return ["x", *(step.output for step in self.steps)]

    def _sites(self) -> dict[int, Site]:
        shapes, tensors = self._shapes(), self._tensors()
        return {
            i: Site(s.name, s.op, s.stage, *tensors[i : i + 2], shapes[i], shapes[i + 1], 1, weight_key=s.name)
            for i, s in enumerate(self.steps)
            if s.op == "Layer"
        }

    def _index(self, name: str) -> int:
        return next(i for i, s in enumerate(self.steps) if s.name == name)

    def sites(self) -> SiteScan:
        return SiteScan(tuple(self._sites().values()), ())

    def replace(self, site: Site, chain: Chain) -> None:
        at = self._index(site.name)
        new = [Step(f"{site.name}/{chain.format}_{i}", "Layer", stage) for i, stage in enumerate(chain.stages)]
        new[-1] = replace(new[-1], tensor=site.output)
        self.steps[at : at + 1] = new

    def affines(self) -> tuple[Affine, ...]:
        return tuple(
            Affine(s.name, s.op, site, s.scale, s.shift)
            for i, site in self._sites().items()
            if i + 1 < len(self.steps) and (s := self.steps[i + 1]).op == "Affine"
        )

    def fold(self, affine: Affine, stage: Stage) -> None:
        at = self._index(affine.site.name)
        gone = self.steps.pop(self._index(affine.node))
        self.steps[at] = replace(self.steps[at], stage=stage, tensor=gone.output)

    def adjacent(self) -> tuple[tuple[Site, Site], ...]:
        sites = self._sites()
        return tuple((site, sites[i + 1]) for i, site in sites.items() if i + 1 in sites)

    def merge(self, first: Site, second: Site, stage: Stage) -> None:
        at = self._index(first.name)
        self.steps[at : at + 2] = [Step(second.name, "Layer", stage, tensor=second.output)]

    def drop_identities(self) -> tuple[Note, ...]:
        return self._drop("Identity", "passes its input on")

    def drop_dead_code(self) -> tuple[Note, ...]:
        return self._drop("Dead", "no output depends on it")

    def _drop(self, op: str, reason: str) -> tuple[Note, ...]:
        notes = tuple(Note(s.name, s.op, reason) for s in self.steps if s.op == op)
        self.steps = [s for s in self.steps if s.op != op]
        return notes

    def workload(self) -> tuple[OpWork, ...]:
        shapes, sites, tensors = self._shapes(), self._sites(), self._tensors()
        ops = []
        for i, step in enumerate(self.steps):
            stage, params = None, 0
            if i in sites:
                s = step.stage
                stage = StageWork(
                    s.geometry, s.in_channels, s.out_channels, sites[i].spatial, sites[i].batch, s.bias is not None
                )
                params = s.params
            names = (tensors[i],), (tensors[i + 1],)
            ops.append(OpWork(step.name, step.op, stage, (shapes[i],), (shapes[i + 1],), *names, params, 4 * params))
        return tuple(ops)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        x: Any = np.asarray(feeds["x"], np.float64)
        for step in self.steps:
            x = step.apply(x)
        return [x]

    def check(self) -> None:
        shapes = self._shapes()
        for step, shape in zip(self.steps, shapes, strict=False):
            if step.stage is not None and step.stage.in_channels != shape[1]:
                raise VerificationError(f"{step.name} takes {step.stage.in_channels} channels, gets {shape[1]}")
            if prod(shape) < 1:
                raise VerificationError(f"{step.name} reads an empty tensor")

    def to_text(self) -> str:
        return "\n".join(step.text() for step in self.steps)

    def clone(self) -> SequentialGraph:
        return SequentialGraph(list(self.steps), self.shape)
