"""The lanes over sockets: ``shm`` over Unix sockets, whose payloads stay in the segment, and ``tcp``.

Both send messages over one non-blocking byte stream; ``tcp`` sends payloads over it as well.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dray import admission
from dray.clock import Deadline
from dray.errors import (
    AuthenticationError,
    ConfigError,
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.forking import not_inherited
from dray.private_directory import MAX_SOCKET_PATH
from dray.protocol.frames import Outgoing, Payload
from dray.resources import descriptors_exhausted, keep_result, out_of_resources
from dray.text import bytes_of, path_of, text_of
from dray.transport.lanes.base import Endpoint, HostPortLane, Lane, ListenAt, Listener, Stream, Worker
from dray.transport.polling import CloseEvent, PollWaiter, addresses_of

READ_AHEAD = 64 * 1024
UNPROVEN_READ_AHEAD = 256
"""The same for an accepted connection during the handshake, whose messages have at most 64 bytes."""

MAX_PARTS = 256
"""Buffers in one vectored send; the kernel's limit is 1024."""

MAX_DESCRIPTORS = 8
"""Descriptors that are received with one message."""

_FEW, _MANY = 64 * 1024, 256 * 1024
"""While more than `_FEW` bytes of a payload are missing, a reader of TCP wakes for up to `_MANY` at a time."""

# In the kernel's `struct tcp_info`: the bytes that the peer has acknowledged and the bytes received from it, and
# the window that the peer offers, which grows while the peer reads. Structures of older kernels end before the
# window.
_TCP_INFO_BYTES = 232
_TCP_BYTES = slice(120, 136)
_TCP_SEND_WINDOW = slice(228, 232)

_UCRED = struct.Struct("3i")
_DESCRIPTOR = struct.Struct("@i")
_TIMEVAL = struct.Struct("@ll")

NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""Flag of every send: a lost peer must not end the process where the program has restored SIGPIPE."""

_REFUSED = {errno.ECONNREFUSED, errno.ENOENT, errno.ENOTSOCK}

SocketAddress = bytes | tuple[Any, ...]


class SocketStream(Stream):
    """A `Stream` over a connected stream socket.

    Args:
        sock: the socket; the stream owns it from now on.
        lane: the lane of the connection.
        accepted: this is the server's end, which uses little memory until the peer has proven the secret.
    """

    def __init__(self, sock: socket.socket, lane: Lane, accepted: bool = False) -> None:
        sock.setblocking(False)
        self.lane = lane
        self._sock = not_inherited(sock)
        self._inbox = bytearray(UNPROVEN_READ_AHEAD if accepted else READ_AHEAD)
        self._view = memoryview(self._inbox)
        self._begin = self._end = 0
        self._parts: deque[memoryview] = deque()
        self._descriptors: Sequence[int] = ()
        self.expected: deque[memoryview] = deque()
        self.filled = 0
        self._low_water = 1
        self._dry = False  # the last read emptied the socket: `idle` and a wait come before the next read

    def fileno(self) -> int:
        return self._sock.fileno()

    def idle(self) -> bool:
        self._dry = False
        return True

    @property
    def wants_write(self) -> bool:
        return bool(self._parts)

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        begin, end = self._begin, self._end
        if end - begin < size:
            if most > 1 and len(self._inbox) < READ_AHEAD:
                self._grow(READ_AHEAD)
            if self._dry or not self._fill(size - end + begin) or self._end - self._begin < size:
                return None
            begin, end = self._begin, self._end
        if most > 1:
            size *= min(most, (end - begin) // size)
        self._begin = begin + size
        return self._view[begin : begin + size]

    def send(self, items: Sequence[Outgoing], descriptors: Sequence[int] = ()) -> bool:
        parts = self._parts
        if not descriptors and not parts and (message := messages_only(items)) is not None:
            # Most messages leave at once and whole.
            try:
                sent = self._sock.send(message, NO_SIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise from_os_error(error) from error
            self._dry = True
            if sent == len(message):
                return True
            parts.append(memoryview(message)[sent:])
            return False
        if descriptors:
            self._descriptors = descriptors
        for item in items:
            view = item.view if isinstance(item, Payload) else memoryview(item)
            if view.nbytes:
                parts.append(view)
        return self.flush()

    def flush(self) -> bool:
        parts = self._parts
        while parts:
            batch = [parts[i] for i in range(min(len(parts), MAX_PARTS))]
            try:
                sent = self._sendmsg(batch)
            except BlockingIOError:
                return False
            except OSError as error:
                raise from_os_error(error) from error
            while sent:
                if sent < parts[0].nbytes:
                    parts[0] = parts[0].cast("B")[sent:]
                    break
                sent -= parts.popleft().nbytes
            self._dry = True
        return True

    def expect(self, target: memoryview) -> int:
        self.expected.append(target)
        return 0

    def reserve(self) -> int:
        return 0

    def expect_reserved(self, targets: Sequence[memoryview]) -> None:
        self.expected += targets

    def payload_arrived(self, nbytes: int) -> bool:
        target = self.expected[0]
        if nbytes:
            if nbytes != target.nbytes:
                raise MessageTruncated(f"the payload has {nbytes} bytes instead of {target.nbytes}")
            if not self._fill_payload(target):
                return False
        self.expected.popleft()
        self.filled = 0
        return True

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._parts.clear()
        self.expected.clear()
        self._dry = False
        self._sock.close()

    @property
    def drained(self) -> bool:
        return self._sock.fileno() < 0

    # --- the socket -------------------------------------------------------------------------------------------

    def _fill(self, missing: int) -> int:
        """Read for a message that lacks `missing` bytes; returns the number of bytes read."""
        begin, end = self._begin, self._end
        if begin == end and not self.expected and missing <= len(self._inbox):
            self._begin = self._end = 0
            got = self._recv(self._inbox)
        else:
            if begin:
                self._inbox[: end - begin] = self._inbox[begin:end]
                self._begin, self._end = 0, end - begin
            if self._end + missing > len(self._inbox):
                self._grow(self._end + missing)
            # Read ahead, unless a payload follows: its bytes must go directly into its own memory.
            got = self._recv(self._view[self._end : self._end + missing if self.expected else None])
        self._end += got
        return got

    def _grow(self, nbytes: int) -> None:
        grown = bytearray(nbytes)
        grown[: self._end] = self._inbox[: self._end]
        self._inbox, self._view = grown, memoryview(grown)

    def _fill_payload(self, target: memoryview) -> bool:
        ahead = min(self._end - self._begin, target.nbytes - self.filled)
        if ahead:
            target[self.filled : self.filled + ahead] = self._view[self._begin : self._begin + ahead]
            self._begin += ahead
            self.filled += ahead
        while self.filled < target.nbytes and not self._dry:
            got = self._recv(target[self.filled :], within=True)
            self.filled += got
        missing = target.nbytes - self.filled
        low_water = min(missing, _MANY) if missing > _FEW else 1
        if low_water != self._low_water:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water
        return not missing

    def _recv(self, room: memoryview | bytearray, within: bool = False) -> int:
        """The number of bytes received; 0 if there are none yet."""
        try:
            got = self._sock.recv_into(room)
        except BlockingIOError:
            self._dry = True
            return 0
        except OSError as error:
            raise from_os_error(error) from error
        if got:
            self._dry = not within and got < len(room)
            return got
        if within or self._end > self._begin:
            raise MessageTruncated("the peer closed the connection within a message")
        raise ConnectionClosed("the peer closed the connection")

    def _sendmsg(self, batch: list[memoryview]) -> int:
        if not self._descriptors:
            if len(batch) == 1:
                return self._sock.send(batch[0], NO_SIGNAL)
            return self._sock.sendmsg(batch, (), NO_SIGNAL)
        rights = array.array("i", self._descriptors)
        sent = self._sock.sendmsg(batch, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], NO_SIGNAL)
        self._descriptors = ()
        return sent

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else f"fd {self._sock.fileno()}"
        return f"<{type(self).__name__} {state}{', sending' if self._parts else ''}>"


class TcpStream(SocketStream):
    """A stream over a TCP connection."""

    def __init__(self, sock: socket.socket, lane: Lane, accepted: bool = False) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            raise from_os_error(error) from error
        super().__init__(sock, lane, accepted)

    def progress(self) -> object:
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # the connection has failed
            return None
        return info[_TCP_BYTES], info[_TCP_SEND_WINDOW]


class UnixStream(SocketStream):
    """A stream over a Unix socket. The segment's descriptor comes with the last message of the handshake."""

    def __init__(self, sock: socket.socket, lane: Lane, accepted: bool = False) -> None:
        super().__init__(sock, lane, accepted)
        if accepted:
            credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            self.peer_pid, self.peer_uid, _ = _UCRED.unpack(credentials)

    def receive_with_descriptors(self, size: int, taken: list[int]) -> bytes | None:
        received: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = []
        room = socket.CMSG_LEN(MAX_DESCRIPTORS * _DESCRIPTOR.size)
        try:
            keep_result(received, self._sock.recvmsg, size, room)
            ((message, ancillary, flags, _),) = received
            if not message:
                raise ConnectionClosed("the peer closed the connection")
            if len(message) != size:
                raise MessageTruncated(f"the handshake ended after {len(message)} of {size} bytes")
            if flags & socket.MSG_CTRUNC:
                # The kernel drops descriptors if the receiver has no free numbers for them.
                exhausted = descriptors_exhausted("the descriptors of shared memory")
                raise exhausted or MessageTruncated("not all descriptors of shared memory came with the handshake")
            found = received_descriptors(ancillary)
        except BaseException as error:
            for _, ancillary, _, _ in received:
                for descriptor in received_descriptors(ancillary):
                    os.close(descriptor)
            if received or not isinstance(error, OSError):
                raise
            if isinstance(error, BlockingIOError):
                self._dry = True
                return None
            raise from_os_error(error) from error
        taken += found  # no call since the end of the block, in which an exception would have closed them
        return message


