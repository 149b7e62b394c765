from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from codegen.farm.address import FarmError
from codegen.farm.serve import Farm, serve
from codegen.farm.tracker import status
from passes.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


def happens(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not (met := condition()) and time.monotonic() < until:
        time.sleep(0.02)
    return met


@linux
def test_nothing_is_left_of_a_farm(gone: Callable[[set[int]], bool]) -> None:
    with Farm(port=0) as farm:
        server = farm.add_server("lab")
        assert farm._process is not None
        groups = {server.process.pid, farm._process.pid}
        folder = Path(farm._folder.name)
        assert folder.is_dir()
    assert gone(groups)
    assert not folder.exists()


@linux
def test_nothing_is_left_when_the_process_that_serves_is_killed(
    gone: Callable[[set[int]], bool], tmp_path: Path
) -> None:
    code = (
        "from codegen.farm.serve import Farm\n"
        "import time\n"
        "farm = Farm(port=0)\n"
        "print(farm._process.pid, farm.add_server('lab').process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a folder is all that is left
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        groups = set(map(int, serving.stdout.readline().split()))
        assert len(groups) == 2
        serving.kill()
    assert gone(groups)


def test_a_device_that_dies_is_started_again_where_it_was(farm: Farm) -> None:
    server = farm.add_server("lab")
    assert farm.revive() == []
    os.kill(server.process.pid, signal.SIGKILL)
    assert happens(lambda: server.process.ended() is not None)
    assert farm.revive() == [server]
    assert server.restarts == 1
    # The tracker may hear of the new one before it hears of the old one's end.
    assert happens(lambda: status(farm.tracker.host, farm.tracker.port).group("lab").devices == (server.address,))


def test_serving_goes_on_until_it_is_stopped() -> None:
    lines: list[str] = []
    stop = threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("tracker"):
            stop.set()

    serve(say=say, port=0, key="lab", servers=2, stop=stop)
    assert [line.split()[0] for line in lines] == ["device", "device", "tracker", "all"]
    tracker = lines[2].split()[1].rstrip(":")
    assert f"--rpc {tracker} --rpc-key lab" in lines[2]
    assert not any("WARNING" in line for line in lines)
    with pytest.raises(FarmError):
        status("127.0.0.1", int(tracker.rpartition(":")[2]))


def test_another_host_than_loopback_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    # no machine can be counted on to have another address
    monkeypatch.setattr("codegen.farm.serve.is_loopback", lambda host: host != "127.0.0.2")
    lines: list[str] = []
    stop = threading.Event()
    stop.set()
    serve(say=lines.append, host="127.0.0.2", port=0, stop=stop)
    assert lines[0].startswith(
        "WARNING: TVM's RPC has no authentication. Whoever reaches 127.0.0.2 can run any program"
    )
    assert lines[2].startswith("tracker 127.0.0.2:")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_host_that_nobody_can_be_sent_to_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match=f"--host {host} names no machine"):
        Farm(host=host)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FarmError, match=f"a tracker at 127.0.0.1:{port} did not start: Address already in use"):
            Farm(port=port)


def test_devices_may_join_a_tracker_that_is_there(farm: Farm) -> None:
    with Farm(tracker=farm.tracker) as devices:
        server = devices.add_server("lab")
        assert status(farm.tracker.host, farm.tracker.port).group("lab").devices == (server.address,)


def test_a_key_is_one_word(farm: Farm) -> None:
    with pytest.raises(UsageError, match="'my lab' is no key of devices"):
        farm.add_server("my lab")


def test_what_steers_a_farm_loads_no_tvm() -> None:
    code = (
        "import sys, codegen.farm.measurer, codegen.farm.serve\n"
        "print(sorted({'tvm', 'tvm_ffi', 'torch', 'tornado'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
