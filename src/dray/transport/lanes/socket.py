"""What Unix and TCP streams share: messages and payloads over one non-blocking byte stream."""

from __future__ import annotations

import array
import errno
import math
import socket
from collections import deque
from collections.abc import Sequence

from dray.clock import Deadline
from dray.errors import (
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.forking import not_inherited
from dray.protocol.contract import Outgoing, Payload
from dray.protocol.handshake import Lane
from dray.resources import out_of_resources

READ_AHEAD = 64 * 1024
UNPROVEN_READ_AHEAD = 256
"""Of an accepted connection until many messages are asked for together: the handshake's have at most 64 bytes."""

MOST_PARTS = 256
"""Buffers in one vectored send; the kernel's limit is 1024."""

_FEW, _MUCH = 64 * 1024, 256 * 1024
"""While more than a few bytes of a payload are missing, a reader of TCP is woken for many at a time."""

# In the kernel's `struct tcp_info`: the bytes that the peer has acknowledged and those that came from it, and the
# window that it offers, which grows while it reads what it has acknowledged. Older kernels' structures end before.
_TCP_INFO_BYTES = 232
_TCP_BYTES = slice(120, 136)
_TCP_SEND_WINDOW = slice(228, 232)

NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""Flag for every send: where the program has restored SIGPIPE, a peer that is gone must not end the process."""

_LONGEST_POLL = 2**31 - 1
_REFUSED = {errno.ECONNREFUSED, errno.ENOENT, errno.ENOTSOCK}


def make_socket(family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
    """A new socket.

    Raises:
        OutOfResources: no descriptor is left for it.
        Unreachable: this system has no such sockets.
    """
    try:
        return socket.socket(family, kind, protocol)
    except OSError as error:
        raise from_os_error(error) from error


def poll_timeout(deadline: Deadline) -> float | None:
    """What is left, as `select.poll` takes it: milliseconds, of which it takes 24 days at most."""
    milliseconds = deadline.remaining * 1000
    return milliseconds if milliseconds < _LONGEST_POLL else None if deadline.at == math.inf else _LONGEST_POLL


def from_os_error(error: OSError, endpoint: str | None = None) -> TransportError:
    """The dray error that an operating system's error on a socket stands for, by type."""
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


def _messages_only(items: Sequence[Outgoing]) -> bytes | None:
    """The items in one piece, unless there is a payload among them."""
    if len(items) == 1:
        item = items[0]
        return None if isinstance(item, Payload) else item
    messages = [item for item in items if not isinstance(item, Payload)]
    return b"".join(messages) if len(messages) == len(items) else None


class SocketStream:
    """A `Stream` over a connected, non-blocking stream socket.

    Args:
        sock: the socket; the stream owns it from now on.
        lane: ``SHM`` for a Unix socket, ``TCP`` for a TCP socket.
        accepted: it is the server's end, which has little memory until the peer has proven the secret.
    """

    def __init__(self, sock: socket.socket, lane: Lane, accepted: bool = False) -> None:
        sock.setblocking(False)
        self.lane = lane
        self._sock = not_inherited(sock)
        self._inbox = bytearray(UNPROVEN_READ_AHEAD if accepted else READ_AHEAD)
        self._view = memoryview(self._inbox)
        self._begin = self._end = 0
        self._parts: deque[memoryview] = deque()
        self._descriptor: int | None = None
        self._expected: deque[memoryview] = deque()
        self._filled = 0
        self._wakes_late = lane is Lane.TCP
        self._awaits = 1
        self._dry = False  # nothing more was there at the last look: whoever drives this waits before the next

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

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        parts = self._parts
        if descriptor is None and not parts and (message := _messages_only(items)) is not None:
            # Most of the time messages leave at once and whole.
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
        if descriptor is not None:
            self._descriptor = descriptor
        for item in items:
            view = item.view if isinstance(item, Payload) else memoryview(item)
            if view.nbytes:
                parts.append(view)
        return self.flush()

    def flush(self) -> bool:
        parts = self._parts
        while parts:
            batch = [parts[i] for i in range(min(len(parts), MOST_PARTS))]
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

    def expect(self, target: memoryview, tag: int) -> None:
        self._expected.append(target)

    def payload_arrived(self, nbytes: int) -> bool:
        target = self._expected[0]
        if nbytes:
            if nbytes != target.nbytes:
                raise MessageTruncated(f"the payload has {nbytes} bytes, expected were {target.nbytes}")
            if not self._fill_payload(target):
                return False
        self._expected.popleft()
        self._filled = 0
        return True

    def progress(self) -> object:
        if self.lane is not Lane.TCP:
            return None
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # the connection has failed: it makes no progress
            return None
        return info[_TCP_BYTES], info[_TCP_SEND_WINDOW]

    def close(self) -> None:
        self._parts.clear()
        self._expected.clear()
        self._dry = False
        self._sock.close()

    @property
    def drained(self) -> bool:
        return self._sock.fileno() < 0

    # --- the socket -------------------------------------------------------------------------------------------

    def _fill(self, missing: int) -> int:
        """Read towards a message that lacks `missing` bytes; the bytes read."""
        begin, end = self._begin, self._end
        if begin == end and not self._expected and missing <= len(self._inbox):
            self._begin = self._end = 0
            got = self._recv(self._inbox)
        else:
            if begin:
                self._inbox[: end - begin] = self._inbox[begin:end]
                self._begin, self._end = 0, end - begin
            if self._end + missing > len(self._inbox):
                self._grow(self._end + missing)
            # More than the next message, unless a payload is to go straight into its place.
            got = self._recv(self._view[self._end : self._end + missing if self._expected else None])
        self._end += got
        return got

    def _grow(self, nbytes: int) -> None:
        grown = bytearray(nbytes)
        grown[: self._end] = self._inbox[: self._end]
        self._inbox, self._view = grown, memoryview(grown)

    def _fill_payload(self, target: memoryview) -> bool:
        ahead = min(self._end - self._begin, target.nbytes - self._filled)
        if ahead:
            target[self._filled : self._filled + ahead] = self._view[self._begin : self._begin + ahead]
            self._begin += ahead
            self._filled += ahead
        while self._filled < target.nbytes and not self._dry:
            got = self._recv(target[self._filled :], within=True)
            self._filled += got
        missing = target.nbytes - self._filled
        if self._wakes_late:
            self._await(min(missing, _MUCH) if missing > _FEW else 1)
        return not missing

    def _await(self, nbytes: int) -> None:
        """Have the socket become readable when so much has come, or the connection has ended."""
        if nbytes != self._awaits:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self._awaits = nbytes

    def _recv(self, room: memoryview | bytearray, within: bool = False) -> int:
        """Bytes received; 0 when there are none yet."""
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
        if self._descriptor is None:
            if len(batch) == 1:
                return self._sock.send(batch[0], NO_SIGNAL)
            return self._sock.sendmsg(batch, (), NO_SIGNAL)
        rights = array.array("i", [self._descriptor])
        sent = self._sock.sendmsg(batch, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], NO_SIGNAL)
        self._descriptor = None
        return sent

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else f"fd {self._sock.fileno()}"
        return f"<{type(self).__name__} {self.lane.label} {state}>"
