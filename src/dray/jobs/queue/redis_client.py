"""A thin, typed face of redis-py: commands in, RESP2 replies out, no retries of its own; and idle clients."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.exceptions import RedisError
from redis.retry import Retry

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import ConfigError, TransportError
from dray.name_resolution import resolve

# --- address -----------------------------------------------------------------------------------------------------

ALLOWED = (
    "must be like redis://[[user]:password@]host:port/db, rediss://… or unix://[:password@]/path/to/socket, with "
    "the special characters of user and password percent-encoded"
)
_DEFAULT_USER = "default"
_OPTIONS = {"host", "port", "db", "username", "password", "path", "connection_class"}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """The address of a Redis server. `str` and `repr` leave the credentials out, `url` has them.

    Raises:
        ConfigError: the URL is not one of a Redis server.
    """

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        self.options()

    @classmethod
    def of_socket(cls, path: str, password: str, user: str = "") -> RedisAddress:
        """The address of a server on a Unix socket."""
        return cls(f"unix://{quote(user, safe='')}:{quote(password, safe='')}@{quote(os.fsencode(path))}")

    @classmethod
    def of_port(cls, host: str, port: int, password: str, user: str = "") -> RedisAddress:
        """The address of a server on a TCP port."""
        bracketed = f"[{host}]" if ":" in host else host
        return cls(f"redis://{quote(user, safe='')}:{quote(password, safe='')}@{bracketed}:{port}/0")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a redis-py connection pool, the password among them."""
        try:
            parts = urlsplit(self.url)
            options: dict[str, Any] = parse_url(self.url)  # type: ignore[no-untyped-call]
        except ValueError:  # quotes parts of the URL
            raise _not_an_address() from None
        if parts.scheme == "unix" and "path" in options:
            # redis-py takes the path for UTF-8 and replaces what is not.
            options["path"] = os.fsdecode(unquote_to_bytes(parts.path))
        unknown = [name for name in options if name not in _OPTIONS and not name.startswith("ssl_")]
        place = parts.netloc.rpartition("@")[2]
        if parts.scheme == "unix":
            # What stands there would be taken for the beginning of a path, and may be that of a password.
            fits = bool(options.get("path")) and not place
        else:
            # A password with a plain "/", "?" or "#" ends the place too early: its rest has the "@".
            database = parts.path.strip("/")
            fits = bool(parts.hostname) and (not database or database.isdecimal())
            fits = fits and "@" not in parts.query and not parts.fragment
        if unknown or not fits:
            raise _not_an_address()
        return options

    def redacted(self, text: str) -> str:
        """`text`, such as an answer of the server, without the credentials of this address."""
        options = self.options()
        for name in ("password", "username"):
            secret = options.get(name)
            if secret and secret != _DEFAULT_USER:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
        return text

    def __str__(self) -> str:
        return _without_credentials(self.url)

    def __repr__(self) -> str:
        return f"<RedisAddress {self}>"


def _without_credentials(url: str) -> str:
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0].rpartition("@")[2]
    return f"{scheme}://{unquote(place)}"


def _not_an_address() -> ConfigError:
    # The value is not shown: where it does not parse, any part of it may be a password.
    return ConfigError("redis.url", None, ALLOWED, "is not the URL of a Redis server")


# --- redis client ------------------------------------------------------------------------------------------------


class NoSignalSocket(socket.socket):
    """A socket whose `sendall` never raises SIGPIPE, which a program may have given its default action back."""

    @classmethod
    def of(cls, connected: socket.socket) -> NoSignalSocket:
        """The same socket, with its timeout; `connected` is closed."""
        timeout = connected.gettimeout()
        found = cls(fileno=connected.detach())
        found.settimeout(timeout)
        return found

    def sendall(self, data: Any, flags: int = 0) -> None:
        super().sendall(data, flags | socket.MSG_NOSIGNAL)


class _TcpConnection(Connection):
    """Looks the server's name up within the time for connecting, which redis-py does not bound."""

    def _connect(self) -> socket.socket:
        name, failure = self.host, OSError(f"{self.host} has no address")
        try:
            for _, address in resolve(name, self.port, Deadline.after(self.socket_connect_timeout)):
                self.host = address[0]
                try:
                    return NoSignalSocket.of(super()._connect())  # type: ignore[no-untyped-call]
                except OSError as error:
                    failure = error
            raise failure
        except TransportError as error:
            raise OSError(error.message) from error  # of a TimeoutError redis-py drops the text
        finally:
            self.host = name


