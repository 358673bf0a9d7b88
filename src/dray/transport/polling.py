"""Waiting for descriptors: bounded by a deadline, ended by closing the client, and fast where answers are fast.

`PollWaiter` waits for one descriptor of a client. `AdaptiveEpoll` is what a server thread waits with. Both poll
without sleeping for a short while (`AdaptivePoller`) as long as earlier waits have been short.
"""

from __future__ import annotations

import itertools
import math
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from dray.clock import Deadline
from dray.errors import BufferClosedError, TransportTimeout
from dray.name_resolution import AWAITED, Address, resolve
from dray.resources import needing

SPIN_SECONDS = 300e-6
"""How long a thread polls without sleeping. One poll is a system call of about a microsecond, during which other
threads of the process can run."""

YIELD_EVERY = 16
"""The thread yields the processor after the first of this many polls."""

SHORT_SECONDS = 3 * SPIN_SECONDS
"""A wait longer than this, polling included, turns polling off for the next wait."""

SLOW_POLL_SECONDS = 50e-6
"""A poll that takes longer has waited for the interpreter or for a processor."""

BACKOFF_FACTOR = 4
MAX_BACKOFF = 256
"""Polling that was slow and found nothing costs others their processor. After it, 1 wait sleeps at once, then
5, 21 and so on, up to the maximum. Each success halves the number."""

_MAX_POLL_MILLISECONDS = 2**31 - 1


def poll_timeout(deadline: Deadline) -> float | None:
    """The remaining time in milliseconds, as `select.poll` takes it: at most 24 days; ``None`` without a limit."""
    milliseconds = deadline.remaining * 1000
    if milliseconds < _MAX_POLL_MILLISECONDS:
        return milliseconds
    return None if deadline.at == math.inf else _MAX_POLL_MILLISECONDS


class AdaptivePoller:
    """Calls a `poll` method of `select`; a wait that is expected to be short begins with polls that do not sleep.

    A thread that sleeps for a few microseconds wakes up with cold caches, and on a virtual machine waking it costs
    the sender tens of microseconds. Polling without sleep is limited in time and used only while waits are short,
    so an idle thread uses no processor. Between polls the thread yields the processor, because the peer may need
    it. If it does not get the processor back at once and then finds nothing, some of the next waits sleep at once.

    Args:
        poll: the method to call with a timeout; 0 returns at once.
        now: the time in seconds.
        give_way: yields the processor.
    """

    __slots__ = ("_backoff", "_give_way", "_now", "_poll", "_sleeping_waits", "_spins_next")

    def __init__(
        self,
        poll: Callable[[Any], list[tuple[int, int]]],
        now: Callable[[], float] = time.monotonic,
        give_way: Callable[[], None] | None = None,
    ) -> None:
        self._poll = poll
        self._now = now
        self._give_way = give_way or os.sched_yield
        self._spins_next = False
        self._backoff = 0
        self._sleeping_waits = 0

    def __call__(self, timeout: Any) -> list[tuple[int, int]]:
        """What `poll` found; empty after the timeout, which begins after polling without sleep."""
        poll = self._poll
        if timeout == 0:
            return poll(0)
        now = self._now
        began = now()
        if self._spins_next:
            found = self._busy_poll(began)
            if found:
                return found
        elif self._sleeping_waits:
            self._sleeping_waits -= 1
        found = poll(timeout)
        self._spins_next = not self._sleeping_waits and now() - began <= SHORT_SECONDS
        return found

    def _busy_poll(self, began: float) -> list[tuple[int, int]]:
        """What polling without sleep found; empty when it is time to sleep."""
        poll, now = self._poll, self._now
        last, end, slow = began, began + SPIN_SECONDS, False
        for count in itertools.count():
            found = poll(0)
            if found and last - began <= SHORT_SECONDS:
                self._backoff >>= 1
                break
            if slow:
                self._backoff = self._sleeping_waits = min(BACKOFF_FACTOR * self._backoff + 1, MAX_BACKOFF)
                self._spins_next = False
                break
            if last > end:
                break
            if count % YIELD_EVERY == 0:
                self._give_way()
            time_now = now()
            last, slow = time_now, time_now - last > SLOW_POLL_SECONDS
        return found


