"""What happened, to be looked at: Chrome's trace format (chrome://tracing, Perfetto) and a timeline picture's data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.counts import LayerRun
from accel_sim.engine.timing import Schedule
from accel_sim.program.isa import Host, Program, Queue, Vector

TRACKS = ("layers", "load", "execute", "store", "channel", "host")
"""Tracks of a trace, from the top; ``store`` holds the stores into the scratchpad too."""


@dataclass(frozen=True)
class Span:
    """Cycles ``begin`` to ``end`` of a track; ``first`` and ``last``: instructions, -1 for layers."""

    track: str
    name: str
    begin: int
    end: int
    first: int = -1
    last: int = -1


def spans(program: Program, times: Schedule, layers: tuple[LayerRun, ...]) -> Iterator[Span]:
    """All that a trace shows, track by track.

    A load or store lasts from its request to its end, in as many pieces as there are reasons: it waits for the
    channel, then for the first byte, then its data move. On the channel's own track there are data alone.
    """
    for layer in layers:
        yield Span("layers", layer.name or f"layer {layer.marker}", layer.begin, layer.begin + layer.cycles)
    columns = times.columns
    for queue in Queue:
        part = columns.items[queue]
        track = queue.name.lower()
        rows = zip(
            part.first.tolist(),
            part.last.tolist(),
            part.cycles.tolist(),
            part.local.tolist(),
            times.requested[queue].tolist(),
            times.started[queue].tolist(),
            strict=True,
        )
        for first, last, cycles, local, asked, started in rows:
            if queue == Queue.EXECUTE:
                yield Span(track, _name(program, first), started, started + cycles, first, last)
            elif local:
                yield Span(track, "to scratchpad", started, started + cycles, first, last)
            elif cycles:
                served = started + times.latency_cycles
                for name, begin, end in (("waits", asked, started), ("latency", started, served)):
                    if end > begin:
                        yield Span(track, name, begin, end, first, last)
                yield Span(track, track, served, served + cycles, first, last)
                yield Span("channel", track, served, served + cycles, first, last)
    for segment, at in enumerate(columns.barriers.tolist()):
        barrier = program.code[at]
        if isinstance(barrier, Host):
            now = int(times.barriers[segment])
            yield Span("host", program.calls[barrier.call].name, now, now, at, at)


def _name(program: Program, index: int) -> str:
    instruction = program.code[index]
    if isinstance(instruction, Vector):
        return program.vectors[instruction.spec].function.name.lower()
    return type(instruction).__name__.lower()


def chrome_trace(program: Program, times: Schedule, layers: tuple[LayerRun, ...], clock_mhz: float) -> str:
    """The run as JSON in Chrome's trace event format; times in microseconds of the machine's clock.

    One track per queue, one for the channel, the layers and the host. Pieces of requests that overlap each other on a
    queue's track are asynchronous events, so that none is hidden.
    """
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "accelerator"}}]
    for at, track in enumerate(TRACKS):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": at, "args": {"name": track}})
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": at, "args": {"sort_index": at}})
    for span in spans(program, times, layers):
        event: dict[str, Any] = {
            "name": span.name,
            "cat": span.track,
            "pid": 0,
            "tid": TRACKS.index(span.track),
            "ts": span.begin / clock_mhz,
            "args": {"begin_cycles": span.begin, "end_cycles": span.end},
        }
        if span.first >= 0:
            event["args"]["instructions"] = [span.first, span.last]
        if span.track in ("load", "store"):
            identity = {"id": span.first, "cat": span.track}
            events.append({**event, **identity, "ph": "b"})
            closing = {"name": span.name, "pid": 0, "tid": event["tid"], "ts": span.end / clock_mhz}
            events.append({**closing, **identity, "ph": "e"})
        elif span.begin == span.end and span.track == "host":
            events.append({**event, "ph": "i", "s": "p"})
        else:
            events.append({**event, "ph": "X", "dur": (span.end - span.begin) / clock_mhz})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}, separators=(",", ":"))


@dataclass(frozen=True)
class Timeline:
    """How busy each track is: ``busy`` (tracks, bins) between 0 and 1, for ``edges`` (bins + 1,) in cycles.

    ``tracks``: load and store (their data on the channel), array, vector, to scratchpad. ``layers``: name, begin, end.
    """

    tracks: tuple[str, ...]
    edges: NDArray[np.float64]
    busy: NDArray[np.float64]
    layers: tuple[tuple[str, int, int], ...]


def timeline(program: Program, times: Schedule, layers: tuple[LayerRun, ...], bins: int = 400) -> Timeline:
    """The data of a picture of the run, however long it is: what share of each of ``bins`` equal pieces is busy."""
    columns = times.columns
    edges = np.linspace(0, times.cycles, bins + 1)
    load, execute, store = (columns.items[queue] for queue in Queue)
    vector = np.array([isinstance(program.code[at], Vector) for at in execute.first.tolist()], np.bool_)
    parts = (
        (load.cycles, times.started[0] + times.latency_cycles, ~load.local),
        (store.cycles, times.started[2] + times.latency_cycles, ~store.local),
        (execute.cycles, times.started[1], ~vector),
        (execute.cycles, times.started[1], vector),
        (store.cycles, times.started[2], store.local),
    )
    busy = np.zeros((len(parts), bins))
    if times.cycles:
        for row, (cycles, begin, chosen) in zip(busy, parts, strict=True):
            worked = chosen & (cycles > 0)
            row[:] = _busy_share(edges, begin[worked], cycles[worked])
    names = tuple((layer.name or f"layer {layer.marker}", layer.begin, layer.begin + layer.cycles) for layer in layers)
    return Timeline(("load", "store", "array", "vector", "to scratchpad"), edges, busy, names)


def _busy_share(edges: NDArray[np.float64], begin: NDArray[np.int64], cycles: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each bin that intervals, in order and disjoint, cover."""
    ends = np.cumsum(cycles)
    points = np.stack([begin, begin + cycles], axis=1).reshape(-1)
    covered = np.stack([ends - cycles, ends], axis=1).reshape(-1)
    if not len(points):
        return np.zeros(len(edges) - 1)
    return np.asarray(np.diff(np.interp(edges, points, covered)) / np.diff(edges), np.float64)
