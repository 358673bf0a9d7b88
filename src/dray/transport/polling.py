"""Waiting for descriptors, limited by a deadline and ended by closing the client.

`PollWaiter` waits for one descriptor of a client, `AdaptiveEpoll` for all descriptors of a server thread. Both
poll without sleeping for a short time first (`AdaptivePoller`), as long as earlier waits were short.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import select
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from dray.clock import Deadline
from dray.errors import BufferClosedError, TransportTimeout
from dray.name_resolution import AWAITED, Address, resolve
from dray.resources import Closing, needing

if TYPE_CHECKING:
    from dray.transport.lanes.base import Stream, Worker

SPIN_SECONDS = 300e-6
"""How long a thread polls without sleeping. A poll is a system call of about one microsecond, during which other
threads of the process can run."""

YIELD_EVERY = 16
"""The thread yields the processor after the first of this many polls."""

SHORT_SECONDS = 3 * SPIN_SECONDS
"""A wait longer than this, polling included, turns polling off for the next wait."""

SLOW_POLL_SECONDS = 50e-6
"""A poll that takes longer has waited for the interpreter lock or for a processor."""

BACKOFF_FACTOR = 4
MAX_BACKOFF = 256
"""Polling that was slow and found nothing takes processor time from others. After it, 1 wait sleeps at once, after
the next one 5, then 21 and so on, up to the maximum. Each successful poll halves the number."""

_MAX_POLL_MILLISECONDS = 2**31 - 1

Events: TypeAlias = list[tuple[int, int]]
Found = TypeVar("Found")


def poll_timeout(deadline: Deadline) -> float | None:
    """The remaining time in milliseconds for `select.poll`: at most 24 days, ``None`` without a limit."""
    milliseconds = deadline.remaining * 1000
    if milliseconds < _MAX_POLL_MILLISECONDS:
        return milliseconds
    return None if deadline.at == math.inf else _MAX_POLL_MILLISECONDS


class AdaptivePoller(Generic[Found]):
    """Calls a `poll` method of `select`, first without sleeping if the wait is expected to be short.

    A thread that sleeps for a few microseconds wakes up with cold caches, and on a virtual machine waking it costs
    the sender tens of microseconds. Polling without sleep is limited in time and used only while waits are short,
    so an idle thread uses no processor. Between polls the thread yields the processor, because the peer may need
    it. If the thread does not get the processor back at once and then finds nothing, some of the next waits sleep.

    Args:
        poll: the method to call with a timeout; 0 returns at once.
        now: returns the time in seconds.
        yield_processor: lets other threads run.
        busy_poll: what to call instead of `poll` with a timeout of 0 while the thread does not sleep.
    """

    __slots__ = ("_backoff", "_now", "_poll", "_poll_once", "_sleeping_waits", "_spins_next", "_yield_processor")

    def __init__(
        self,
        poll: Callable[[Any], Found],
        now: Callable[[], float] = time.monotonic,
        yield_processor: Callable[[], object] | None = None,
        busy_poll: Callable[[], Found] | None = None,
    ) -> None:
        self._poll = poll
        self._poll_once = busy_poll or functools.partial(poll, 0)
        self._now = now
        self._yield_processor = yield_processor or os.sched_yield
        self._spins_next = False
        self._backoff = 0
        self._sleeping_waits = 0

    def __call__(self, timeout: Any) -> Found:
        """What `poll` found; nothing after the timeout, which begins after polling without sleep."""
        if timeout == 0:
            return self._poll(0)
        began = self._now()
        return self._busy_poll(began) or self._sleep(timeout, began)

    def until(self, deadline: Deadline) -> Found:
        """What `poll`, which takes milliseconds, found; nothing after the deadline."""
        began = self._now()
        return self._busy_poll(began) or self._sleep(poll_timeout(deadline), began)

    def _sleep(self, timeout: Any, began: float) -> Found:
        found = self._poll(timeout)
        self._spins_next = not self._sleeping_waits and self._now() - began <= SHORT_SECONDS
        return found

    def _busy_poll(self, began: float) -> Found | None:
        """What polling without sleep found; nothing when it is time to sleep, perhaps at once."""
        if not self._spins_next:
            if self._sleeping_waits:
                self._sleeping_waits -= 1
            return None
        poll_once, now = self._poll_once, self._now
        last, end, slow = began, began + SPIN_SECONDS, False
        for count in itertools.count():
            found = poll_once()
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
                self._yield_processor()
            time_now = now()
            last, slow = time_now, time_now - last > SLOW_POLL_SECONDS
        return found


class AdaptiveEpoll:
    """A `select.epoll` whose waits begin with polls that do not sleep, and that `wake` ends.

    While it does not sleep, the workers that it drives make progress, which costs less than a system call.
    """

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
        self._workers: list[Worker] = []
        self._worker_found = False
        self.poll: AdaptivePoller[Events] = AdaptivePoller(self._epoll.poll, busy_poll=self._poll_awake)

    def drive(self, worker: Worker) -> None:
        """Report the worker's descriptor, also after progress that the worker has made in `poll`."""
        self._epoll.register(worker.fileno(), select.EPOLLIN)
        self._workers.append(worker)

    def stop_driving(self, worker: Worker) -> None:
        """The opposite of `drive`."""
        self._workers.remove(worker)
        self._epoll.unregister(worker.fileno())

    @staticmethod
    def reset(descriptor: int) -> None:
        """Reset an eventfd that was reported."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(descriptor)

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

    def _poll_awake(self) -> Events:
        # After a worker was found, the descriptors are polled first: a busy worker must not hide them.
        if not self._worker_found:
            for worker in self._workers:
                if worker.has_progressed():
                    self._worker_found = True
                    return [(worker.fileno(), select.EPOLLIN)]
        self._worker_found = False
        return self._epoll.poll(0)


class CloseEvent(Closing):
    """Ends all waits of one client, now and later.

    The descriptor is closed after the last wait, so no wait can see another file under the same number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        with needing("a client"):
            self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waits: set[AdaptivePoller[Any]] = set()
        self._set = False

    def close(self) -> None:
        """End every wait with `BufferClosedError`. Twice is fine."""
        with self._lock:
            self._set = True
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)
        self._close_unused()

    def watch(self, poll: select.poll) -> None:
        """Make `poll` report the event; called before its first wait."""
        with self._lock:
            if self._descriptor >= 0:
                poll.register(self._descriptor, select.POLLIN)

    def wait(self, poll: AdaptivePoller[Any], deadline: Deadline) -> bool:
        """Wait for the descriptors of `poll`; False if the deadline came first.

        Raises:
            BufferClosedError: the client is closed.
        """
        found: object = False
        # The wait is registered before it reads the flag, without the lock: either `close` sees the wait, or the
        # wait sees the flag.
        try:
            self._waits.add(poll)
            if not self._set:
                found = poll.until(deadline)
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
    """Waits for one stream or one descriptor at a time.

    Args:
        closing: ends the wait; without it, only the deadline does.
    """

    __slots__ = ("_closing", "_driven", "_events", "_poll", "_poller")

    def __init__(self, closing: CloseEvent | None) -> None:
        self._poll = select.poll()
        self._poller: AdaptivePoller[Any] = AdaptivePoller(self._poll.poll)
        self._closing = closing
        self._events = 0
        self._driven = False  # the stream has a worker
        if closing is not None:
            closing.watch(self._poll)

    def wait(self, stream: Stream, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """Wait until a stream may be able to advance; a waiter always gets the same stream.

        Raises:
            TransportTimeout: the deadline came first; the message contains `awaited`.
            BufferClosedError: the client is closed.
        """
        worker = stream.worker
        if worker is None:
            stream.idle()
            # Not for both: input that is not read would end each wait for room at once.
            events = select.POLLOUT if stream.wants_write else select.POLLIN
            if events != self._events:
                self._poll.register(stream.fileno(), events)
                self._events = events
        else:
            if not self._driven:
                self._poll.register(stream.fileno(), select.POLLIN)
                # Not a method of this waiter: in a reference cycle the stream would exist until it is collected.
                poll = functools.partial(_poll_driven, self._poll, stream)
                self._poller = AdaptivePoller(poll, busy_poll=worker.has_progressed)
                self._driven = True
            if deadline.expired:  # each wait may end early, because of work for another stream
                raise timed_out(deadline, awaited, endpoint)
        self._wait(deadline, awaited, endpoint)

    def wait_for(self, descriptor: int, events: int, deadline: Deadline, *, awaited: str, endpoint: str) -> None:
        """Wait for events of a descriptor without a stream; otherwise like `wait`."""
        self._poll.register(descriptor, events)
        try:
            self._wait(deadline, awaited, endpoint)
        finally:
            self._poll.unregister(descriptor)

    def _wait(self, deadline: Deadline, awaited: str, endpoint: str) -> None:
        closing, poller = self._closing, self._poller
        if not (closing.wait(poller, deadline) if closing is not None else poller.until(deadline)):
            raise timed_out(deadline, awaited, endpoint)


def _poll_driven(poll: select.poll, stream: Stream, timeout: float | None) -> Any:
    """Poll the descriptor of a stream's worker, unless the stream can advance already."""
    return not stream.idle() or poll.poll(timeout)


def addresses_of(
    host: str, port: int, deadline: Deadline, *, endpoint: str, closing: CloseEvent | None
) -> list[Address]:
    """As `resolve`, but the wait also ends with `BufferClosedError` when the client is closed."""

    def wait(descriptor: int) -> None:
        PollWaiter(closing).wait_for(descriptor, select.POLLIN, deadline, awaited=AWAITED, endpoint=endpoint)

    return resolve(host, port, deadline, wait=wait, endpoint=endpoint)


def timed_out(deadline: Deadline, awaited: str, endpoint: str) -> TransportTimeout:
    """The error for a wait that has reached its deadline."""
    return TransportTimeout(f"no answer while waiting for {awaited}", endpoint=endpoint, elapsed=deadline.elapsed)
