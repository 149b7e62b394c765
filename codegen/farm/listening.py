"""A listening socket on the first free port."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from codegen.farm.address import family


def bound(host: str, ports: Sequence[int]) -> socket.socket:
    """Listens on the first of ``ports`` that nobody holds; 0 is any. OSError of the last one where all are taken."""
    for index, port in enumerate(ports):
        listening = socket.socket(family(host, port), socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(16)
            return listening
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE or index == len(ports) - 1:
                raise
    raise ValueError("no port was given to listen on")
