"""A measuring process whose kernels do as their schedules say: the double of the one that builds with TVM."""

from __future__ import annotations

import os
import signal
import sys
import time

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.serving import Builder, Kernel, serve
from codegen.tune.workload import Workload


class ScriptedKernel:
    def __init__(self, schedule: Schedule) -> None:
        self._params = dict(schedule.params)

    def output_error(self) -> float:
        return {"wrong": 0.5, "nan": float("nan")}.get(str(self._params.get("does")), 1e-7)

    def time(self, calls: int) -> list[float]:
        if self._params.get("does") == "hang":
            time.sleep(1000)
        # A clock that ticks for a busy machine: the first call is the slowest.
        return [float(self._params["ns"]) * 1e-9 * (1 + 1 / (call + 1)) for call in range(calls)]


def start(device: Device) -> Builder:
    if device.model == "unknown":
        raise ModuleNotFoundError("there is no compiler for it")

    def build(workload: Workload, schedule: Schedule) -> Kernel:
        match dict(schedule.params).get("does"):
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                print("a message\nthe last words", file=sys.stderr)
                os._exit(3)
            case "raise":
                raise ValueError("frames of the compiler\nloop of 7 does not divide 16")
            case "slow build":
                time.sleep(1000)
            case "garbage":
                os.write(3, b"@@@\n")
            case "print":
                os.write(1, b"a library's own output\n")
            case "log":
                with open(str(dict(schedule.params)["file"]), "a", encoding="utf-8") as log:
                    log.write(f"{os.getpid()}\n")
            case _:
                pass
        return ScriptedKernel(schedule)

    return build


if __name__ == "__main__":
    serve(start)
