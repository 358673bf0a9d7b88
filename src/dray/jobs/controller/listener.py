"""Where the controller accepts connections, and how it bounds those that have not shown the job's token.

uvicorn's protocol does the HTTP. What is here stands in for the part of asyncio that accepts: that accepts as many
connections as come, keeps each for as long as its peer likes, and fails in a loop when no descriptor is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dray.admission import (
    ACCEPT_FAILURES,
    BACKLOG,
    MAX_ACCEPTED,
    UNPROVEN_CLOSED,
    AcceptPause,
    LineLimit,
    Unproven,
    accept,
)
from dray.clock import Deadline
from dray.counters import Counters
from dray.errors import ConfigError, TransportError
from dray.files import read_private_file, write_json
from dray.jobs.folder import JobFolder
from dray.name_resolution import MAX_RESOLVE_SECONDS, bracketed, resolve

# --- http listener -----------------------------------------------------------------------------------------------

PROVEN = "dray.proven"
"""In the state of an ASGI scope: to be called when the request has shown the token."""

_LOG = logging.getLogger("dray.jobs.controller.listener")


class HttpServer(uvicorn.Server):
    """uvicorn on one listening socket, with the process's signals left to others.

    Args:
        listener: the socket; it is closed when the server ends.
        counters: where closed connections and failures to accept are counted.
    """

    def __init__(self, config: uvicorn.Config, listener: socket.socket, counters: Counters) -> None:
        super().__init__(config)
        self._listener = listener
        self._counters = counters
        self._pause = AcceptPause(_LOG)
        self._lines = LineLimit()
        self._warnings = _FewWarnings()
        self._opening: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._unproven: Unproven[_Connection] = Unproven()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets=[])
        self._loop = asyncio.get_running_loop()
        logging.getLogger("uvicorn.error").addFilter(self._warnings)
        self._listener.setblocking(False)
        self._accept_when_readable()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end the connections."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        if self._timer is not None:
            self._timer.cancel()
        logging.getLogger("uvicorn.error").removeFilter(self._warnings)
        await super().shutdown(sockets=[])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    # --- accepting --------------------------------------------------------------------------------------------

    def _accept_when_readable(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                connected = accept(self._listener)
            except OSError as error:
                self._counters.add(ACCEPT_FAILURES)
                self._pause.begin(error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(self._pause.remaining, self._accept_when_readable)
                return
            if connected is None:
                return
            task = self._loop.create_task(self._serve_connection(connected))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _serve_connection(self, connected: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: _Connection(self), connected)
        except OSError as error:  # it has ended meanwhile
            connected.close()
            self._lines.warn(_LOG, "a connection to the controller ended at once: %s", error)

    # --- connections that have not shown the token --------------------------------------------------------------

    def made(self, connection: _Connection) -> None:
        """A connection is there."""
        displaced = self._unproven.add(connection)
        if displaced is not None:
            self._end(displaced, "newer ones displaced it")
        if self._timer is None:
            self._timer = self._loop.call_later(self._unproven.remaining, self._end_late)

    def proven(self, connection: _Connection) -> None:
        """A connection has shown the token, or has ended."""
        self._unproven.discard(connection)

    def _end_late(self) -> None:
        for connection in self._unproven.overdue():
            self._end(connection, "no request with the job's token has come in time")
        awaited = bool(self._unproven)
        self._timer = self._loop.call_later(self._unproven.remaining, self._end_late) if awaited else None

    def _end(self, connection: _Connection, why: str) -> None:
        self._counters.add(UNPROVEN_CLOSED)
        self._lines.warn(_LOG, "closed a connection to the controller: %s", why)
        connection.transport.abort()


class _Connection(H11Protocol):
    """One connection to the controller."""

    def __init__(self, server: HttpServer) -> None:
        state: dict[str, Any] = {**server.lifespan.state, PROVEN: lambda: server.proven(self)}
        super().__init__(server.config, server.server_state, state)
        self._server = server

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._server.made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.proven(self)
        super().connection_lost(exc)


class _FewWarnings(logging.Filter):
    """uvicorn warns about each request that is not HTTP: few of these lines pass."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = LineLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        ending = self._lines.passes()
        if ending is None:
            return False
        record.msg = f"{record.msg}{ending}"
        return True


# --- listener ----------------------------------------------------------------------------------------------------

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
    # asyncio sets TCP_NODELAY only on sockets that name their protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
    write_json(folder.controller_address, {"url": f"http://{bracketed(host)}:{port}", "token": token}, mode=0o600)


# --- token -------------------------------------------------------------------------------------------------------

_TOKEN_KEY = "controller.token_file"
# What an Authorization header carries as it is.
_TOKEN = re.compile(rb"[!-~]{16,512}")


def token_from_file(path: Path) -> str:
    """The token in the file at `path`; where there is no file, one is made, with mode 600 and a fresh token.

    Raises:
        ConfigError: the file is not for its owner only, has no token of this kind, or cannot be made.
    """
    path = path.absolute()
    with contextlib.suppress(FileNotFoundError):
        return _token_in(path)
    with _fresh_file(path) as partial:
        with contextlib.suppress(FileExistsError):  # the token of another process is used
            os.link(partial, path)
    try:
        return _token_in(path)
    except FileNotFoundError as error:
        allowed = "a file that stays where it is; it was removed again"
        raise ConfigError(_TOKEN_KEY, str(path), allowed) from error


def check_token_file(path: Path) -> None:
    """Make sure that `token_from_file` would give a token; no file is made.

    Raises:
        ConfigError: it would not.
    """
    path = path.absolute()
    try:
        _token_in(path)
    except FileNotFoundError:
        with _fresh_file(path):
            return


def _token_in(path: Path) -> str:
    token = read_private_file(path, _TOKEN_KEY).strip()
    if not _TOKEN.fullmatch(token):
        allowed = "a file with one token of 16 to 512 printable ASCII characters"
        raise ConfigError(_TOKEN_KEY, str(path), allowed)
    return token.decode()


@contextlib.contextmanager
def _fresh_file(path: Path) -> Iterator[Path]:
    """A whole file with a fresh token in the folder of `path`, which is removed at the end of the block."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(f"{secrets.token_hex(32)}\n")
            yield partial
        finally:
            partial.unlink()
    except OSError as error:
        allowed = f"a file that exists, or one that can be made ({error.strerror})"
        raise ConfigError(_TOKEN_KEY, str(path), allowed) from error
