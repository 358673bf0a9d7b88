"""A thin, typed face of redis-py: commands in, RESP2 replies out, no retries of its own."""

from __future__ import annotations

import socket
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry

from dray.clock import Deadline
from dray.control.address import RedisAddress
from dray.errors import TransportError
from dray.name_resolution import resolve


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
        """Close the connections that nobody uses at the moment."""
        self._pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close every connection; a command under way in another thread fails."""
        self._pool.disconnect()


def paired(flat: list[Any]) -> dict[Any, Any]:
    """The mapping that Redis sends as a flat list of keys and values."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
