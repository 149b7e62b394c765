"""What the pipeline tells whoever watches it: stages with progress, notes, warnings.

The driver only ever calls :class:`Events`; the console, ``-q`` and the tests implement it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Progress inside one stage."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """``n`` more of the stage's total are done; ``note`` names what is worked on."""
        ...


class Events(Protocol):
    """Receiver of everything that happens in a run. Stages may nest."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Progress]:
        """Opens a stage of ``total`` steps; None where the number is not known beforehand."""
        ...

    def note(self, text: str) -> None:
        """Something a reader of the report should know."""
        ...

    def warning(self, text: str) -> None:
        """Something the user should act on."""
        ...


class _NoProgress:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass


class QuietEvents:
    """Says nothing at all (``-q``)."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Progress]:
        yield _NoProgress()

    def note(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass


@dataclass
class _CountedProgress:
    name: str
    inner: Progress
    steps: dict[str, int]

    def advance(self, n: int = 1, note: str = "") -> None:
        self.steps[self.name] = self.steps.get(self.name, 0) + n
        self.inner.advance(n, note)


@dataclass
class RecordingEvents:
    """Keeps what the report wants and passes everything on to ``inner``.

    ``timings``: seconds per stage name, summed over repetitions; a nested stage counts in its parent too.
    ``steps``: how far each stage advanced.
    """

    inner: Events = field(default_factory=QuietEvents)
    timings: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Progress]:
        started = time.perf_counter()
        try:
            with self.inner.stage(name, total) as progress:
                yield _CountedProgress(name, progress, self.steps)
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - started

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.inner.note(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)
        self.inner.warning(text)
