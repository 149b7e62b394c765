"""The target ``cpu``: this host, or a processor to compile for; prices are times of tuned kernels, the binary is timed.

``cpu``, ``cpu:threads=2``, ``cpu:mcpu=znver3``, ``cpu:mtriple=aarch64-linux-gnu,mcpu=cortex-a72``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from codegen.cpu_device import device_for, runs_here
from codegen.cpu_emission import CpuEmitter
from codegen.cpu_latency import CpuLatency
from codegen.cpu_trials import DeviceTrials, measurer_of
from codegen.refinement import TUNING_EFFORTS
from codegen.report.build import tool_versions
from codegen.target import Target
from codegen.tune import spaces
from codegen.tune.database import Database, default_path
from codegen.tune.device import Device
from codegen.tune.options import TuningOptions
from codegen.tune.proposals import TemplateProposer
from codegen.tune.tuner import Stopping
from codegen.tune.versions import versions_key
from codegen.tvm_versions import check_tvm
from passes.core.cost import METRICS


class CpuTarget:
    """Makes targets of what the options describe; without any it is this host."""

    name = "cpu"

    def make(self, written: str, options: Mapping[str, str]) -> Target:
        check_tvm()
        # The user's database is opened when a price is asked for: a run may name another one.
        return _target(written, device_for(options), TuningOptions(), lambda: Database(default_path()))


def cpu_target(written: str, device: Device, options: TuningOptions) -> Target:
    """The target of ``device`` with the trials that ``options`` name.

    Trials are made here where the host runs the device's code, or on a farm where one is given; elsewhere prices are
    those of the database and estimates, and nothing is measured. InputError for a database that cannot be used.
    """
    database = Database(options.database or default_path())
    return _target(written, device, options, lambda: database)


def _target(written: str, device: Device, options: TuningOptions, open_database: Callable[[], Database]) -> Target:
    effort = TUNING_EFFORTS[options.effort]
    stopping = Stopping(options.trials or effort.trials)
    thorough = options.trials is not None or options.effort == "extensive"
    measurer = measurer_of(device, options)
    proposer = TemplateProposer(device, spaces)
    trials = DeviceTrials(open_database, device, measurer, proposer, stopping, thorough=thorough)
    prices = CpuLatency(device, trials)
    emitter = CpuEmitter(device, prices, trials, here=runs_here(device))
    return Target(
        name=written,
        spec={"model": device.model, "target": device.target, "threads": device.threads},
        latency=prices,
        emit=emitter,
        clock_hz=None,
        versions={**tool_versions(), "tuning": versions_key()},
        baseline=emitter.baseline,
        metrics=tuple(metric for metric in METRICS if metric != "energy"),
        tuned=lambda chosen: cpu_target(written, device, chosen),
        close=emitter.close,
    )
