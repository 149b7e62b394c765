"""The process that talks to a device: ``python -m codegen.farm.session_child KIND``, KIND being the target's.

It loads TVM's runtime alone. One request is one line, see :mod:`codegen.farm.answering`:

    {"id": 1, "open": {"host": ..., "port": ..., "match_key": ..., "lease_s": ...}}    {"id": 1, "round_trip_s": 2e-4}
    {"id": 2, "time": {"library": path, "arguments": path, "calls": ..., "limit_s": ...}}
        {"id": 2, "samples": [...], "wall_s": ..., "output_error": ...}
    {"id": 3, "network": {"libraries": [paths], "inputs": [1], "given": path, "made": path, "blocks": 4, "calls": 5}}
        {"id": 3, "outputs": [1]}
    {"id": 4, "close": true}                                                           {"id": 4}

An error that came over a connection that works says so: ``"alive": true``.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from codegen.farm.answering import Handler, answer_all, one_line
from codegen.tune.reference import Reference

_WARM_UP_MS = 100
_PING = "tvm.rpc.server.workpath"

Answer = dict[str, Any]


def start() -> Handler:
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi would load it for interchange
    import tvm
    from tvm import rpc
    from tvm.runtime.vm import VirtualMachine

    talk = _Talk(tvm, rpc, VirtualMachine, sys.argv[1])
    return talk.answer


class _Talk:
    def __init__(self, tvm: Any, rpc: Any, machine: Any, kind: str) -> None:
        self._tvm, self._rpc, self._machine, self._kind = tvm, rpc, machine, kind
        self._session: Any = None
        self._files = 0

    def answer(self, request: dict[str, Any]) -> Answer:
        if "close" in request:
            self._session = None
            # A session ends with its last reference, and TVM's virtual machine keeps one in a circle (get_outputs).
            gc.collect()
            return {}
        if "open" in request:
            return self._open(**request["open"])
        try:
            if "time" in request:
                return self._time(**request["time"])
            return self._network(**request["network"])
        except Exception as error:  # TVM raises what the other side raised, of any class
            return {"error": one_line(error), "alive": self._alive()}

    def _open(self, host: str, port: int, match_key: str, lease_s: float) -> Answer:
        self._session = None  # the place of the one before in TVM's table of sessions
        self._session = self._rpc.connect(host, port, match_key, session_timeout=lease_s)
        ping = self._session.get_function(_PING)
        trips = []
        for _ in range(5):
            started = time.perf_counter()
            ping("x")
            trips.append(time.perf_counter() - started)
        return {"round_trip_s": min(trips)}

    def _alive(self) -> bool:
        try:
            self._session.get_function(_PING)("x")
        except Exception:  # a broken connection shows in several classes; this one's only message is that it is broken
            return False
        return True

    def _load(self, path: str) -> Any:
        """The library on the device; a name is used once, as the loader gives a library it knows by its name."""
        self._files += 1
        name = f"{self._files}-{Path(path).name}"
        self._session.upload(path, name)
        module = self._session.load_module(name)
        self._session.remove(name)
        return module

    def _time(self, library: str, arguments: str, calls: int, limit_s: float) -> Answer:
        """Runs ``kernel`` of the library on the device: once for what it computes, then ``calls`` times, one by one.

        ``arguments``: the file that a builder wrote. A slow kernel is called less often, for about ``limit_s``, one
        that takes longer than that once. TVM's evaluator puts a call that is not counted before each series.
        """
        module, device = self._load(library), self._session.device(self._kind)
        with np.load(arguments, allow_pickle=False) as archive:
            given = archive["x"], archive["weight"], archive["bias"]
            reference = Reference(*given, archive["positions"], archive["values"])
            output = np.full(tuple(archive["y"]), np.nan, np.float32)
        tensors = tuple(self._tvm.runtime.tensor(value, device) for value in (*given, output))
        module["kernel"](*tensors)
        error = reference.error(tensors[-1].numpy())
        samples, wall_s = self._samples(module, device, tensors, 1)
        more = min(calls, int(limit_s / max(*samples, 1e-9)))
        if more > 1:
            samples, wall_s = self._samples(module, device, tensors, more)
        return {"samples": samples, "wall_s": wall_s, "output_error": error}

    def _samples(self, module: Any, device: Any, arguments: tuple[Any, ...], calls: int) -> tuple[list[float], float]:
        timed = module.time_evaluator("kernel", device, number=1, repeat=calls)
        started = time.perf_counter()
        results = timed(*arguments).results
        return [float(value) for value in results], time.perf_counter() - started

    def _network(
        self, libraries: list[str], inputs: list[int], given: str, made: str, blocks: int, calls: int
    ) -> Answer:
        """Times ``main`` of each library in turn, ``calls`` single calls at a time, after one that is not counted.

        ``given``: .npz of inputs "LIBRARY/INPUT"; ``made``: .npz to write, with outputs under the same names and
        "LIBRARY/seconds", (blocks, calls). The clock runs on the device: a call's way to it is not in the times.
        """
        device = self._session.device(self._kind)
        modules = {library: self._load(library) for library in dict.fromkeys(libraries)}
        machines = []
        results: dict[str, Any] = {}
        with np.load(given, allow_pickle=False) as archive:
            for index, (library, count) in enumerate(zip(libraries, inputs, strict=True)):
                machine = self._machine(modules[library], device)
                values = [self._tvm.runtime.tensor(archive[f"{index}/{i}"], device) for i in range(count)]
                machine.set_input("main", *values)
                machine.invoke_stateful("main")
                outputs = machine.get_outputs("main")
                outputs = [outputs] if hasattr(outputs, "numpy") else list(outputs)
                results |= {f"{index}/{i}": output.numpy() for i, output in enumerate(outputs)}
                results[f"{index}/seconds"] = np.zeros((blocks, calls))
                machines.append((machine, machine.time_evaluator("invoke_stateful", device, number=1, repeat=calls)))
        for machine, _ in machines:
            machine.time_evaluator("invoke_stateful", device, number=1, repeat=1, min_repeat_ms=_WARM_UP_MS)("main")
        for block in range(blocks):
            for turn in range(len(machines)):
                index = (turn + block) % len(machines)
                results[f"{index}/seconds"][block] = machines[index][1]("main").results
        np.savez(made, allow_pickle=False, **results)
        return {"outputs": [sum(name.startswith(f"{i}/") for name in results) - 1 for i in range(len(machines))]}


if __name__ == "__main__":
    answer_all(start)
