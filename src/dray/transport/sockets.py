"""What Unix and TCP streams share: messages and payloads over one non-blocking byte stream."""

from __future__ import annotations

import array
import errno
import math
import os
import socket
import weakref
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
from dray.wire.handshake import Lane
from dray.wire.session import Outgoing, Payload

READ_AHEAD = 64 * 1024
MOST_PARTS = 256
"""Buffers in one vectored send; the kernel's limit is 1024."""

_LONGEST_POLL = 2**31 - 1
_REFUSED = {errno.ECONNREFUSED, errno.ENOENT, errno.ENOTSOCK}


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def not_inherited(sock: socket.socket) -> socket.socket:
    """Close the socket in forked children: one that they kept open would hide the death of this process."""
    _sockets.add(sock)
    return sock


def _close_in_child() -> None:
    for sock in list(_sockets):
        sock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


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
            refused = error.errno in _REFUSED
            return Unreachable(f"no connection: {error}", endpoint=endpoint, refused=refused)


def _frames_only(items: Sequence[Outgoing]) -> bytes | None:
    """The items as one message, unless there is a payload among them."""
    frames = [item for item in items if not isinstance(item, Payload)]
    if len(frames) != len(items):
        return None
    return frames[0] if len(frames) == 1 else b"".join(frames)


class SocketStream:
    """A `Stream` over a connected, non-blocking stream socket.

    Args:
        sock: the socket; the stream owns it from now on.
        lane: ``SHM`` for a Unix socket, ``TCP`` for a TCP socket.
        read_ahead: read more than the next message where more is there. A side that receives payloads in band
            turns it off, so that their bytes go straight into place.
    """

    def __init__(self, sock: socket.socket, lane: Lane, read_ahead: bool) -> None:
        sock.setblocking(False)
        self.lane = lane
        self._sock = not_inherited(sock)
        self._read_ahead = read_ahead
        self._inbox = bytearray(READ_AHEAD if read_ahead else 4096)
        self._view = memoryview(self._inbox)
        self._begin = self._end = 0
        self._parts: deque[memoryview] = deque()
        self._descriptor: int | None = None
        self._expected: deque[memoryview] = deque()
        self._filled = 0
        self._dry = False  # nothing more was there at the last look: whoever drives this waits before the next

    def fileno(self) -> int:
        return self._sock.fileno()

    def idle(self) -> bool:
        self._dry = False
        return True

    @property
    def wants_write(self) -> bool:
        return bool(self._parts)

    def receive(self, size: int) -> memoryview | None:
        have = self._end - self._begin
        if have < size and have + self._fill(size - have) < size:
            return None
        begin = self._begin
        self._begin += size
        return self._view[begin : begin + size]

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        parts = self._parts
        if descriptor is not None:
            self._descriptor = descriptor
        elif not parts and (message := _frames_only(items)) is not None:
            # Most of the time frames leave at once and whole.
            try:
                sent = self._sock.send(message)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise from_os_error(error) from error
            self._dry = True
            if sent == len(message):
                return True
            parts.append(memoryview(message)[sent:])
            return False
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
        if self._begin:
            have = self._end - self._begin
            self._inbox[:have] = self._inbox[self._begin : self._end]
            self._begin, self._end = 0, have
        if self._end + missing > len(self._inbox):
            grown = bytearray(self._end + missing)
            grown[: self._end] = self._inbox[: self._end]
            self._inbox, self._view = grown, memoryview(grown)
        room = self._view[self._end :] if self._read_ahead else self._view[self._end : self._end + missing]
        got = self._recv(room)
        self._end += got
        return got

    def _fill_payload(self, target: memoryview) -> bool:
        ahead = min(self._end - self._begin, target.nbytes - self._filled)
        if ahead:
            target[self._filled : self._filled + ahead] = self._view[self._begin : self._begin + ahead]
            self._begin += ahead
            self._filled += ahead
        while self._filled < target.nbytes:
            got = self._recv(target[self._filled :], within=True)
            if not got:
                return False
            self._filled += got
        return True

    def _recv(self, room: memoryview, within: bool = False) -> int:
        """Bytes received; 0 when there are none yet."""
        if self._dry:
            return 0
        try:
            got = self._sock.recv_into(room)
        except BlockingIOError:
            self._dry = True
            return 0
        except OSError as error:
            raise from_os_error(error) from error
        if got:
            self._dry = not within and got < room.nbytes
            return got
        if within or self._end > self._begin:
            raise MessageTruncated("the peer closed the connection within a message")
        raise ConnectionClosed("the peer closed the connection")

    def _sendmsg(self, batch: list[memoryview]) -> int:
        if self._descriptor is None:
            return self._sock.send(batch[0]) if len(batch) == 1 else self._sock.sendmsg(batch)
        rights = array.array("i", [self._descriptor])
        sent = self._sock.sendmsg(batch, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._descriptor = None
        return sent

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else f"fd {self._sock.fileno()}"
        return f"<{type(self).__name__} {self.lane.label} {state}>"