def received_descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message of a Unix socket. They are the caller's to close."""
    found: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(data) - len(data) % _DESCRIPTOR.size
            found += (number for (number,) in _DESCRIPTOR.iter_unpack(data[:whole]))
    return found


# --- listening ------------------------------------------------------------------------------------------------


class SocketListener(Listener):
    """What both listeners share: a non-blocking socket, and connections that the kernel accepts."""

    def __init__(self, sock: socket.socket, endpoint: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.endpoint = endpoint

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def _accept(self) -> socket.socket | None:
        try:
            return admission.accept(self._sock)
        except OSError as error:
            raise from_os_error(error) from error


class UnixListener(SocketListener):
    """Listens on a path; accepts only processes of this user."""

    def __init__(self, path: Path) -> None:
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise ConfigError("socket path", str(path), f"at most {MAX_SOCKET_PATH} bytes")
        self.path = path
        endpoint = SHM.endpoint(text_of(path))
        sock = not_inherited(make_socket(socket.AF_UNIX))
        try:
            sock.bind(os.fsencode(path))
            sock.listen(admission.BACKLOG)
        except OSError as error:
            sock.close()
            raise from_os_error(error, endpoint) from error
        super().__init__(sock, endpoint)

    def accept(self) -> UnixStream | None:
        """The next connection; None if there is none.

        Raises:
            AuthenticationError: the peer is a process of another user; its connection is closed.
        """
        sock = self._accept()
        if sock is None:
            return None
        stream = UnixStream(sock, SHM, accepted=True)
        if stream.peer_uid != os.getuid():
            stream.close()
            raise AuthenticationError(
                f"process {stream.peer_pid} belongs to user {stream.peer_uid}, not to this one",
                endpoint=self.endpoint,
            )
        return stream

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            super().close()
            self.path.unlink(missing_ok=True)


class TcpListener(SocketListener):
    """Listens at a numeric address, on the first free one of `ports`; port 0 is any."""

    def __init__(self, host: str, ports: range = range(1)) -> None:
        try:
            sock = not_inherited(make_socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        except Unreachable as error:
            allowed = f"an address of a kind that this machine's kernel has ({error.message})"
            raise ConfigError("host", host, allowed) from error
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind_first_free(sock, host, ports)
            sock.listen(admission.BACKLOG)
        except BaseException:
            sock.close()
            raise
        super().__init__(sock, TCP.endpoint(host, sock.getsockname()[1]))

    def accept(self) -> TcpStream | None:
        sock = self._accept()
        try:
            return None if sock is None else TcpStream(sock, TCP, accepted=True)
        except TransportError:  # the connection has already ended
            return None


def make_socket(family: int) -> socket.socket:
    """A new stream socket; raises as `from_os_error`."""
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise from_os_error(error) from error


def bind_first_free(sock: socket.socket, host: str, ports: range) -> None:
    """Bind to the first free port of `ports`.

    Raises:
        ConfigError: this machine has no such address, or no port is free.
    """
    for candidate in ports:
        try:
            sock.bind((host, candidate))
            return
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ConfigError("host", host, f"an address of this machine ({error.strerror or error})") from error
    raise no_free_port(ports)


def no_free_port(ports: range) -> ConfigError:
    """The error if every port that was tried is in use."""
    if len(ports) == 1:
        return ConfigError("port", ports[0], "0, or a port that is not in use")
    return ConfigError(
        "port", ports[0], f"0, or a port with a free one among itself and the next {len(ports) - 1}"
    )


# --- connecting -----------------------------------------------------------------------------------------------


class ShmLane(Lane):
    """Connects processes of one user on one host: messages over a Unix socket, payloads in the segment."""

    name, number, scheme, form = "shm", 1, "unix", "unix:PATH"
    in_band = False
    local = True

    def parse_address(self, text: str) -> tuple[str, int] | None:
        try:
            encoded = bytes_of(text)
        except UnicodeEncodeError:
            return None
        return (text, 0) if 0 < len(encoded) <= MAX_SOCKET_PATH and b"\0" not in encoded else None

    def format_address(self, host: str, port: int) -> str:
        return host

    def connect(
        self,
        address: Endpoint,
        deadline: Deadline,
        worker: Worker | None = None,
        closing: CloseEvent | None = None,
    ) -> UnixStream:
        """See `Lane.connect`.

        The folder of a socket exists while its server does. If it is missing, the socket belongs to another host:
        `Unreachable.elsewhere`.
        """
        try:
            sock = connect_socket(socket.AF_UNIX, bytes_of(address.host), deadline, str(address))
        except Unreachable as error:
            error.elsewhere = error.refused and not path_of(address.host).parent.is_dir()
            raise
        return UnixStream(sock, self)

    def listen(self, place: ListenAt) -> UnixListener:
        assert place.path is not None
        return UnixListener(place.path)


class TcpLane(HostPortLane):
    """Connects any two machines: messages and payloads over one TCP connection."""

    name, number, scheme, form = "tcp", 2, "tcp", "tcp:HOST:PORT"

    def connect(
        self,
        address: Endpoint,
        deadline: Deadline,
        worker: Worker | None = None,
        closing: CloseEvent | None = None,
    ) -> TcpStream:
        """See `Lane.connect`. Tries each address of the host in turn."""
        endpoint = str(address)
        failure: Unreachable | None = None
        found = addresses_of(address.host, address.port, deadline, endpoint=endpoint, closing=closing)
        for family, place in found:
            try:
                sock = connect_socket(family, place, deadline, endpoint, closing=closing)
            except Unreachable as error:
                failure = error
                continue
            return TcpStream(sock, self)
        raise failure or Unreachable("the host has no address", endpoint=endpoint)

    def listen(self, place: ListenAt) -> TcpListener:
        return TcpListener(place.host, place.ports)


SHM = ShmLane()
TCP = TcpLane()


def connect_socket(
    family: int,
    address: SocketAddress,
    deadline: Deadline,
    endpoint: str,
    *,
    closing: CloseEvent | None = None,
) -> socket.socket:
    """A connected, non-blocking socket; raises as `Lane.connect`."""
    sock = make_socket(family)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            waiter = PollWaiter(closing)
            waiter.wait_for(sock.fileno(), select.POLLOUT, deadline, awaited="the connection", endpoint=endpoint)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        elif code == errno.EAGAIN:
            code = _connect_to_full_backlog(sock, address, deadline)
        if code == errno.EAGAIN:
            raise TransportTimeout("the server accepts no connection", endpoint=endpoint, elapsed=deadline.elapsed)
        if code:
            raise from_os_error(OSError(code, os.strerror(code)), endpoint)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_to_full_backlog(sock: socket.socket, address: SocketAddress, deadline: Deadline) -> int:
    """Wait for a Unix socket whose backlog is full: `poll` reports no event for it, so the kernel waits."""
    left = 0.0 if deadline.timeout is None else max(deadline.remaining, 0.001)  # 0 is no limit
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(left), int(left % 1 * 1e6)))
    sock.setblocking(True)
    code = sock.connect_ex(address)
    sock.setblocking(False)
    return code


def from_os_error(error: OSError, endpoint: str | None = None) -> TransportError:
    """The dray error for an error of a system call on a socket."""
    match error:
        case TimeoutError():
            return TransportTimeout(f"the kernel gave up on the connection: {error}", endpoint=endpoint)
        case ConnectionResetError() | BrokenPipeError() | ConnectionAbortedError():
            return ConnectionReset(f"the connection was reset: {error}", endpoint=endpoint)
        case _:
            if (exhausted := out_of_resources(error, "a connection", endpoint)) is not None:
                return exhausted
            refused = error.errno in _REFUSED
            return Unreachable(f"no connection: {error}", endpoint=endpoint, refused=refused)


def messages_only(items: Sequence[Outgoing]) -> bytes | None:
    """The items joined; None if one of them is a payload."""
    if len(items) == 1:
        item = items[0]
        return None if isinstance(item, Payload) else item
    messages = [item for item in items if not isinstance(item, Payload)]
    return b"".join(messages) if len(messages) == len(items) else None
