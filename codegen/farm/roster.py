"""What is known of each device of a farm, and whether to believe it.

A device is judged by a reference kernel, whose output is known and whose time must not change: at the beginning and the
end of each session. Three things cannot be true of an honest device of its key:

- Its output differs from the one computed here.
- It reports more time than passed here while it ran, or much less: a device's clock is checked against ours.
- It is far slower or faster than the others of its key, or than it was itself.

What disturbs a device passes, so a suspicious time is looked at again, over more calls each time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

_LONGER_THAN_IT_TOOK = 1.1


@dataclass(frozen=True)
class Limits:
    """What is borne. ``output_error``: largest difference relative to the largest value. ``apart``: ratio of reference
    times. ``clock``: ratio of the time that passed here to the time reported. ``looks``: at a suspicious time before it
    is believed. ``failures``: sessions lost in a row, or jobs that failed here and went well elsewhere, before the
    device rests; ``rest_s``: for how long, twice as long each time.
    """

    output_error: float = 1e-3
    apart: float = 2.0
    clock: float = 1.5
    looks: int = 4
    failures: int = 3
    rest_s: float = 30.0


@dataclass(frozen=True)
class Look:
    """One measurement of the reference kernel: times that the device reported, and ``wall_s`` that passed here
    meanwhile, the way of the request (``round_trip_s``) included."""

    samples: Sequence[float]
    wall_s: float
    round_trip_s: float
    output_error: float


@dataclass(frozen=True)
class DeviceReport:
    """``reference_s``: the least time of the reference kernel. ``failures``: sessions lost and jobs not done in time.

    ``dropped``: why it is used no more, or not now; empty where it is. ``failed``: the last failure.
    """

    name: str
    jobs: int
    failures: int
    reference_s: float | None
    dropped: str = ""
    failed: str = ""

    def __str__(self) -> str:
        parts = [f"device {self.name}: {self.jobs} jobs"]
        if self.reference_s is not None:
            parts.append(f"the reference kernel takes {_us(self.reference_s)}")
        if self.failures:
            parts.append(f"{self.failures} failures, the last: {self.failed}")
        if self.dropped:
            parts.append(f"not used any more: {self.dropped}")
        return ", ".join(parts)


@dataclass
class _Device:
    name: str
    jobs: int = 0
    failures: int = 0
    failed: str = ""
    dropped: str = ""
    gone: bool = False
    rests_until: float = 0.0
    rests: int = 0
    lost: int = 0
    outdone: int = 0
    reference_s: float | None = None
    latest_s: float | None = None
    series: list[float] = field(default_factory=list)


class Roster:
    """Devices by name. Times are those of one monotonic clock."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._devices: dict[str, _Device] = {}

    def usable(self, name: str, now: float) -> bool:
        """False for a device that lied, and for one that rests."""
        device = self._devices.get(name)
        return device is None or (not device.dropped and device.rests_until <= now)

    def present(self, names: Collection[str]) -> None:
        """Those that the tracker has."""
        for device in self._devices.values():
            device.gone = device.name not in names

    def done(self, name: str, jobs: int) -> None:
        self._device(name).jobs += jobs

    def failed(self, name: str, reason: str, now: float) -> None:
        """A session was lost or a job was not done in time. That may be the job's fault: a good look clears it."""
        device = self._device(name)
        device.failures += 1
        device.failed = reason
        device.lost += 1
        device.series.clear()
        if device.lost >= self.limits.failures:
            self._rest(device, now)

    def outdone(self, name: str, now: float) -> None:
        """A job that failed on this device went well on another: that was not the job's fault."""
        device = self._device(name)
        device.outdone += 1
        if device.outdone >= self.limits.failures:
            self._rest(device, now)

    def judge(self, name: str, look: Look, now: float) -> str | None:
        """A look at the reference kernel: "" if the device is to be believed, None for another look, else why not.

        A device that is not believed is not usable any more; one that is merely unsteady rests.
        """
        device, limits = self._device(name), self.limits
        device.series.append(min(look.samples))
        last = len(device.series) >= limits.looks
        if not look.output_error <= limits.output_error:  # nan is none
            return self._drop(device, f"its outputs are wrong: by {look.output_error:.2g} of the largest value")
        reported = sum(look.samples)
        said = f"it reports {1e3 * reported:.3g} ms for calls that took {1e3 * look.wall_s:.3g} ms"
        if reported > _LONGER_THAN_IT_TOOK * look.wall_s:
            return self._drop(device, f"its times are wrong: {said}")
        if look.wall_s - look.round_trip_s > limits.clock * reported:
            return self._drop(device, f"its times are wrong: {said}") if last else None
        now_s = min(device.series)
        if device.latest_s is not None and not _near(now_s, device.latest_s, limits.apart):
            if not last:
                return None
            unsteady = f"unsteady: the reference kernel took {_us(device.latest_s)}, and now takes {_us(now_s)}"
            device.failures += 1
            device.failed = unsteady
            device.latest_s = None
            self._rest(device, now)
            return unsteady
        if (reason := self._unlike(device, now_s)) is not None:
            return self._drop(device, reason) if last else None
        device.series.clear()
        device.lost = 0
        device.latest_s = now_s
        device.reference_s = min(now_s, device.reference_s or now_s)
        return ""

    def report(self, now: float) -> tuple[DeviceReport, ...]:
        return tuple(
            DeviceReport(d.name, d.jobs, d.failures, d.reference_s, _why_not(d, now), d.failed)
            for d in sorted(self._devices.values(), key=lambda device: device.name)
        )

    def describe(self) -> str:
        """Every device and what became of it, for an error message."""
        return "; ".join(f"{d.name}: {d.dropped or d.failed or 'nothing wrong'}" for d in self._devices.values())

    def _device(self, name: str) -> _Device:
        return self._devices.setdefault(name, _Device(name))

    def _unlike(self, device: _Device, now_s: float) -> str | None:
        """With several others, their median counts. Of two, the slower is the one that something slows down."""
        others = [d.reference_s for d in self._devices.values() if d is not device and d.reference_s and not d.dropped]
        if not others:
            return None
        usual = median(others)
        if now_s > self.limits.apart * usual or (len(others) > 1 and self.limits.apart * now_s < usual):
            of = "the other device" if len(others) == 1 else f"the median of {len(others)} others"
            return f"unlike the others of its key: the reference kernel takes {_us(now_s)}, {of} {_us(usual)}"
        return None

    def _drop(self, device: _Device, reason: str) -> str:
        device.dropped = reason
        return reason

    def _rest(self, device: _Device, now: float) -> None:
        device.rests_until = now + self.limits.rest_s * 2**device.rests
        device.rests += 1
        device.lost = device.outdone = 0
        device.series.clear()


def doubt(answer: Mapping[str, Any], largest_error: float) -> str:
    """Why a device's answer cannot be right, if the device is; empty where nothing speaks against it."""
    if "samples" not in answer or "wall_s" not in answer:
        return ""
    samples = answer["samples"]
    if not samples or not min(samples) > 0:
        return "a call took no time"
    if sum(samples) > _LONGER_THAN_IT_TOOK * answer["wall_s"]:
        return "its calls took longer than the time that passed"
    error = answer["output_error"]
    if not error <= largest_error:
        return f"it computes something else: the output differs by {error:.2g} of its largest value"
    return ""


def _why_not(device: _Device, now: float) -> str:
    if device.dropped:
        return device.dropped
    state = "rests" if device.rests_until > now else "gone" if device.gone else ""
    return f"{state}: {device.failed}" if state and device.failed else state


def _near(a: float, b: float, factor: float) -> bool:
    return max(a, b) <= factor * min(a, b)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.4g} us"
