"""Instruments for the pass manager: numbered IR dumps, timing, and a numeric check on given inputs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.core.reference import relative_l2
from passes.errors import UsageError, VerificationError
from passes.graph import Graph
from passes.manager import Instrument, Pass, PassResult

_DUMP_NAME = re.compile(r"\d{2,}-[a-z0-9-]+\.txt")


class DumpIR(Instrument):
    """Writes the listing before the first pass and after each one: 00-input.txt, 01-fold-batchnorm.txt, ...

    One instance numbers through all pipelines that it is hung on. Dumps of an earlier run in the same folder are
    removed first, so that the folder never mixes two runs. Raises UsageError where the folder cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._written = 0

    def begin(self, graph: Graph) -> None:
        if self._written:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _DUMP_NAME.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise UsageError(f"cannot dump the IR into {self.directory}: {error.strerror}") from error
        self._write("input", graph)

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        self._write(step.name, graph)

    def _write(self, name: str, graph: Graph) -> None:
        path = self.directory / f"{self._written:02d}-{name}.txt"
        try:
            path.write_text(graph.to_text().rstrip("\n") + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        self._written += 1


class Timing(Instrument):
    """Seconds per pass in ``rows``, its verification included."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float]] = []
        self._started = 0.0

    def before(self, step: Pass, graph: Graph) -> None:
        self._started = time.perf_counter()

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        self.rows.append((step.name, time.perf_counter() - self._started))


class NumericCheck(Instrument):
    """Runs ``feeds`` before and after each pass and bounds the relative L2 change of every output by ``tolerance``.

    The reference is the network that the pass met, in the format's own runtime. ``rows`` keeps (pass, largest relative
    L2). Raises VerificationError beyond the tolerance, on values that became non-finite, and on changed output shapes.
    """

    def __init__(self, feeds: Sequence[Mapping[str, NDArray[Any]]], tolerance: float) -> None:
        if not feeds:
            raise UsageError("a numeric check needs at least one set of inputs")
        if not 0 <= tolerance < 1:
            raise UsageError(f"the tolerance of a numeric check is a relative L2 between 0 and 1, not {tolerance}")
        self.feeds = feeds
        self.tolerance = tolerance
        self.rows: list[tuple[str, float]] = []
        self._reference: list[list[NDArray[Any]]] = []

    def begin(self, graph: Graph) -> None:
        self._reference = [graph.run(feed) for feed in self.feeds]

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        if not result.modified:
            self.rows.append((step.name, 0.0))
            return
        names = [spec.name for spec in graph.outputs]
        found = [graph.run(feed) for feed in self.feeds]
        worst = 0.0
        for olds, news in zip(self._reference, found, strict=True):
            for name, old, new in zip(names, olds, news, strict=True):
                worst = max(worst, self._compare(name, old, new))
        self._reference = found
        self.rows.append((step.name, worst))

    def _compare(self, name: str, old: NDArray[Any], new: NDArray[Any]) -> float:
        if old.shape != new.shape:
            raise VerificationError(f"output {name} went from shape {old.shape} to {new.shape}")
        if not np.array_equal(np.isfinite(old), np.isfinite(new)):
            raise VerificationError(f"output {name} is finite in other places than before")
        finite = np.isfinite(old)
        change = relative_l2(new[finite], old[finite])
        if change > self.tolerance:
            raise VerificationError(
                f"output {name} moved by a relative L2 of {change:.3g}, at most {self.tolerance:.3g} was allowed"
            )
        return change
