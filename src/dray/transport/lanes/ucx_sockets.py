"""The sockets that UCX has opened in this process.

UCX does not return them. This module finds them among the process's descriptors, by their kind, and uses
duplicates. It duplicates sockets only, because closing a duplicate of a file ends the locks that the process holds
on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dray.admission import MAX_UNPROVEN, Unproven
from dray.clock import MONOTONIC, Clock
from dray.errors import ConfigError, Unreachable
from dray.forking import not_inherited
from dray.name_resolution import is_loopback

_OWN_ADDRESS = "an IPv4 address of one of this machine's interfaces"
_IFNAME = struct.Struct("16s16x")
_IFADDR = struct.Struct("20x4s8x")
_SIOCGIFADDR = 0x8915
_SO_ATTACH_FILTER = 26
_SOCK_FPROG = struct.Struct("@HP")
_RETURN_NOTHING = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""A packet filter of one instruction, which drops every packet."""

_BYTES_RECEIVED = struct.Struct("@128xQ")
"""``tcpi_bytes_received`` in ``struct tcp_info``."""

_FIRST_BYTES = 8
"""UCX's first message on a connection between workers is longer; UCX closes a connection that begins otherwise."""

_SEARCH_SECONDS = 10.0
_SEARCH_SECONDS_AWAITED = 1.0
_SEARCH_SECONDS_BUSY = 0.25
_COUNT_SECONDS = 1.0
_MANY_DESCRIPTORS = MAX_UNPROVEN // 2
_MAX_TRIED = 1 << 16

Peer = tuple[str, int]


class _Found(NamedTuple):
    """A connection that does not speak UCX yet, and whether its peer has sent anything."""

    inode: int
    descriptor: int
    received: bool


