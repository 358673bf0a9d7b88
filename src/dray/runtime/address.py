"""The controller's address: bound first, then advertised, and never given up in between."""

from __future__ import annotations

import errno
import socket
from typing import Any

from dray.admission import BACKLOG
from dray.clock import Deadline
from dray.errors import ConfigError, TransportError
from dray.name_resolution import MAX_RESOLVE_SECONDS, resolve
from dray.runtime.job import JobFolder, write_json

_NOT_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""This machine does not have the address: the name's next one may be its own."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket at the first address of `host` that this machine has; port 0 takes any free one.

    It is kept from here on, so the port it shows stays its own.

    Raises:
        ConfigError: the host is not an address of this machine, or the port is taken or not allowed.
    """
    try:
        found = resolve(host, port, Deadline.after(MAX_RESOLVE_SECONDS))
    except TransportError as error:
        allowed = f"must be an address of this machine, or a name that means one ({error.message})"
        raise ConfigError("controller.host", host, allowed) from error
    failures = []
    for family, address in found:
        try:
            return _listening(family, address)
        except OSError as error:
            failures.append(error)
            if error.errno not in _NOT_HERE:
                break
    value = f"{host}:{port}"
    allowed = f"must be an address of this machine and a free port ({failures[-1].strerror})"
    raise ConfigError("controller.host, controller.port", value, allowed) from failures[-1]


def _listening(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def advertise(folder: JobFolder, listener: socket.socket, token: str) -> None:
    """Write the controller's URL and its token to the job's folder, for the job's owner only."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    write_json(folder.controller_address, {"url": f"http://{shown}:{port}", "token": token}, mode=0o600)
