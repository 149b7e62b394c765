"""Where a tracker is."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Self

from passes.errors import InputError, UsageError

LOOPBACK = "127.0.0.1"
FIRST_PORT = 9190
"""Where TVM's tools look for a tracker; the ten ports from here on are tried."""


class FarmError(InputError):
    """The farm cannot be used: no tracker, no device, or none that is left."""


@dataclass(frozen=True)
class Address:
    """A TCP address; ``str`` gives ``HOST:PORT``, with brackets around an IPv6 host."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, option: str = "--rpc") -> Self:
        """Reads ``HOST:PORT``, ``[IPV6]:PORT``, ``HOST``, ``:PORT`` or ``PORT``: loopback and TVM's port by default.

        Raises UsageError that names ``option``.
        """
        written = text.strip()
        if written.startswith("["):
            host, bracket, port = written[1:].partition("]")
            if not bracket or (port and not port.startswith(":")):
                raise UsageError(f"{option} {text!r}: expected [IPV6]:PORT, such as [::1]:{FIRST_PORT}")
            port = port[1:]
        elif written.isdecimal():
            host, port = "", written
        else:
            host, _, port = written.partition(":")
        if not written or ":" in port or any(c.isspace() or c in "/@" for c in host):
            raise UsageError(f"{option} {text!r}: expected HOST:PORT, such as {LOOPBACK}:{FIRST_PORT}")
        if port and not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
            raise UsageError(f"{option} {text!r}: {port!r} is no port, expected 1 to 65535")
        return cls(host or LOOPBACK, int(port) if port else FIRST_PORT)


def is_loopback(host: str) -> bool:
    """True if nothing outside this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def family(host: str, port: int) -> socket.AddressFamily:
    """IPv4 or IPv6, as the first address of ``host`` is; FarmError for a name that nobody knows."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise FarmError(f"{host!r} is no address and no known name: {error.strerror or error}") from error