class SilentPeers:
    """Limits TCP connections that UCX has accepted and that do not speak UCX.

    UCX keeps such a connection, with its descriptor, until the peer closes it. At the listener's port, a peer
    speaks UCX once UCX has reported its request; at a port for data, once UCX's first bytes have arrived. All
    others are limited like connections without a proof (`dray.admission`): this class shuts them down, and UCX
    closes them.

    Args:
        port: the listener's port.
        data_ports: ports at which other workers connect to the listener's worker.
        clock: where time comes from.
    """

    def __init__(self, port: int, data_ports: Iterable[int] = (), clock: Clock = MONOTONIC) -> None:
        self._port = port
        self._data_ports = frozenset(data_ports)
        self._listening = [listening_socket(each) for each in (port, *self._data_ports)]
        self._clock = clock
        self._unproven: Unproven[int] = Unproven(clock)
        self._requested: set[Peer] = set()
        self._ended: set[int] = set()
        self._last = -math.inf
        self._search_at = clock.now()
        self._count_at = math.inf
        self._lowest_free: float = 0
        # A search must work when no descriptor is left.
        self._spare = not_inherited(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        self._unconnected = not_inherited(socket.socket(socket.AF_INET, socket.SOCK_STREAM))

    def filenos(self) -> list[int]:
        """Descriptors with an edge when a connection arrives, unless UCX accepts it at once."""
        return [each.fileno() for each in self._listening]

    def requested(self, request: int) -> None:
        """UCX has reported a connection request: its peer speaks UCX."""
        peer = _peer_of(request)
        if peer is not None:
            self._requested.add(peer)

    def hasten(self) -> None:
        """Connections have arrived: search soon."""
        self._search_at = min(self._search_at, self._last + _SEARCH_SECONDS_BUSY)

    @property
    def remaining(self) -> float:
        """Seconds until `shut_down` has something to do, never negative."""
        return max(0.0, min(self._search_at, self._count_at) - self._clock.now())

    def shut_down(self) -> int:
        """Search if that is due, and shut down connections that are late or displaced; returns their number."""
        now = self._clock.now()
        if now < self._search_at and self._find_lowest_free() < self._lowest_free + _MANY_DESCRIPTORS:
            self._count_at = now + _COUNT_SECONDS
            return 0
        found = {each.inode: each for each in self._search()}
        self._ended &= found.keys()  # UCX takes a moment to close them
        for gone in [inode for inode in self._unproven if inode not in found]:
            self._unproven.discard(gone)
        arrived = [inode for inode in found if inode not in self._unproven and inode not in self._ended]
        ending = []
        for inode in arrived:
            displaced = self._unproven.add(inode)
            if displaced is not None:
                ending.append(displaced)
            if found[inode].received:
                self._unproven.received(inode)
        ending += self._unproven.overdue()
        count = 0
        for inode in ending:
            if self._opened(found[inode].descriptor, inode):
                # The peer may have closed it.
                with contextlib.suppress(OSError):
                    self._spare.shutdown(socket.SHUT_RDWR)
                self._ended.add(inode)
                count += 1
        self._release_spare()
        self._last = now
        self._search_at = now + (_SEARCH_SECONDS_AWAITED if self._unproven else _SEARCH_SECONDS)
        self._count_at = now + _COUNT_SECONDS
        self._lowest_free = self._find_lowest_free()
        return count

    def close(self) -> None:
        """Stop searching. Twice is fine."""
        for each in (*self._listening, self._spare, self._unconnected):
            each.close()

    # --- searching --------------------------------------------------------------------------------------------

    def _search(self) -> Iterator[_Found]:
        """The connections that do not speak UCX yet."""
        connected = set()
        for descriptor, inode in _sockets():
            if descriptor == self._spare.fileno() or not self._opened(descriptor, inode):
                continue
            try:
                port, peer = self._spare.getsockname()[1], self._spare.getpeername()
                if port == self._port:
                    connected.add(peer)
                    speaks = peer in self._requested
                else:
                    speaks = port not in self._data_ports or _bytes_received(self._spare) >= _FIRST_BYTES
                if not speaks:
                    yield _Found(inode, descriptor, bool(_bytes_received(self._spare)))
            except OSError:  # a listening socket, or closed by its peer
                continue
        self._requested &= connected

    def _opened(self, descriptor: int, inode: int) -> bool:
        """Make `_spare` a duplicate of the TCP socket at `descriptor`; False if that is another file by now."""
        return _becomes(self._spare, descriptor, inode)

    def _find_lowest_free(self) -> float:
        """The lowest free descriptor, ``inf`` if there is none: it grows with the number of open ones.

        It takes microseconds to find, and shows connections that had no edge.
        """
        try:
            descriptor = os.dup(self._unconnected.fileno())
        except OSError:
            return math.inf
        os.close(descriptor)
        return descriptor

    def _release_spare(self) -> None:
        """Drop the duplicate in `_spare`, which would keep its connection open."""
        os.dup2(self._unconnected.fileno(), self._spare.fileno(), inheritable=False)


def listening_socket(port: int) -> socket.socket:
    """A duplicate of the descriptor with which UCX listens on `port`.

    Raises:
        Unreachable: UCX does not listen there.
    """
    for sock in _listening():
        if sock.getsockname()[1] == port:
            return not_inherited(sock)
        sock.close()
    raise Unreachable(f"the listening socket on port {port} cannot be found")


def ports_opened(make: Callable[[], Any]) -> tuple[Any, frozenset[int]]:
    """The result of `make`, and the ports on which this process listens only since then."""
    before = _listening_ports()
    made = make()
    return made, _listening_ports() - before


def confine(listening: socket.socket, host: str) -> None:
    """Confine a listening socket to the interface that has the address `host`; ``0.0.0.0`` means every interface.

    ucxx cannot bind its listener to an address, but the kernel can bind the socket to a device.

    Raises:
        ConfigError: no interface of this machine has the address.
    """
    if host != "0.0.0.0":
        device = _interface(host)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")


def drop_all_packets(listening: socket.socket) -> None:
    """Stop new connections to a listening socket; those that have arrived stay."""
    program = ctypes.create_string_buffer(_RETURN_NOTHING)
    filter_ = _SOCK_FPROG.pack(1, ctypes.addressof(program))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)


