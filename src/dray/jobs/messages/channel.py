"""One connection over which two processes of a job exchange messages: two ranks of a policy group, or two nodes.

A message of `dray.jobs.messages.models` is sent as JSON, after its length in 4 bytes in network order. On one
machine the connection is a socket pair: each end notices at once when the other is gone, as the kernel closes the
sockets of a process that has ended. Between machines it is a TCP connection, which also ends when the other
machine is silent (`dray.jobs.messages.auth`).
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from dray.clock import Deadline
from dray.errors import ControlPlaneError
from dray.forking import not_inherited
from dray.jobs.messages.models import ChannelMessage
from dray.jobs.process import StopFlag
from dray.resources import Closing

MAX_MESSAGE = 256 << 20
"""Bytes of one message: the references of the largest batch."""

_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 16
_ADAPTER: TypeAdapter[ChannelMessage] = TypeAdapter(ChannelMessage)
_M = TypeVar("_M", bound=ChannelMessage)


class GroupLostError(ControlPlaneError):
    """Another rank of the policy group is gone: the step is discarded, and this replica must end."""


class FramingError(ControlPlaneError):
    """What was received is not a message."""


class Frames:
    """Splits a stream into the bodies of messages.

    Args:
        limit: bytes that a body may have.
    """

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._received = bytearray()

    def __len__(self) -> int:
        """Bytes that were received and not returned."""
        return len(self._received)

    def feed(self, chunk: bytes) -> None:
        """Add what was received."""
        self._received += chunk

    @property
    def missing(self) -> int:
        """Bytes to receive next for the first message: none of them is of the message after it.

        Raises:
            FramingError: it is announced as larger than allowed.
        """
        return max(0, self._end() - len(self))

    def next(self) -> bytes | None:
        """The body of the first message that was not returned yet, if it was received as a whole.

        Raises:
            FramingError: it is announced as larger than allowed.
        """
        end = self._end()
        if len(self) < end:
            return None
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return body

    def _end(self) -> int:
        """Where the first message ends, or its length if that has not been received yet."""
        if len(self) < _LENGTH.size:
            return _LENGTH.size
        (length,) = _LENGTH.unpack_from(self._received)
        if length > self._limit:
            raise FramingError(f"a message of {length} bytes was announced; at most {self._limit} are allowed")
        return int(_LENGTH.size + length)


def framed(body: bytes) -> bytes:
    """A message with this body as it is sent."""
    return _LENGTH.pack(len(body)) + body


class MessageChannel(Closing):
    """One end of the connection of two processes.

    `send` and `receive` wait, and raise an error when the other end is gone. `post` and `poll` do neither:
    afterwards `lost` states whether it is gone.

    Args:
        connected: a stream socket; closed with the channel.
        peer: the name of the other end, for errors.
        stop: once it is set, the other end has `grace` seconds for each message that is awaited.
        grace: also the seconds within which the other end must read what is sent.
    """

    def __init__(
        self, connected: socket.socket, peer: str, stop: StopFlag | None = None, grace: float = 0.0
    ) -> None:
        self.peer = peer
        self._socket = not_inherited(connected)
        connected.setblocking(False)
        self._grace = grace
        self._frames = Frames()
        self._lost = False
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._lock = threading.Lock()
        if stop is not None:
            stop.on_set(self._wake)

    def fileno(self) -> int:
        """Readable when there is something to receive, or the other end is gone."""
        return self._socket.fileno()

    def send(self, message: ChannelMessage) -> None:
        """Send `message`, or raise `GroupLostError`: the other end is gone, or does not read."""
        try:
            self._send(message, self._grace)
        except OSError as error:
            raise GroupLostError(f"{self.peer} does not accept messages any more: {error}") from error

    def receive(self, kind: type[_M]) -> _M:
        """The next message, as soon as it comes: the other end may train for as long as it takes.

        Raises:
            GroupLostError: the other end is gone, or its message is not a `kind`, or `stop` is set and none
                came in time.
        """
        poll, deadline = select.poll(), Deadline.after(None)
        poll.register(self._socket, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while (message := self._next()) is None:
            if self._lost:
                raise GroupLostError(f"{self.peer} is gone")
            if deadline.expired:
                raise GroupLostError(f"{self.peer} did not answer before the end", elapsed=deadline.elapsed)
            timeout = deadline.timeout
            for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000):
                if descriptor == self._woken:
                    poll.unregister(self._woken)
                    deadline = Deadline.after(self._grace)
                else:
                    self._receive_chunk()
        if not isinstance(message, kind):
            raise GroupLostError(f"{self.peer} sent {message.what!r}, which is not expected here")
        return message

    def post(self, message: ChannelMessage) -> None:
        """Send `message` now. An end that has not read the few messages before it counts as gone."""
        if not self._lost:
            try:
                self._send(message, 0.0)
            except OSError:
                self._lost = True

    def poll(self) -> list[ChannelMessage]:
        """What has come and was not received before."""
        while not self._lost and self._receive_chunk():
            pass
        received = []
        try:
            while (message := self._next()) is not None:
                received.append(message)
        except GroupLostError:  # it has proven that it belongs to the job, but is of another version
            self._lost = True
        return received

    @property
    def lost(self) -> bool:
        """Whether the other end is gone."""
        try:
            self._lost = self._lost or self._socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            pass
        except OSError:
            self._lost = True
        return self._lost

    def finish_sending(self) -> None:
        """Send nothing more; the other end notices once it has received everything."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._lost = True

    def close(self) -> None:
        """Close the connection. Twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = self._lost = True
                self._socket.close()
                os.close(self._woken)

    def _wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._woken, 1)

    def _send(self, message: ChannelMessage, timeout: float) -> None:
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(framed(message.model_dump_json().encode()), socket.MSG_NOSIGNAL)
        finally:
            self._socket.setblocking(False)

    def _receive_chunk(self) -> bool:
        """Receive once; false if there was nothing."""
        try:
            chunk = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        self._lost = self._lost or not chunk
        self._frames.feed(chunk)
        return bool(chunk)

    def _next(self) -> ChannelMessage | None:
        """The first message that was received as a whole.

        Raises:
            GroupLostError: it is not a message.
        """
        try:
            body = self._frames.next()
            return None if body is None else _ADAPTER.validate_json(body)
        except (FramingError, ValidationError) as error:
            raise GroupLostError(f"{self.peer} violates the protocol: {error}") from error
