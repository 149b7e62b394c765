from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from codegen.farm.address import FarmError
from codegen.farm.serve import Farm
from codegen.farm.tracker import FarmStatus, TrackerConnection, status


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else can take meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def answering(reply: bytes | None) -> Iterator[int]:
    """Something that listens, and answers with ``reply``, or not at all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(64)
                if reply is not None:
                    connection.sendall(reply)
                connection.recv(64)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
    thread.join(10)


def settled(farm: Farm, key: str, wanted: tuple[int, int, int]) -> FarmStatus:
    """The status once ``key`` shows ``wanted`` devices free, busy, and requests pending; after 60 s as it is then.

    A tracker serves its connections in no fixed order: what one of them sent may be seen after the question of another.
    """
    until = time.monotonic() + 60
    while True:
        now = status(farm.tracker.host, farm.tracker.port)
        group = now.group(key)
        if (group.free, group.busy, group.pending) == wanted or time.monotonic() > until:
            return now
        time.sleep(0.02)


def test_no_tracker_is_an_error_that_says_what_to_do() -> None:
    with silent_port() as port:
        error = f"^no RPC tracker answers at 127.0.0.1:{port}: Connection refused; start one"
        with pytest.raises(FarmError, match=error):
            status("127.0.0.1", port)


def test_something_else_that_listens_is_no_tracker() -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port, pytest.raises(FarmError, match="is no RPC tracker"):
        status("127.0.0.1", port)


def test_something_that_says_nothing_is_not_waited_for_for_ever() -> None:
    with answering(None) as port, pytest.raises(FarmError, match="does not answer as an RPC tracker does"):
        status("127.0.0.1", port, timeout_s=0.2)


def test_devices_are_listed_by_key_free_and_busy(farm: Farm) -> None:
    assert status(farm.tracker.host, farm.tracker.port).groups == ()
    first, second = farm.add_server("lab"), farm.add_server("lab")
    other = farm.add_server("other")
    lab = settled(farm, "lab", (2, 0, 0)).group("lab")
    assert set(lab.devices) == {first.address, second.address}
    assert (lab.free, lab.busy, lab.pending) == (2, 0, 0)

    connections = [TrackerConnection(farm.tracker, 5.0) for _ in range(3)]
    offers = []
    for connection in connections[:2]:  # the third asks later: who is served first among several is not said
        connection.request("lab")
        until = time.monotonic() + 60
        while (offer := connection.offer()) is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        offers.append(offer.device)
    assert set(offers) == {first.address, second.address}
    connections[2].request("lab")
    now = settled(farm, "lab", (0, 2, 1))
    assert (now.group("lab").free, now.group("lab").busy, now.group("lab").pending) == (0, 2, 1)
    now = settled(farm, "other", (1, 0, 0))
    assert (now.group("other").devices, now.group("other").free) == ((other.address,), 1)
    assert connections[2].offer() is None
    for connection in connections:
        connection.close()

    farm.close()
    with pytest.raises(FarmError, match="no RPC tracker answers"):
        status(farm.tracker.host, farm.tracker.port)
