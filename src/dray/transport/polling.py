"""Waits for descriptors: each under a deadline, and each ended at once when its client is closed."""

from __future__ import annotations

import os
import select
import threading

from dray.clock import Deadline
from dray.errors import BufferClosedError, TransportTimeout
from dray.name_resolution import AWAITED, Address, resolve
from dray.resources import needing
from dray.transport.lanes.base import Stream
from dray.transport.lanes.socket import poll_timeout
from dray.transport.spinning import Spinning


class Wake:
    """Ends the waits of one client, those that have begun and those that have not.

    Its descriptor is closed with the last wait, so that none of them can see another one under its number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        with needing("a client"):
            self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waits: set[Spinning] = set()
        self._woken = False

    def close(self) -> None:
        """End every wait with `BufferClosedError`. Twice is fine."""
        with self._lock:
            self._woken = True
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)
        self._close_unused()

    def watch(self, poll: select.poll) -> None:
        """Have `poll` see the end; before its first wait."""
        with self._lock:
            if self._descriptor >= 0:
                poll.register(self._descriptor, select.POLLIN)

    def wait(self, poll: Spinning, deadline: Deadline) -> bool:
        """Wait for what `poll` looks at; False if the deadline came first.

        Raises:
            BufferClosedError: the client is closed.
        """
        found: object = False
        # In this order, without the lock: who closes sees this wait, or this wait sees the end.
        try:
            self._waits.add(poll)
            if not self._woken:
                found = poll(poll_timeout(deadline))
        finally:
            self._waits.discard(poll)
            if self._woken:
                self._close_unused()
        if self._woken:
            raise BufferClosedError("the client was closed while it waited")
        return bool(found)

    def _close_unused(self) -> None:
        with self._lock:
            if not self._waits and self._descriptor >= 0:
                unused, self._descriptor = self._descriptor, -1
                os.close(unused)


class PollWaiter:
    """Waits for one descriptor at a time.

    Args:
        wake: ends the wait; without it, only the deadline does.
    """

    __slots__ = ("_events", "_poll", "_spinning", "_wake")

    def __init__(self, wake: Wake | None) -> None:
        self._poll = select.poll()
        self._spinning = Spinning(self._poll.poll)
        self._wake = wake
        self._events = 0
        if wake is not None:
            wake.watch(self._poll)

    def wait(self, stream: Stream, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """Wait until the stream, which is `idle` and always the same one, has something to do.

        Raises:
            TransportTimeout: the deadline came first; the message says what was awaited.
            BufferClosedError: the client is closed.
        """
        # For room alone: what has come meanwhile, or an end, would be found again and again.
        events = select.POLLOUT if stream.wants_write else select.POLLIN
        if events != self._events:
            self._poll.register(stream.fileno(), events)
            self._events = events
        self._wait(deadline, awaited, endpoint)

    def wait_for(self, descriptor: int, events: int, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """Wait for events of a descriptor that is no stream's yet; otherwise like `wait`."""
        self._poll.register(descriptor, events)
        try:
            self._wait(deadline, awaited, endpoint)
        finally:
            self._poll.unregister(descriptor)

    def _wait(self, deadline: Deadline, awaited: str, endpoint: str) -> None:
        wake = self._wake
        spinning = self._spinning
        if not (wake.wait(spinning, deadline) if wake is not None else spinning(poll_timeout(deadline))):
            raise timed_out(deadline, awaited, endpoint)


def addresses_of(host: str, port: int, deadline: Deadline, endpoint: str, wake: Wake | None) -> list[Address]:
    """The addresses of a server's host, in the order in which they are to be tried.

    Raises:
        Unreachable: the host is unknown.
        TransportTimeout: the name server did not answer before the deadline.
        BufferClosedError: the client is closed.
    """

    def wait(descriptor: int) -> None:
        PollWaiter(wake).wait_for(descriptor, select.POLLIN, deadline, AWAITED, endpoint)

    return resolve(host, port, deadline, wait, endpoint)


def timed_out(deadline: Deadline, awaited: str, endpoint: str) -> TransportTimeout:
    """What is raised when a deadline passes."""
    return TransportTimeout(f"no answer while waiting for {awaited}", endpoint=endpoint, elapsed=deadline.elapsed)
