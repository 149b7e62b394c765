"""What a measurer keeps from one run to the next: its processes, its rules, and what it knows of the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from codegen.farm.address import Address
from codegen.farm.lane import Builder, Lane
from codegen.farm.roster import Roster


@dataclass(frozen=True)
class Rules:
    """``tries`` of a task on devices before it fails. ``deadline_s``: of one try. ``build_s``: of a build.

    ``lease_s``: of a session, of at most ``jobs`` tasks. ``patience_s``: for which there may be no device.
    """

    tries: int = 3
    deadline_s: float = 20.0
    build_s: float = 60.0
    lease_s: float = 60.0
    jobs: int = 8
    patience_s: float = 90.0

    @property
    def look_s(self) -> float:
        """What a look at the reference kernel may take."""
        return self.deadline_s / 2


@dataclass
class Pool:
    """What lasts from one run to the next: the tracker's address, processes, what is known of devices.

    ``reference``: library and arguments of the reference kernel. ``tell`` takes a line for each device given up.
    """

    tracker: Address
    key: str
    kind: str
    rules: Rules
    roster: Roster
    new_builder: Callable[[], Builder]
    most_builders: int
    tell: Callable[[str], None]
    reference: Mapping[str, Any] | None = None
    lanes: list[Lane] = field(default_factory=list)
    builders: list[Builder] = field(default_factory=list)
    retries: int = 0
    seen: bool = False

    def close(self) -> None:
        for lane in self.lanes:
            lane.kill()
        for builder in self.builders:
            builder.process.kill()
        self.lanes.clear()
        self.builders.clear()
