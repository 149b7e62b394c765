"""Where header and section table of a container lie, for tests that forge them."""

from __future__ import annotations

from accel_sim.program.container import SECTIONS

HEADER, ENTRY = 128, 32
TABLE_END = HEADER + len(SECTIONS) * ENTRY
