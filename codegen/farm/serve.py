"""Starts a tracker and devices on this machine, and leaves none of their processes behind."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from codegen.closing import Closing
from codegen.farm.address import FIRST_PORT, LOOPBACK, Address, FarmError, is_loopback
from codegen.farm.process import RUNTIME_ONLY, ChildProcess
from codegen.farm.tracker import status
from codegen.tvm_versions import check_tvm
from passes.errors import UsageError

NO_AUTHENTICATION = (
    "WARNING: TVM's RPC has no authentication. Whoever reaches {host} can run any program on this machine as you: "
    "serve there only in a network where everybody may"
)
_PORTS = (*range(FIRST_PORT, FIRST_PORT + 10), 0)
_START_S = 60.0
_WATCH_S = 0.5


@dataclass
class Server:
    """A device that was started here. ``request``: what its process was asked; ``restarts``: how often it died."""

    key: str
    address: Address
    process: ChildProcess
    module: str
    request: dict[str, Any]
    environment: dict[str, str]
    restarts: int = 0


class Farm(Closing):
    """A tracker, unless ``tracker`` names one that is there already, and the devices that have joined it.

    ``host``: the address of this machine to listen on. ``port``: the tracker's; None for the first free one from 9190
    on, 0 for any. FarmError where a process does not start, UsageError for a host that cannot be told to others.
    """

    def __init__(self, *, host: str = LOOPBACK, port: int | None = None, tracker: Address | None = None) -> None:
        check_tvm()
        self.host = _own(host)
        self.servers: list[Server] = []
        self._process: ChildProcess | None = None
        # Sessions keep their files here. Those that are killed leave them.
        self._folder = tempfile.TemporaryDirectory(prefix="rankc-farm-")
        try:
            if tracker is not None:
                status(tracker.host, tracker.port)
                self.tracker = tracker
            else:
                request = {"host": self.host, "ports": list(_PORTS) if port is None else [port]}
                self._process = self._start("codegen.farm.tracker_child", request, {})
                self.tracker = Address(self.host, _port(self._process, f"a tracker at {Address(self.host, port or 0)}"))
        except BaseException:
            self.close()
            raise

    def add_server(
        self,
        key: str,
        *,
        threads: int = 1,
        cores: Sequence[int] = (),
        module: str = "codegen.farm.server_child",
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        """Starts a device under ``key`` whose kernels take ``threads`` threads, and returns when the tracker has it.

        ``cores``: those that it may run on, () for all. ``module``: its program; ``environment`` is added to its own.
        """
        if not key or any(c.isspace() or c == ":" for c in key):
            raise UsageError(f"{key!r} is no key of devices: expected a word without spaces and colons")
        request = {
            "host": self.host,
            "port": 0,
            "key": key,
            "tracker": [self.tracker.host, self.tracker.port],
            "cores": list(cores),
        }
        # TVM would bind its threads to the machine's first cores, whichever are this device's.
        variables = {"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0", **(environment or {})}
        process = self._start(module, request, variables)
        server = Server(key, Address(self.host, 0), process, module, request, variables)
        self.servers.append(server)
        self._settle(server)
        return server

    def revive(self) -> list[Server]:
        """Starts the devices that have died again, where they were; returns them. FarmError if the tracker has died."""
        if self._process is not None and (end := self._process.ended()) is not None:
            raise FarmError(f"the tracker at {self.tracker} {end}")
        dead = [server for server in self.servers if server.process.ended() is not None]
        for server in dead:
            server.process.kill()
            server.request["port"] = server.address.port
            server.process = self._start(server.module, server.request, server.environment)
            self._settle(server)
            server.restarts += 1
        return dead

    def close(self) -> None:
        """Ends every process that was started here, with all that they started."""
        for process in (*(server.process for server in self.servers), *filter(None, [self._process])):
            process.kill()
        self.servers.clear()
        self._process = None
        self._folder.cleanup()

    def _start(self, module: str, request: Mapping[str, Any], environment: Mapping[str, str]) -> ChildProcess:
        variables = {**RUNTIME_ONLY, "TMPDIR": self._folder.name, **environment}
        return ChildProcess(module, json.dumps(dict(request)), variables)

    def _settle(self, server: Server) -> None:
        """Waits until the device listens and the tracker has it."""
        server.address = Address(self.host, _port(server.process, f"a device of key {server.key}"))
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            group = status(self.tracker.host, self.tracker.port).group(server.key)
            if any(device.port == server.address.port for device in group.devices):
                return
            if (end := server.process.ended()) is not None:
                raise FarmError(f"the device at {server.address} {end}")
            time.sleep(0.02)
        raise FarmError(f"the device at {server.address} did not join the tracker at {self.tracker} in {_START_S:g} s")


def serve(
    *,
    say: Callable[[str], None],
    host: str = LOOPBACK,
    port: int | None = None,
    key: str = "cpu",
    servers: int = 1,
    threads: int = 1,
    tracker: Address | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Runs a tracker and ``servers`` devices until it is interrupted, terminated or ``stop`` is set.

    ``say`` takes each line of what is going on. Devices get cores of their own where the machine has enough. One that
    dies is started again. With ``tracker``, devices join that one. Errors are those of :class:`Farm`.
    """
    if servers < 1 or threads < 1:
        raise UsageError(f"{servers} devices of {threads} threads: expected one at least")
    stop = stop or threading.Event()
    with _ended_by_signals(stop), Farm(host=host, port=port, tracker=tracker) as farm:
        if not is_loopback(farm.host):
            say(NO_AUTHENTICATION.format(host=farm.host))
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for index in range(servers):
            own = cores[index * threads : (index + 1) * threads] if servers * threads <= len(cores) else []
            server = farm.add_server(key, threads=threads, cores=own)
            on = f", core {', '.join(map(str, own))}" if own else ""
            say(f"device {server.address}, key {key}, {threads} thread{'s' if threads > 1 else ''}{on}")
        say(f"tracker {farm.tracker}: measure there with --rpc {farm.tracker} --rpc-key {key}; Ctrl-C ends it")
        while not stop.wait(_WATCH_S):
            for server in farm.revive():
                say(f"device {server.address} died and was started again, {server.restarts} times so far")
        say("all processes of the farm are ended")


class _ended_by_signals:
    """Sets an event on SIGINT and SIGTERM. Other threads than the main one cannot, and need not."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._set)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()


def _own(host: str) -> str:
    """``host``, unless it is one that nobody can be sent to."""
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host
    if wildcard:
        raise UsageError(
            f"--host {host} names no machine that the tracker could send others to: give this one's address"
        )
    return host


def _port(process: ChildProcess, what: str) -> int:
    answer = process.first(_START_S)
    if answer is None:
        raise FarmError(f"{what} did not start: its process {process.ended() or f'says nothing for {_START_S:g} s'}")
    if "error" in answer:
        raise FarmError(f"{what} did not start: {answer['error']}")
    port: int = answer["port"]
    return port
