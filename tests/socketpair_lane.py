"""A lane that a test adds: messages and payloads over a socket pair, within one process."""

import itertools
import os
import socket
from collections import deque

from dray.clock import Deadline
from dray.errors import Unreachable
from dray.transport.lanes.base import Endpoint, Lane, ListenAt, Listener, Stream, Worker
from dray.transport.lanes.socket import SocketStream
from dray.transport.polling import CloseEvent


class SocketPairListener(Listener):
    def __init__(self, lane: "SocketPairLane", name: str) -> None:
        self.endpoint = lane.endpoint(name)
        self._lane = lane
        self._name = name
        self._connected: deque[socket.socket] = deque()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        lane.listeners[name] = self

    def fileno(self) -> int:
        return self._event

    def connect(self) -> socket.socket:
        """The client's end of a new connection."""
        mine, theirs = socket.socketpair()
        self._connected.append(theirs)
        os.eventfd_write(self._event, 1)
        return mine

    def accept(self) -> Stream | None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return None
        return SocketStream(self._connected.popleft(), self._lane, accepted=True)

    def close(self) -> None:
        if self._lane.listeners.pop(self._name, None) is not None:
            os.close(self._event)
            for sock in self._connected:
                sock.close()


class SocketPairLane(Lane):
    name, number, scheme, form = "pair", 200, "pair", "pair:NAME"
    local = True

    def __init__(self) -> None:
        self.listeners: dict[str, SocketPairListener] = {}
        self._names = map(str, itertools.count())

    def parse_address(self, text: str) -> tuple[str, int] | None:
        return (text, 0) if text.isdecimal() else None

    def format_address(self, host: str, port: int) -> str:
        return host

    def connect(
        self,
        address: Endpoint,
        deadline: Deadline,
        worker: Worker | None = None,
        closing: CloseEvent | None = None,
    ) -> Stream:
        listener = self.listeners.get(address.host)
        if listener is None:
            raise Unreachable("no server listens there", endpoint=str(address), refused=True)
        return SocketStream(listener.connect(), self)

    def listen(self, place: ListenAt) -> Listener:
        return SocketPairListener(self, next(self._names))


ADDED = SocketPairLane()
"""One for all tests of a process: addresses are parsed once."""