# --- descriptors ----------------------------------------------------------------------------------------------


def _sockets() -> Iterator[tuple[int, int]]:
    """Descriptor and inode of each socket of this process."""
    descriptors: Iterable[int]
    try:
        descriptors = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except OSError:  # no descriptor is left to list the folder, so all below the limit are in use
        import resource  # not available on every system that imports this module

        descriptors = range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MAX_TRIED))
    for descriptor in descriptors:
        try:
            found = os.fstat(descriptor)
        except OSError:  # closed: the one that listed the folder, or another thread's
            continue
        if stat.S_ISSOCK(found.st_mode):
            yield descriptor, found.st_ino


def _becomes(sock: socket.socket, descriptor: int, inode: int) -> bool:
    """Make `sock` a duplicate of the TCP socket at `descriptor`; False if that is another file by now.

    `os.dup` would return a new descriptor, which an exception of a signal handler can lose before it has an owner.
    """
    try:
        os.dup2(descriptor, sock.fileno(), inheritable=False)
        return os.fstat(sock.fileno()).st_ino == inode and _is_tcp(sock)
    except OSError:
        return False


def _listening() -> Iterator[socket.socket]:
    """Duplicates of the listening TCP sockets of this process; the caller closes them."""
    for descriptor, inode in _sockets():
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        except OSError:  # no descriptor is left
            return
        if _becomes(sock, descriptor, inode) and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            yield sock
        else:
            sock.close()


def _listening_ports() -> frozenset[int]:
    ports = set()
    for sock in _listening():
        ports.add(sock.getsockname()[1])
        sock.close()
    return frozenset(ports)


def _is_tcp(sock: socket.socket) -> bool:
    option = functools.partial(sock.getsockopt, socket.SOL_SOCKET)
    return (option(socket.SO_DOMAIN), option(socket.SO_TYPE)) == (socket.AF_INET, socket.SOCK_STREAM)


def _bytes_received(sock: socket.socket) -> int:
    (count,) = _BYTES_RECEIVED.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size))
    return int(count)


_REQUEST_ATTRIBUTES = struct.Struct("@Q128xQ")
"""``ucp_conn_request_attr_t``: which fields are wanted, the client's address, the client's id."""

_CLIENT_ADDRESS, _CLIENT_ADDRESS_OFFSET = 1, 8
_SOCKADDR_IN = struct.Struct("=H2s4s")


def _peer_of(request: int) -> Peer | None:
    """The address of a connection request's peer; None if it is not IPv4."""
    query = _request_query()
    attributes = ctypes.create_string_buffer(_REQUEST_ATTRIBUTES.pack(_CLIENT_ADDRESS, 0))
    if query is None or query(request, attributes) != 0:
        return None
    family, port, host = _SOCKADDR_IN.unpack_from(attributes, _CLIENT_ADDRESS_OFFSET)
    return (socket.inet_ntoa(host), int.from_bytes(port, "big")) if family == socket.AF_INET else None


def can_name_peers() -> bool:
    """The loaded UCX has a function for the peer of a connection request."""
    return _request_query() is not None


def _request_query() -> Any:
    arguments = (ctypes.c_void_p, ctypes.c_void_p)
    return library_function("libucp.so.0", "ucp_conn_request_query", arguments, ctypes.c_int)


@functools.cache
def library_function(library: str, name: str, arguments: tuple[Any, ...], result: Any) -> Any:
    """A function of a loaded C library; None if the library does not have it."""
    try:
        function = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = arguments, result
    return function


def _interface(host: str) -> str:
    if is_loopback(host):
        return "lo"
    import fcntl  # not available on every system that imports this module

    try:
        wanted = socket.inet_pton(socket.AF_INET, host)
    except OSError as error:
        raise ConfigError("host", host, _OWN_ADDRESS) from error
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(query, _SIOCGIFADDR, _IFNAME.pack(name.encode()))
                if _IFADDR.unpack(answer)[0] == wanted:
                    return name
    raise ConfigError("host", host, _OWN_ADDRESS)
