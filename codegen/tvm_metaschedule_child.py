"""The process that draws from MetaSchedule's spaces: ``python -m codegen.tvm_metaschedule_child SETUP``.

:mod:`codegen.tune.metaschedule` starts it. A line of JSON asks for schedules of a workload, another one has them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from codegen.child_process import end_with_parent
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload


def main(setup: str) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # the search reports to stdout
    given = json.loads(setup)
    device = Device(**given["device"])
    from codegen.tvm_metaschedule import draw

    for line in sys.stdin:
        request = json.loads(line)
        known = [(Schedule.from_json(schedule), float(seconds)) for schedule, seconds in request["known"]]
        try:
            drawn = draw(
                Workload.parse(request["workload"]),
                device,
                known,
                request["count"],
                evolutionary=given["evolutionary"],
                seed=request["seed"],
            )
            answer: dict[str, Any] = {"schedules": [schedule.to_json() for schedule in drawn]}
        except Exception as error:  # TVM's errors have no common base
            lines = [part.strip() for part in str(error).splitlines() if part.strip()]
            answer = {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
