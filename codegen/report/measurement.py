"""What a report says of a binary that was timed: on what, by how many calls, against what, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """One program of the run in which all were timed in turns. Seconds of a single call; ``calls`` were timed.

    ``ratio``: its latency over that of the network as it came, compiled and tuned the same way, and the interval that
    holds this ratio with the report's confidence; None for that network itself.
    """

    name: str
    seconds: float
    p10: float
    median: float
    calls: int
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MeasurementReport:
    """A tuned binary, measured whole.

    ``device``: the processor's own name. ``database``: the file of trials; ``trials`` were
    made in this run, ``failed`` of them without a time, and the schedules of ``from_database`` layers' kernels were
    taken from it without a trial. ``predicted_s``: the sum over the kernels' own times. ``untuned``: kernels of the
    binary that have a default schedule, since none was tuned for them. ``notes``: what the compiler was to do for the
    binary and did not.
    """

    device: str
    threads: int
    confidence: float
    contenders: tuple[Contender, ...]
    predicted_s: float
    database: str
    trials: int
    failed: int
    from_database: int
    untuned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
