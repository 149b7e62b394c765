"""A trial as the database keeps it, and the line of text that it is there."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from codegen.tune.measuring import Timing
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload

SCHEMA = 1
FORMAT = "rankc tuning database"
_HEADER, _TRIAL = "database", "trial"
_LONGEST_HEADER_BYTES = 200


@dataclass(frozen=True)
class Record:
    """One trial. ``workload`` and ``device`` are keys; ``versions`` names the code that built the kernel.

    ``seconds`` is the minimum of ``repeats`` single calls, None where the trial failed and ``error`` says why.
    ``where``: the process or device that measured; ``time``: seconds since 1970.
    """

    workload: str
    device: str
    versions: str
    schedule: Schedule
    seconds: float | None
    p10: float | None
    median: float | None
    repeats: int
    error: str
    where: str
    time: float

    @classmethod
    def of(cls, timing: Timing, device: str, versions: str, time: float) -> Self:
        job = timing.job
        return cls(
            job.workload.key,
            device,
            versions,
            job.schedule,
            timing.seconds,
            timing.p10,
            timing.median,
            job.repeats,
            timing.error,
            timing.where,
            time,
        )

    @property
    def key(self) -> tuple[str, str, str]:
        """What the database finds it by."""
        return self.workload, self.device, self.versions

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "schedule": self.schedule.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """KeyError, TypeError or ValueError where ``value`` is no record. Unknown names are left out."""
        texts = {name: _text(value[name]) for name in ("workload", "device", "versions", "error", "where")}
        Workload.parse(texts["workload"])
        seconds, p10, median = (_seconds(value[name]) for name in ("seconds", "p10", "median"))
        if (seconds is None) != bool(texts["error"]):
            raise ValueError("a trial has either a time or an error")
        if isinstance(value["repeats"], bool) or not isinstance(value["repeats"], int):
            raise TypeError("repeats is no whole number")
        time = float(value["time"])
        schedule = Schedule.from_json(value["schedule"])
        return cls(
            schedule=schedule, seconds=seconds, p10=p10, median=median, repeats=value["repeats"], time=time, **texts
        )


@dataclass(frozen=True)
class Header:
    """A database's first line. ``id`` is another one for every file that was ever written under a name."""

    schema: int
    id: str

    def to_line(self) -> bytes:
        return _line(_HEADER, {"format": FORMAT, "schema": self.schema, "id": self.id})

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """ValueError for a line, without its newline, that begins no database."""
        try:
            value = _value(_HEADER, line)
            if value["format"] != FORMAT:
                raise ValueError(f"no {FORMAT}")
            return cls(int(value["schema"]), _text(value["id"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no {FORMAT}: {error}") from error


def begins_header(data: bytes) -> bool:
    """True for what a writer leaves that was killed before its first line was whole."""
    return len(data) < _LONGEST_HEADER_BYTES and data[:10] == b'{"crc32":"'[: len(data)]


def to_line(record: Record) -> bytes:
    """The record's line, newline included; no newline stands inside it."""
    return _line(_TRIAL, record.to_json())


def from_line(line: bytes) -> Record:
    """The record of a line without its newline. ValueError where it is damaged or holds none."""
    try:
        return Record.from_json(_value(_TRIAL, line))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no record: {error}") from error


def _line(kind: str, value: Mapping[str, Any]) -> bytes:
    # The checksum is that of the bytes as they stand in the line, so that nothing depends on how JSON is written.
    body = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    return b'{"crc32":"%08x","%s":%s}\n' % (zlib.crc32(body), kind.encode(), body)


def _value(kind: str, line: bytes) -> dict[str, Any]:
    lead = b'{"crc32":"%s","%s":' % (line[10:18], kind.encode())
    if not line.startswith(lead) or not line.endswith(b"}"):
        raise ValueError(f"no line of a {kind}")
    body = line[len(lead) : -1]
    if line[10:18] != b"%08x" % zlib.crc32(body):
        raise ValueError("its checksum does not fit")
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError(f"no {kind}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    seconds = float(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{value!r} is no time")
    return seconds