class _TlsConnection(SSLConnection, _TcpConnection):
    """TLS above such a connection. Certificates are compared with the name; TLS writes to the socket itself."""


class _UnixConnection(UnixDomainSocketConnection):
    def _connect(self) -> socket.socket:
        return NoSignalSocket.of(super()._connect())  # type: ignore[no-untyped-call]


_CONNECTIONS: dict[type, type] = {
    Connection: _TcpConnection,
    SSLConnection: _TlsConnection,
    UnixDomainSocketConnection: _UnixConnection,
}
"""What stands for each class of redis-py."""


class RedisClient:
    """A thread-safe pool of connections to one server. Raises the exceptions of redis-py.

    Args:
        address: where the server is.
        answer_timeout: seconds that connecting, and each answer, may take.
    """

    def __init__(self, address: RedisAddress, answer_timeout: float) -> None:
        options = address.options()
        chosen = options.pop("connection_class", Connection)
        self._pool = redis.ConnectionPool(
            connection_class=_CONNECTIONS.get(chosen, chosen),
            **options,
            protocol=2,
            socket_timeout=answer_timeout,
            socket_connect_timeout=answer_timeout,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
        )
        self._redis = redis.Redis(connection_pool=self._pool)
        # Replies as the protocol has them: their shape then does not depend on redis-py's version.
        self._redis.response_callbacks.clear()

    def do(self, *command: str | bytes | int) -> Any:
        """The reply to one command."""
        return self._redis.execute_command(*command)  # type: ignore[no-untyped-call]

    def drop_idle(self) -> None:
        """Close the connections that are not in use."""
        self._pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close every connection; a command under way in another thread fails."""
        self._pool.disconnect()


def paired(flat: list[Any]) -> dict[Any, Any]:
    """The mapping that Redis sends as a flat list of keys and values."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


# --- idle clients ------------------------------------------------------------------------------------------------

# Keeps a server that was started for a job reachable: connections that never authenticate do not fill it.
#
# A Redis server counts every connection, authenticated or not, and refuses new ones once it has `maxclients`.
# Until
# it authenticates, a client is the server's user `default`, which is switched off; the job's clients are another
# user. A thread watches the number of connections, over one that it opens before the server's address is known,
# and closes those of `default` when half of `maxclients` are open.

_LOG = logging.getLogger("dray.jobs.queue")

STRANGERS = "default"
"""The server's user that a client is until it authenticates."""

_INTERVAL = 0.5
_ANSWER_TIMEOUT = 1.0
_REPORT_INTERVAL = 60.0


class IdleClientReaper:
    """The thread that closes them. `close` ends it, and may be called twice.

    Args:
        address: of the server, where the job's user is named.
        max_clients: how many clients the server admits.
    """

    def __init__(self, address: RedisAddress, max_clients: int, clock: Clock = MONOTONIC) -> None:
        self._address = address
        self._threshold = max(1, max_clients // 2)
        self._clock = clock
        self._client = RedisClient(address, _ANSWER_TIMEOUT)
        self._closing = threading.Event()
        self._closed_clients = 0
        self._next_report = Deadline.after(0, clock)
        self._reap()
        self._thread = threading.Thread(target=self._run, name="redis-idle-clients", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread: at once if the server has ended, otherwise with the answer to its last command."""
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._closing.wait(_INTERVAL):
            self._reap()

    def _reap(self) -> None:
        try:
            if _connected(self._client.do("INFO", "clients")) > self._threshold:
                self._closed_clients += self._client.do("CLIENT", "KILL", "USER", STRANGERS)
        except RedisError:
            return  # it is asked again soon; the processes that wait for it report that it is away
        if self._closed_clients and self._next_report.expired:
            _LOG.warning(
                "Redis at %s: closed %d connections that had not authenticated",
                self._address,
                self._closed_clients,
            )
            self._closed_clients = 0
            self._next_report = Deadline.after(_REPORT_INTERVAL, self._clock)


def _connected(information: bytes) -> int:
    fields = dict(line.split(b":", 1) for line in information.splitlines() if b":" in line)
    return int(fields[b"connected_clients"])
