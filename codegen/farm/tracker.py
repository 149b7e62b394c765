"""The tracker's own protocol, spoken without TVM: the process that steers a farm need not load it.

After a magic number that the other side returns, each message is its length in bytes as a little-endian 32-bit integer
and JSON (tvm/rpc/tracker.py, tvm/rpc/base.py of the pinned release).
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from codegen.closing import Closing
from codegen.farm.address import Address, FarmError, family

_MAGIC = struct.pack("<i", 0x2F271)
_SUCCESS, _REQUEST, _SUMMARY = 0, 4, 6
_LARGEST_BYTES = 1 << 24


@dataclass(frozen=True)
class Offer:
    """A device that the tracker gave to us; it takes one session that shows ``match_key``, within a few seconds."""

    device: Address
    match_key: str


@dataclass(frozen=True)
class DeviceGroup:
    """The devices of one key. ``free`` wait for work, ``pending`` counts the requests that wait for a device."""

    key: str
    devices: tuple[Address, ...]
    free: int
    pending: int

    @property
    def busy(self) -> int:
        return max(len(self.devices) - self.free, 0)


@dataclass(frozen=True)
class FarmStatus:
    """What a tracker has, key by key. ``answered_s``: how long it took to say so."""

    tracker: Address
    groups: tuple[DeviceGroup, ...]
    answered_s: float

    def group(self, key: str) -> DeviceGroup:
        return next((group for group in self.groups if group.key == key), DeviceGroup(key, (), 0, 0))


class TrackerConnection(Closing):
    """One connection to a tracker. FarmError where nothing, or something else, answers within ``timeout_s``."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.address = address
        where = f"no RPC tracker answers at {address}"
        kind = family(address.host, address.port)
        self._socket = socket.socket(kind, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._data = bytearray()
        try:
            self._socket.connect((address.host, address.port))
            self._socket.sendall(_MAGIC)
            # The tracker takes the magic number only if nothing stands behind it: its answer has to be waited for.
            magic = self._exactly(len(_MAGIC))
        except FarmError:
            self.close()
            raise
        except OSError as error:
            self.close()
            reason = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise FarmError(f"{where}: {reason}; start one with tools/tune.py --serve") from error
        if magic != _MAGIC:
            self.close()
            raise FarmError(f"what answers at {address} is no RPC tracker")

    def summary(self) -> dict[str, Any]:
        self._send([_SUMMARY])
        code, value = self._receive()
        if code != _SUCCESS:
            raise FarmError(f"the RPC tracker at {self.address} refused to say what it has: {value!r}")
        summary: dict[str, Any] = value
        return summary

    def request(self, key: str) -> None:
        """Asks for a device; :meth:`offer` takes the answer, which comes when one is free."""
        self._send([_REQUEST, key, "", 1])
        self._socket.setblocking(False)

    def offer(self) -> Offer | None:
        """The device that was asked for, None where the answer is not there yet."""
        try:
            received = self._socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise self._gone(error) from error
        if not received:
            raise self._gone(None)
        self._data += received
        size = 4 + struct.unpack_from("<i", self._data)[0] if len(self._data) >= 4 else 0
        if not size or len(self._data) < size:
            return None
        code, value = json.loads(bytes(self._data[4:size]))
        if code != _SUCCESS:
            raise FarmError(f"the RPC tracker at {self.address} refused a device: {value!r}")
        host, port, match_key = value
        return Offer(Address(host, int(port)), match_key)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def _send(self, message: list[Any]) -> None:
        text = json.dumps(message).encode()
        try:
            self._socket.sendall(struct.pack("<i", len(text)) + text)
        except OSError as error:
            raise self._gone(error) from error

    def _receive(self) -> Any:
        (size,) = struct.unpack("<i", self._exactly(4))
        if not 0 < size <= _LARGEST_BYTES:
            raise FarmError(f"what answers at {self.address} is no RPC tracker: a message of {size} bytes")
        return json.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            try:
                received = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise FarmError(f"what listens at {self.address} does not answer as an RPC tracker does") from error
            except OSError as error:
                raise self._gone(error) from error
            if not received:
                raise FarmError(f"what listens at {self.address} closed the connection; is it an RPC tracker?")
            self._data += received
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken

    def _gone(self, error: OSError | None) -> FarmError:
        reason = "it closed the connection" if error is None else error.strerror or str(error)
        return FarmError(f"the RPC tracker at {self.address} is gone: {reason}")


def status(host: str, port: int, *, timeout_s: float = 5.0) -> FarmStatus:
    """The devices of a tracker by key, free and busy. FarmError where no tracker answers."""
    address = Address(host, port)
    started = time.monotonic()
    with TrackerConnection(address, timeout_s) as connection:
        summary = connection.summary()
    took = time.monotonic() - started
    devices: dict[str, list[Address]] = {}
    for server in summary["server_info"]:
        key = server["key"].removeprefix("server:")
        devices.setdefault(key, []).append(Address(server["addr"][0], int(server["addr"][1])))
    queues = {key: Counter(queue) for key, queue in summary["queue_info"].items()}
    groups = tuple(
        DeviceGroup(
            key,
            tuple(sorted(devices.get(key, ()), key=lambda device: (device.host, device.port))),
            queues.get(key, Counter())["free"],
            queues.get(key, Counter())["pending"],
        )
        for key in sorted({*devices, *queues})
    )
    return FarmStatus(address, groups, took)