class AdaptiveEpoll:
    """A `select.epoll` whose waits begin with polls that do not sleep, and that `wake` ends."""

    def __init__(self) -> None:
        with needing("a server thread"):
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                self._epoll = select.epoll()
            except BaseException:
                os.close(self._wake)
                raise
        # Edge-triggered: each `wake` is reported once, and the count need not be read.
        self._epoll.register(self._wake, select.EPOLLIN | select.EPOLLET)
        self.register = self._epoll.register
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self.poll = AdaptivePoller(self._epoll.poll)

    def wake(self) -> None:
        """End the wait of `poll`, or the next one; `poll` then reports a descriptor that was not registered."""
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close the descriptors. Twice is fine; `wake` must not run at the same time."""
        self._epoll.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1


class Pollable(Protocol):
    """What a client waits for: a stream."""

    def fileno(self) -> int: ...

    @property
    def wants_write(self) -> bool: ...


class CloseEvent:
    """Ends all waits of one client, those under way and later ones.

    Its descriptor is closed with the last wait, so no wait can see another file under the same number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        with needing("a client"):
            self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waits: set[AdaptivePoller] = set()
        self._set = False

    def close(self) -> None:
        """End every wait with `BufferClosedError`. Twice is fine."""
        with self._lock:
            self._set = True
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)
        self._close_unused()

    def watch(self, poll: select.poll) -> None:
        """Let `poll` report the event; to be called before its first wait."""
        with self._lock:
            if self._descriptor >= 0:
                poll.register(self._descriptor, select.POLLIN)

    def wait(self, poll: AdaptivePoller, deadline: Deadline) -> bool:
        """Wait for what `poll` watches; False if the deadline came first.

        Raises:
            BufferClosedError: the client is closed.
        """
        found: object = False
        # The wait is entered before the flag is read, without the lock: either `close` sees the wait, or the wait
        # sees the flag.
        try:
            self._waits.add(poll)
            if not self._set:
                found = poll(poll_timeout(deadline))
        finally:
            self._waits.discard(poll)
            if self._set:
                self._close_unused()
        if self._set:
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
        closing: ends the wait; without it, only the deadline does.
    """

    __slots__ = ("_closing", "_events", "_poll", "_poller")

    def __init__(self, closing: CloseEvent | None) -> None:
        self._poll = select.poll()
        self._poller = AdaptivePoller(self._poll.poll)
        self._closing = closing
        self._events = 0
        if closing is not None:
            closing.watch(self._poll)

    def wait(self, stream: Pollable, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """Wait until the stream, which is `idle` and always the same one, can go on.

        Raises:
            TransportTimeout: the deadline came first; the message says what was awaited.
            BufferClosedError: the client is closed.
        """
        # For room alone: input or an end of the connection would be reported again and again meanwhile.
        events = select.POLLOUT if stream.wants_write else select.POLLIN
        if events != self._events:
            self._poll.register(stream.fileno(), events)
            self._events = events
        self._wait(deadline, awaited, endpoint)

    def wait_for(self, descriptor: int, events: int, deadline: Deadline, *, awaited: str, endpoint: str) -> None:
        """Wait for events of a descriptor that does not belong to a stream yet; otherwise like `wait`."""
        self._poll.register(descriptor, events)
        try:
            self._wait(deadline, awaited, endpoint)
        finally:
            self._poll.unregister(descriptor)

    def _wait(self, deadline: Deadline, awaited: str, endpoint: str) -> None:
        closing, poller = self._closing, self._poller
        if not (closing.wait(poller, deadline) if closing is not None else poller(poll_timeout(deadline))):
            raise timed_out(deadline, awaited, endpoint)


def addresses_of(
    host: str, port: int, deadline: Deadline, *, endpoint: str, closing: CloseEvent | None
) -> list[Address]:
    """The addresses of a server's host, in the order in which they are to be tried.

    Raises:
        Unreachable: the host is unknown.
        TransportTimeout: the name server did not answer before the deadline.
        BufferClosedError: the client is closed.
    """

    def wait(descriptor: int) -> None:
        PollWaiter(closing).wait_for(descriptor, select.POLLIN, deadline, awaited=AWAITED, endpoint=endpoint)

    return resolve(host, port, deadline, wait, endpoint)


def timed_out(deadline: Deadline, awaited: str, endpoint: str) -> TransportTimeout:
    """The error for a deadline that has passed."""
    return TransportTimeout(f"no answer while waiting for {awaited}", endpoint=endpoint, elapsed=deadline.elapsed)
