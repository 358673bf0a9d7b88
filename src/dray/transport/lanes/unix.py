"""The Unix-socket stream of the `shm` lane: frames travel here, payloads stay in the shared segment."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from pathlib import Path
from typing import Any

from dray import admission
from dray.clock import Deadline
from dray.errors import (
    AuthenticationError,
    ConfigError,
    MessageTruncated,
    TransportTimeout,
    Unreachable,
)
from dray.forking import not_inherited
from dray.path_text import bytes_of, path_of, text_of
from dray.private_directory import MAX_SOCKET_PATH
from dray.protocol.handshake import Lane
from dray.resources import descriptors_exhausted, keep_result
from dray.transport.lanes.socket import SocketStream, from_os_error, make_socket
from dray.transport.polling import PollWaiter, Wake

_UCRED = struct.Struct("3i")
_DESCRIPTOR = struct.Struct("@i")
_TIMEVAL = struct.Struct("@ll")


class UnixStream(SocketStream):
    """A `Stream` over a Unix socket.

    The message that ends the handshake brings the segment's descriptor: `receive_descriptor` takes it.
    """

    def __init__(self, sock: socket.socket, accepted: bool = False) -> None:
        super().__init__(sock, Lane.SHM, accepted)

    def receive_descriptor(self, size: int) -> tuple[bytes, int] | None:
        """The next message together with the descriptor it carries, or None if it is not here yet.

        The descriptor is the caller's to close.

        Raises:
            OutOfResources: no descriptor was left to receive it.
        """
        received: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = []
        try:
            keep_result(received, self._sock.recvmsg, size, socket.CMSG_LEN(_DESCRIPTOR.size))
            ((message, ancillary, flags, _),) = received
            if len(message) != size:
                raise MessageTruncated(f"the handshake ended after {len(message)} of {size} bytes")
            descriptor = _descriptor(ancillary)
            if descriptor < 0 and flags & socket.MSG_CTRUNC:
                # The kernel drops a descriptor for which the receiver has no number.
                exhausted = descriptors_exhausted("the segment's descriptor")
                raise exhausted or MessageTruncated("the segment's descriptor did not come with the handshake")
        except BaseException as error:
            for _, ancillary, _, _ in received:
                if (descriptor := _descriptor(ancillary)) >= 0:
                    os.close(descriptor)
            if received or not isinstance(error, OSError):
                raise
            if isinstance(error, BlockingIOError):
                return None
            raise from_os_error(error) from error
        return message, descriptor

    def peer(self) -> tuple[int, int]:
        """(pid, uid) of the process at the other end, as the kernel knows them."""
        pid, uid, _gid = _UCRED.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return pid, uid


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The descriptor that came with a message, or -1."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) == _DESCRIPTOR.size:
            (descriptor,) = _DESCRIPTOR.unpack(data)
            return int(descriptor)
    return -1


class UnixListener:
    """Listens on a path; only this user's processes get a stream."""

    def __init__(self, path: Path) -> None:
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise ConfigError("socket path", str(path), f"at most {MAX_SOCKET_PATH} bytes")
        self.path = path
        self.endpoint = f"unix:{text_of(path)}"
        self._sock = not_inherited(make_socket(socket.AF_UNIX))
        try:
            self._sock.bind(os.fsencode(path))
            self._sock.listen(admission.BACKLOG)
        except OSError as error:
            self._sock.close()
            raise from_os_error(error, self.endpoint) from error
        self._sock.setblocking(False)

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> UnixStream | None:
        """The next connection, or None when there is none.

        Raises:
            AuthenticationError: it came from another user's process; it is closed.
        """
        sock = accept(self._sock)
        if sock is None:
            return None
        stream = UnixStream(sock, accepted=True)
        pid, uid = stream.peer()
        if uid != os.getuid():
            stream.close()
            raise AuthenticationError(f"process {pid} of user {uid} is not this user's", endpoint=self.endpoint)
        return stream

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._sock.close()
            self.path.unlink(missing_ok=True)


def accept(listening: socket.socket) -> socket.socket | None:
    """The next connection of a non-blocking listening socket, or None."""
    try:
        return admission.accept(listening)
    except OSError as error:
        raise from_os_error(error) from error


def connect(path: str, deadline: Deadline) -> UnixStream:
    """Connect to a server's Unix socket.

    Args:
        path: as `dray.path_text` has it.

    Raises:
        Unreachable: there is no such socket, or nobody listens on it; without even its folder, which is there as
            long as a server lives, the socket is another host's.
        TransportTimeout: its backlog stayed full until the deadline.
        OutOfResources: no descriptor is left for the connection.
    """
    address = bytes_of(path)
    sock = make_socket(socket.AF_UNIX)
    try:
        connect_socket(sock, address, deadline, f"unix:{path}")
    except Unreachable as error:
        sock.close()
        error.elsewhere = error.refused and not path_of(path).parent.is_dir()
        raise
    except BaseException:
        sock.close()
        raise
    return UnixStream(sock)


SocketAddress = bytes | tuple[Any, ...]


def connect_socket(
    sock: socket.socket, address: SocketAddress, deadline: Deadline, endpoint: str, wake: Wake | None = None
) -> None:
    """Connect within the deadline, by a non-blocking connect and a bounded wait."""
    sock.setblocking(False)
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        PollWaiter(wake).wait_for(sock.fileno(), select.POLLOUT, deadline, "the connection", endpoint)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    elif code == errno.EAGAIN:
        code = _connect_to_full_backlog(sock, address, deadline)
    if code == errno.EAGAIN:
        raise TransportTimeout("the server does not accept", endpoint=endpoint, elapsed=deadline.elapsed)
    if code:
        raise from_os_error(OSError(code, os.strerror(code)), endpoint)


def _connect_to_full_backlog(sock: socket.socket, address: SocketAddress, deadline: Deadline) -> int:
    """A Unix socket whose backlog is full gives no event to wait for; the kernel waits, for the send time-out."""
    left = 0.0 if deadline.timeout is None else max(deadline.remaining, 0.001)  # zero means no bound here
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(left), int(left % 1 * 1e6)))
    sock.setblocking(True)
    code = sock.connect_ex(address)
    sock.setblocking(False)
    return code
