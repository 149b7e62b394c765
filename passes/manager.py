"""Passes and the manager that runs and verifies them.

After each pass the manager checks what no pass may break: the network is valid by its format's own checker, its inputs
and outputs are what they were, and a pass that says it changed nothing has changed nothing. Dumps, timing and numeric
checks hang on :class:`Instrument` (see passes/instruments.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from passes.errors import RankcError, VerificationError
from passes.graph import Graph, Note, TensorSpec


@dataclass(frozen=True)
class PassResult:
    """``notes``: what was done and what was refused, node by node."""

    modified: bool
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a network. Fields are options; nothing is kept between runs. ``name`` is kebab-case and unique."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, graph: Graph) -> PassResult:
        """Rewrites ``graph`` in place. A second run finds nothing left to do."""


class Instrument:
    """Callbacks around passes; each does nothing by itself. An exception stops the pipeline and names the pass."""

    def begin(self, graph: Graph) -> None:
        """Before the first pass."""

    def before(self, step: Pass, graph: Graph) -> None:
        """Before each pass."""

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        """After each pass, once the network is known to be valid."""


@dataclass(frozen=True)
class PipelineResult:
    """What each pass did, in order."""

    outcomes: tuple[tuple[Pass, PassResult], ...] = ()

    @property
    def modified(self) -> bool:
        return any(result.modified for _, result in self.outcomes)

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(note for _, result in self.outcomes for note in result.notes)


@dataclass(frozen=True)
class PassManager:
    """Runs ``passes`` in order on one network."""

    passes: Sequence[Pass]
    instruments: Sequence[Instrument] = ()

    def run(self, graph: Graph) -> PipelineResult:
        """Rewrites ``graph`` in place.

        Raises VerificationError when a pass leaves an invalid network, changes inputs or outputs, or reports that it
        modified nothing and did. Every error of this package names the pass and those that ran before it.
        """
        inputs, outputs = graph.inputs, graph.outputs
        for instrument in self.instruments:
            instrument.begin(graph)
        outcomes: list[tuple[Pass, PassResult]] = []
        text = graph.to_text()
        for step in self.passes:
            with _named(step, outcomes):
                for instrument in self.instruments:
                    instrument.before(step, graph)
                result = step.run(graph)
                graph.check()
                _check_interface("inputs", inputs, graph.inputs)
                _check_interface("outputs", outputs, graph.outputs)
                before, text = text, graph.to_text()
                if not result.modified and text != before:
                    raise VerificationError(f"reports no change, but {_first_difference(before, text)}")
                for instrument in self.instruments:
                    instrument.after(step, graph, result)
            outcomes.append((step, result))
        return PipelineResult(tuple(outcomes))


@contextmanager
def _named(step: Pass, outcomes: Sequence[tuple[Pass, PassResult]]) -> Iterator[None]:
    """Puts the pass and those before it in front of the message; foreign exceptions get it as a note."""
    past = ", ".join(done.name for done, _ in outcomes)
    where = f"pass {step.name} ({f'after {past}' if past else 'the first pass'})"
    try:
        yield
    except RankcError as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"in {where}")
        raise


def _check_interface(what: str, expected: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> None:
    if expected == found:
        return
    for old, new in zip(expected, found, strict=False):
        if old != new:
            raise VerificationError(f"{what} changed: {_describe(old)} became {_describe(new)}")
    raise VerificationError(f"{what} changed: {len(expected)} became {len(found)}")


def _describe(spec: TensorSpec) -> str:
    shape = ", ".join("?" if size is None else str(size) for size in spec.shape)
    return f"{spec.name} {spec.dtype}[{shape}]"


def _first_difference(before: str, after: str) -> str:
    old, new = before.splitlines(), after.splitlines()
    for number, (a, b) in enumerate(zip(old, new, strict=False), 1):
        if a != b:
            return f"line {number} of the listing went from {a.strip()!r} to {b.strip()!r}"
    return f"the listing went from {len(old)} to {len(new)} lines"
