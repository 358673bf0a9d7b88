"""Waits for descriptors: each under a deadline, and each ended at once when its client is closed."""

from __future__ import annotations

import os
import select
import threading

from dray.clock import Deadline
from dray.errors import BufferClosedError, TransportTimeout
from dray.transport.sockets import poll_timeout
from dray.transport.stream import Stream


class Wake:
    """Ends the waits of one client, those that have begun and those that have not.

    Its descriptor is closed with the last wait, so that none of them can see another one under its number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waits = 0
        self._woken = False

    def close(self) -> None:
        """End every wait with `BufferClosedError`. Twice is fine."""
        with self._lock:
            if not self._woken:
                self._woken = True
                os.eventfd_write(self._descriptor, 1)
                self._close_unused()

    def poll(self, poll: select.poll, deadline: Deadline) -> bool:
        """Wait for what is registered with `poll`; False if the deadline came first.

        Raises:
            BufferClosedError: the client is closed.
        """
        with self._lock:
            self._check()
            self._waits += 1
        try:
            poll.register(self._descriptor, select.POLLIN)
            found = poll.poll(poll_timeout(deadline))
            poll.unregister(self._descriptor)
        finally:
            with self._lock:
                self._waits -= 1
                self._close_unused()
        with self._lock:
            self._check()
        return bool(found)

    def _check(self) -> None:
        if self._woken:
            raise BufferClosedError("the client was closed while it waited")

    def _close_unused(self) -> None:
        if self._woken and not self._waits and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class PollWaiter:
    """Waits for one stream's descriptor.

    Args:
        wake: ends the wait; without it, only the deadline does.
    """

    __slots__ = ("_poll", "_wake")

    def __init__(self, wake: Wake | None) -> None:
        self._poll = select.poll()
        self._wake = wake

    def wait(self, stream: Stream, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """Wait until the stream, which is `idle`, has something to do.

        Raises:
            TransportTimeout: the deadline came first; the message says what was awaited.
            BufferClosedError: the client is closed.
        """
        self._poll.register(stream.fileno(), select.POLLIN | (select.POLLOUT if stream.wants_write else 0))
        wait(self._poll, deadline, self._wake, awaited, endpoint)


def wait(poll: select.poll, deadline: Deadline, wake: Wake | None, awaited: str, endpoint: str) -> None:
    """Wait for what is registered with `poll`.

    Raises:
        TransportTimeout: the deadline came first; the message says what was awaited.
        BufferClosedError: the client is closed.
    """
    found = wake.poll(poll, deadline) if wake is not None else bool(poll.poll(poll_timeout(deadline)))
    if not found:
        raise timed_out(deadline, awaited, endpoint)


def timed_out(deadline: Deadline, awaited: str, endpoint: str) -> TransportTimeout:
    """What is raised when a deadline passes."""
    return TransportTimeout(f"no answer while waiting for {awaited}", endpoint=endpoint, elapsed=deadline.elapsed)
