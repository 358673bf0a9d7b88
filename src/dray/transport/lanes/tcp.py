"""The TCP lane's stream: frames and payloads over one connection."""

from __future__ import annotations

import errno
import socket

from dray.admission import BACKLOG
from dray.clock import Deadline
from dray.errors import ConfigError, TransportError, Unreachable
from dray.forking import not_inherited
from dray.name_resolution import MAX_RESOLVE_SECONDS, resolve
from dray.protocol.handshake import Lane
from dray.transport.lanes.base import Endpoint
from dray.transport.lanes.socket import SocketStream, from_os_error, make_socket
from dray.transport.lanes.unix import accept, connect_socket
from dray.transport.polling import Wake, addresses_of

_PORTS_TO_TRY = 64


class TcpListener:
    """Listens on a numeric address, on `port` or, where that is taken, on the next free one; port 0 takes any."""

    def __init__(self, host: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._sock = not_inherited(make_socket(family))
        except Unreachable as error:
            allowed = f"an address of a kind that this machine's kernel has ({error.message})"
            raise ConfigError("host", host, allowed) from error
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind_next_free(self._sock, host, port)
            self._sock.listen(BACKLOG)
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        self.endpoint = str(Endpoint(Lane.TCP, host, self._sock.getsockname()[1]))

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> SocketStream | None:
        """The next connection, or None when there is none."""
        sock = accept(self._sock)
        try:
            return None if sock is None else _stream(sock, accepted=True)
        except TransportError:  # it has ended meanwhile
            return None

    def close(self) -> None:
        self._sock.close()


def listening_address(host: str) -> str:
    """The numeric address to listen at, and to advertise, for `host`: a client then needs no name server.

    Of a name's addresses an IPv4 one is preferred, as UCX listens at no other.

    Raises:
        ConfigError: the host is unknown.
    """
    if ":" in host:
        return host  # with its zone, if it has one
    try:
        found = resolve(host, 0, Deadline.after(MAX_RESOLVE_SECONDS))
    except TransportError as error:
        allowed = f"an address of this machine, or a name that means one ({error.message})"
        raise ConfigError("host", host, allowed) from error
    _, address = min(found, key=lambda each: each[0] is not socket.AF_INET)
    return str(address[0])


def bind_next_free(sock: socket.socket, host: str, port: int) -> None:
    """Bind to the first free port from `port` on.

    Raises:
        ConfigError: this machine has no such address, or no port is free.
    """
    for candidate in range(port, min(port + _PORTS_TO_TRY, 65536)) if port else (0,):
        try:
            sock.bind((host, candidate))
            return
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ConfigError("host", host, f"an address of this machine ({error.strerror or error})") from error
    raise ConfigError("port", port, f"a port with a free one among the {_PORTS_TO_TRY} from it on, or 0")


def connect(host: str, port: int, deadline: Deadline, wake: Wake | None = None) -> SocketStream:
    """Connect to a server's TCP endpoint, trying each address of the host.

    Raises:
        Unreachable: the host is unknown, or nobody listens there.
        TransportTimeout: there was no answer until the deadline, from a name server or from the host.
        OutOfResources: no descriptor is left for the connection.
    """
    endpoint = str(Endpoint(Lane.TCP, host, port))
    failure: Unreachable | None = None
    for family, address in addresses_of(host, port, deadline, endpoint, wake):
        sock = make_socket(family)
        try:
            connect_socket(sock, address, deadline, endpoint, wake)
        except Unreachable as error:
            sock.close()
            failure = error
            continue
        except BaseException:
            sock.close()
            raise
        return _stream(sock)
    raise failure or Unreachable("the host has no address", endpoint=endpoint)


def _stream(sock: socket.socket, accepted: bool = False) -> SocketStream:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        sock.close()
        raise from_os_error(error) from error
    return SocketStream(sock, Lane.TCP, accepted)
