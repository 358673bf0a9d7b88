"""The controller's address: bound first, then advertised, and never given up in between."""

from __future__ import annotations

import socket

from dray.admission import BACKLOG
from dray.errors import ConfigError
from dray.runtime.job import JobFolder, write_json


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. It is kept from here on, so the port it shows stays its own.

    Raises:
        ConfigError: the host is not an address of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(
            "controller.host", host, f"must be an address of this machine ({error.strerror})"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        value = f"{host}:{port}"
        allowed = f"must be an address of this machine and a free port ({error.strerror})"
        raise ConfigError("controller.host, controller.port", value, allowed) from error
    return listener


def advertise(folder: JobFolder, listener: socket.socket, token: str) -> None:
    """Write the controller's URL and its token to the job's folder, for the job's owner only."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    write_json(folder.controller_address, {"url": f"http://{shown}:{port}", "token": token}, mode=0o600)
