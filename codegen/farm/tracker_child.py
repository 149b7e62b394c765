"""The tracker's process: ``python -m codegen.farm.tracker_child REQUEST``, where REQUEST is JSON.

It answers one line, ``{"port": ...}`` or ``{"error": ...}``, and tracks until it is killed.
"""

from __future__ import annotations

import json
import logging
import sys

from codegen.child_process import end_with_parent
from codegen.farm.listening import bound


def main(text: str) -> None:
    end_with_parent()
    request = json.loads(text)
    try:
        listening = bound(request["host"], request["ports"])
    except OSError as error:
        print(json.dumps({"error": error.strerror or str(error)}), flush=True)
        return
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi would load it for interchange
    from tvm.rpc import base, tracker

    # Logs each connection that is closed in mid-message, as that of a killed client is.
    tracker.logger.setLevel(logging.ERROR)
    print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
    # What tvm.rpc.Tracker runs in a process that it does not always end.
    tracker._tracker_server(listening, base.random_key("tracker"))


if __name__ == "__main__":
    main(sys.argv[1])
