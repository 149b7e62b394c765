"""A device's process: ``python -m codegen.farm.server_child REQUEST``, where REQUEST is JSON.

It answers one line, ``{"port": ...}`` or ``{"error": ...}``, joins the tracker and serves one session after the other,
each in a process that is forked for it. Of libraries it imports NumPy and TVM's runtime: what a device has.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from codegen.child_process import end_with_parent
from codegen.farm.listening import bound

_FAILED_SESSIONS = "exited unsuccessfully"


def main(text: str) -> None:
    end_with_parent()
    # The kernel forgets that wish in a forked process, and a session would work on when its server is killed.
    os.register_at_fork(after_in_child=end_with_parent)
    serve_forever(json.loads(text))


def serve_forever(request: dict[str, Any]) -> None:
    """Serves until it is killed, or the tracker has not been there for a minute."""
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    try:
        listening = bound(request["host"], [request["port"]])
    except OSError as error:
        print(json.dumps({"error": error.strerror or str(error)}), flush=True)
        return
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi would load it for interchange
    from tvm.rpc import server

    server.logger.setLevel(logging.ERROR)
    port = listening.getsockname()[1]
    print(json.dumps({"port": port}), flush=True)
    home = os.getcwd()
    tracker = (request["tracker"][0], int(request["tracker"][1]))
    while True:
        try:
            # What tvm.rpc.Server runs in a process that it does not always end.
            server._listen_loop(listening, port, request["key"], tracker, "", None)
        except RuntimeError as error:
            # TVM's server ends with a session that crashed, as any candidate's code may. Here it goes on.
            if _FAILED_SESSIONS not in str(error):
                raise
            os.chdir(home)


if __name__ == "__main__":
    main(sys.argv[1])
