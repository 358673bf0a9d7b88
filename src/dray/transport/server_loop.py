"""One thread of a `PayloadServer`: an event loop over its own listeners, connections and UCX worker.

The thread blocks in epoll until a socket, the UCX worker, a timer or `stop` wakes it. Nothing it does waits on a
peer, so a slow reader holds up only its own connection.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from dray.admission import ACCEPT_FAILURES, MAX_ACCEPTED, UNPROVEN_CLOSED, AcceptPause, LineLimit
from dray.clock import Clock, Deadline
from dray.counters import Counters
from dray.errors import AuthenticationError, TransportError
from dray.protocol.server_session import ServerSession
from dray.resources import needing
from dray.transport.lanes.base import Lane, Listener, SilentPeers
from dray.transport.polling import AdaptiveEpoll
from dray.transport.served_connections import ROUNDS, ServedConnection, ServedConnections, ThreadSettings

logger = logging.getLogger("dray.server")


class Poll(Protocol):
    """What of `select.epoll` is used: a simulation gives its own."""

    def register(self, descriptor: int, events: int) -> None: ...
    def modify(self, descriptor: int, events: int) -> None: ...
    def unregister(self, descriptor: int) -> None: ...
    def poll(self, timeout: float | None) -> list[tuple[int, int]]: ...
    def close(self) -> None: ...


class ServerThread:
    """Serves one ring over its own endpoints.

    Args:
        name: the thread's name.
        listeners: where its connections come in; the thread closes them, and their workers.
        make_session: a session for a new connection on a lane.
        descriptor: the segment's descriptor, to be sent to readers on the Unix lane.
        settings: time limits.
        counters: where the thread counts.
        clock: where time comes from.
        make_poll: makes what it waits with.
    """

    def __init__(
        self,
        name: str,
        listeners: Sequence[Listener],
        make_session: Callable[[Lane], ServerSession],
        descriptor: int,
        settings: ThreadSettings,
        counters: Counters,
        clock: Clock,
        make_poll: Callable[[], Poll] = AdaptiveEpoll,
    ) -> None:
        self.endpoints = [listener.endpoint for listener in listeners]
        self._listeners = {listener.fileno(): listener for listener in listeners if listener.worker is None}
        self._driven = [listener for listener in listeners if listener.worker is not None]
        self._workers = [listener.worker for listener in listeners if listener.worker is not None]
        self._silent = {
            d: each.silent for each in listeners if each.silent is not None for d in each.silent.filenos()
        }
        self._counters = counters
        self._clock = clock
        self._served = ServedConnections(
            make_session, descriptor, settings, counters, clock, self._watch, self._unwatch
        )
        self._sockets: dict[int, ServedConnection] = {}
        self._paused: list[Listener] = []
        self._pause = AcceptPause(logger, clock)
        self._lines = LineLimit(clock=clock)
        self._stop_by: Deadline | None = None
        self._progress_due = bool(self._workers)
        with needing("a server thread"):
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with needing("a server thread"):
                self._poll = make_poll()
            for watched in (self._wake, *self._listeners, *(worker.fileno() for worker in self._workers)):
                self._poll.register(watched, select.EPOLLIN)
            for watched in self._silent:
                # Level-triggered, it would be readable until the worker has accepted.
                self._poll.register(watched, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self._close_wake()
            raise
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self, drain: Deadline) -> None:
        """Accept no more, finish what is in flight until `drain`, then end. Returns at once; see `join`."""
        self._stop_by = drain
        if self._thread.ident is None:
            self._tear_down()
        elif self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread's end; False if the deadline came first."""
        if self._thread.ident is not None:
            self._thread.join(deadline.timeout)
        ended = not self._thread.is_alive()
        if ended:
            self._close_wake()
        return ended

    def leases(self) -> list[dict[str, float | int | None]]:
        """The longest silent readers with live leases; see `ServedConnections.leases`."""
        return self._served.leases()

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._served)

    def abandon_after_fork(self) -> None:
        """In a forked child, where the thread does not run: close what only it uses."""
        self._close_wake()
        self._poll.close()

    # --- the loop ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._stop_by is None or not self._finished(self._stop_by):
                again = self._served.serve_again()
                if self._progress_due or self._stop_by is not None:
                    again = self._progress() or again
                events = self._poll.poll(0.0 if again else self._timeout())
                for descriptor, _ in events:
                    connection = self._sockets.get(descriptor)
                    if connection is not None:
                        connection.stream.idle()
                        self._served.serve(connection)
                    elif descriptor in self._listeners:
                        self._accept(self._listeners[descriptor])
                    elif descriptor == self._wake:
                        os.eventfd_read(self._wake)
                    elif descriptor in self._silent:
                        self._silent[descriptor].hasten()
                    else:
                        self._progress_due = True
                if self._paused:
                    self._resume_accepting()
                for listener in self._driven:
                    if listener.silent is not None and not listener.silent.remaining:
                        self._shut_down_silent(listener, listener.silent)
                if self._served.sweep() or not events:
                    self._progress_due = bool(self._workers)
        except BaseException:
            logger.exception("server thread %s failed; its endpoints are closed", self._thread.name)
            raise
        finally:
            self._tear_down()

    def _finished(self, stop_by: Deadline) -> bool:
        self._stop_listening()
        return self._served.finished(stop_by)

    def _timeout(self) -> float | None:
        timeout = self._served.timeout(self._stop_by is not None)
        due = min(
            math.inf if timeout is None else timeout,
            self._pause.remaining if self._paused else math.inf,
            min((each.remaining for each in self._silent.values()), default=math.inf),
        )
        return None if due == math.inf else due

    def _accept(self, listener: Listener) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                stream = listener.accept()
            except AuthenticationError as error:
                self._counters.add("auth_failures")
                self._lines.warn(logger, "%s", error)
                continue
            except TransportError as error:
                self._counters.add(ACCEPT_FAILURES)
                if listener.worker is not None:
                    self._lines.warn(
                        logger, "a connection to %s could not be accepted: %s", listener.endpoint, error
                    )
                    continue
                self._pause_accepting(listener, error)
                return
            if stream is None:
                return
            self._served.add(stream)

    def _pause_accepting(self, listener: Listener, error: TransportError) -> None:
        """Out of descriptors, most likely: leave the connection in the backlog rather than spin on it."""
        self._poll.unregister(listener.fileno())
        self._paused.append(listener)
        self._pause.begin(error)

    def _resume_accepting(self) -> None:
        if self._pause.remaining:
            return
        for listener in self._paused:
            self._poll.register(listener.fileno(), select.EPOLLIN)
        self._paused.clear()

    def _shut_down_silent(self, listener: Listener, silent: SilentPeers) -> None:
        assert listener.worker is not None
        listener.worker.progress()  # it may hand over requests
        self._progress_due = True
        count = silent.shut_down()
        if count:
            self._counters.add(UNPROVEN_CLOSED, count)
            self._lines.warn(logger, "closed %d connections to %s that were silent", count, listener.endpoint)

    def _progress(self) -> bool:
        """Serve the connections of workers until there is only waiting left; True if their turn ended before."""
        self._progress_due = bool(self._workers)
        for _ in range(ROUNDS if self._workers else 0):
            for worker in self._workers:
                worker.progress()
            seen = sum(worker.steps for worker in self._workers)
            for listener in self._driven:
                self._accept(listener)
            # Serving may make progress itself, and so complete a request of a connection that was served before.
            unfinished = self._served.serve_driven()
            for worker in self._workers:
                worker.drop_strays()
            if unfinished:
                return True
            moved = sum(worker.steps for worker in self._workers) != seen
            if not moved and not any(listener.waiting for listener in self._driven) and self._arm():
                self._progress_due = False
                return False
        return self._progress_due

    def _arm(self) -> bool:
        return all(worker.arm() for worker in self._workers)

    def _watch(self, connection: ServedConnection) -> None:
        """Keep epoll's interest in step: while an answer waits for room, no more requests are read."""
        descriptor = connection.stream.fileno()
        wanted = select.EPOLLOUT if connection.unsent else select.EPOLLIN
        if descriptor in self._sockets:
            self._poll.modify(descriptor, wanted)
        else:
            self._poll.register(descriptor, wanted)
            self._sockets[descriptor] = connection

    def _unwatch(self, connection: ServedConnection) -> None:
        descriptor = connection.stream.fileno()
        if self._sockets.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    # --- endings ----------------------------------------------------------------------------------------------

    def _stop_listening(self) -> None:
        for descriptor, listener in self._listeners.items():
            if listener not in self._paused:
                self._poll.unregister(descriptor)
            listener.close()
        self._paused.clear()
        self._listeners.clear()
        for descriptor in self._silent:
            self._poll.unregister(descriptor)
        self._silent = {}
        for listener in self._driven:
            listener.close()
        self._driven = []

    def _tear_down(self) -> None:
        """Close everything, the workers last: what they could not cancel ends with them."""
        self._stop_listening()
        self._served.drop_all()
        for worker in self._workers:
            self._poll.unregister(worker.fileno())
            worker.close()
        self._workers = []
        self._served.close()
        self._poll.close()

    def _close_wake(self) -> None:
        """Not when the thread ends: one that has failed may be told to stop long after."""
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
