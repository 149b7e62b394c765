"""Runs programs on a machine: values and cycles together, events in integer cycles."""

from accel_sim.engine.engine import HostFunction, Result, run
from accel_sim.engine.errors import DeadlockError, HazardError

__all__ = ["DeadlockError", "HazardError", "HostFunction", "Result", "run"]
