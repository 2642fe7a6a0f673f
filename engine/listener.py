"""The listening socket, bound before the server is even imported."""

from __future__ import annotations

import errno
import os
import socket

from engine.errors import PortError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; the kernel holds its callers until the application serves them. Raises PortError.

    A port that a predecessor has just left can be taken at once; one that somebody listens on cannot.
    """
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as exc:
        raise PortError(f"cannot listen on {shown}: {exc}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        hint = "; another program listens there" if exc.errno == errno.EADDRINUSE else ""
        raise PortError(f"cannot listen on {shown}: {os.strerror(exc.errno or 0)}{hint}") from None
    return listener
