"""A thin, typed face of redis-py: commands in, RESP2 replies out, no retries of its own."""

from __future__ import annotations

import socket
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, UnixDomainSocketConnection
from redis.retry import Retry

from dray.control.address import RedisAddress


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
    def _connect(self) -> socket.socket:
        return NoSignalSocket.of(super()._connect())  # type: ignore[no-untyped-call]


class _UnixConnection(UnixDomainSocketConnection):
    def _connect(self) -> socket.socket:
        return NoSignalSocket.of(super()._connect())  # type: ignore[no-untyped-call]


_CONNECTIONS: dict[type, type] = {Connection: _TcpConnection, UnixDomainSocketConnection: _UnixConnection}
"""What stands for each class of redis-py; TLS keeps its own, as its library writes to the socket itself."""


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
