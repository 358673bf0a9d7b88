"""A thread of a `PayloadServer`: it waits in epoll for sockets, UCX workers, timers and `stop`."""

from __future__ import annotations

import logging
import math
import select
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from dray.admission import (
    ACCEPT_FAILURES,
    MAX_ACCEPTED,
    UNPROVEN_CLOSED,
    AcceptPause,
    LineLimit,
)
from dray.clock import Deadline
from dray.errors import (
    AuthenticationError,
    TransportError,
)
from dray.transport.lanes.base import Listener, SilentPeers, Worker
from dray.transport.polling import AdaptiveEpoll
from dray.transport.served_connection import ServedConnection
from dray.transport.served_connections import ROUNDS, ServedConnections
from dray.transport.service import Service

logger = logging.getLogger("dray.server")


class Poller(Protocol):
    """What a loop waits with; a simulation brings its own. `poll` returns (descriptor, events) of those ready."""

    def register(self, descriptor: int, events: int) -> None: ...
    def modify(self, descriptor: int, events: int) -> None: ...
    def unregister(self, descriptor: int) -> None: ...
    def drive(self, worker: Worker) -> None: ...
    def stop_driving(self, worker: Worker) -> None: ...
    def poll(self, timeout: float | None) -> list[tuple[int, int]]: ...
    def reset(self, descriptor: int) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class ServerLoop:
    """Serves a ring over its own listeners, in a thread of its own.

    Args:
        name: the thread's name.
        listeners: where its connections come in; the loop closes them, and their workers.
        service: what is served.
        make_poller: makes what the loop waits with.

    Attributes:
        endpoints: the addresses of the listeners.
        connections: the open connections.
    """

    def __init__(
        self,
        name: str,
        listeners: Sequence[Listener],
        service: Service,
        make_poller: Callable[[], Poller] = AdaptiveEpoll,
    ) -> None:
        self.endpoints = [listener.endpoint for listener in listeners]
        self.connections = ServedConnections(
            service, watch=self._watch, unwatch=self._unwatch, attach=self.watch_consumers, wake=self.wake
        )
        self._ring = service.ring
        self._stream = service.stream
        self._bell = -1 if service.stream is None else service.stream.bell.fileno()
        self._consumers = -1
        self._listeners = {listener.fileno(): listener for listener in listeners if listener.worker is None}
        self._driven = [listener for listener in listeners if listener.worker is not None]
        self._workers = [listener.worker for listener in listeners if listener.worker is not None]
        self._silent = {
            d: each.silent for each in listeners if each.silent is not None for d in each.silent.filenos()
        }
        self._sockets: dict[int, ServedConnection] = {}
        self._paused: list[Listener] = []
        self._pause = AcceptPause(logger, service.clock)
        self._lines = LineLimit(clock=service.clock)
        self._deadline: Deadline | None = None
        self._progress_due = bool(self._workers)
        self._poller = make_poller()
        try:
            for watched in self._listeners:
                self._poller.register(watched, select.EPOLLIN)
            for worker in self._workers:
                self._poller.drive(worker)
            if self._stream is not None:
                self._poller.register(self._bell, select.EPOLLIN)
            for watched in self._silent:
                # Level-triggered, it would be readable until the worker has accepted.
                self._poller.register(watched, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self._poller.close()
            raise
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)

    def watch_consumers(self) -> None:
        """Wait also for the direct consumers of the ring: they ring its doorbell, or end.

        To be called before `start`, or in the thread.
        """
        if self._consumers < 0:
            self._consumers = self._ring.direct().events.fileno()
            self._poller.register(self._consumers, select.EPOLLIN)

    def start(self) -> None:
        """Run the loop in its thread."""
        self._thread.start()

    def stop(self, deadline: Deadline) -> None:
        """Accept no more, finish what is in flight until the deadline, then end. Returns at once; see `join`."""
        self._deadline = deadline
        self._poller.wake()

    def wake(self) -> None:
        """Check the time limits now. Needed only after a jump of the clock. Not after `join`."""
        self._poller.wake()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread's end after `stop`; False if the deadline came first."""
        if self._thread.ident is None:
            self._close()
        else:
            self._thread.join(deadline.timeout)
        ended = not self._thread.is_alive()
        if ended:
            # Not at the end of the thread: the thread may have failed long before `stop` wakes the poller.
            self._poller.close()
        return ended

    @property
    def running(self) -> bool:
        """The thread was started and has not ended."""
        return self._thread.is_alive()

    def abandon_after_fork(self) -> None:
        """In a forked child, where the thread does not run: close what only the thread uses."""
        self._poller.close()

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`, then close everything but the poller."""
        connections, poll = self.connections, self._poller.poll
        try:
            while True:
                if self._deadline is not None:
                    self._stop_listening()
                    if connections.finish(self._deadline):
                        break
                connections.serve_pushed()
                unfinished = connections.serve_unfinished()
                if self._progress_due or self._deadline is not None:
                    unfinished = self._progress() or unfinished
                events = poll(0.0 if unfinished else self._timeout())
                for descriptor, _ in events:
                    connection = self._sockets.get(descriptor)
                    if connection is not None:
                        connection.stream.idle()
                        connections.serve(connection)
                    elif descriptor in self._listeners:
                        self._accept(self._listeners[descriptor])
                    elif descriptor == self._consumers:
                        self._ring.observe()
                    elif descriptor == self._bell:
                        assert self._stream is not None
                        self._poller.reset(descriptor)
                        self._stream.serve()
                    elif descriptor in self._silent:
                        self._silent[descriptor].hasten()
                    else:  # a worker, or `stop` has woken the poller
                        self._progress_due = True
                if self._paused:
                    self._resume_accepting()
                for listener in self._driven:
                    if listener.silent is not None and not listener.silent.remaining:
                        self._shut_down_silent(listener, listener.silent)
                if self._stream is not None and not self._stream.remaining:
                    self._stream.serve()
                if connections.sweep() or not events:
                    self._progress_due = bool(self._workers)
        except BaseException:
            logger.exception("server thread %s failed; its endpoints are closed", self._thread.name)
            raise
        finally:
            self._close()

    def _timeout(self) -> float | None:
        timeout = self.connections.timeout(self._deadline is not None)
        due = min(
            math.inf if timeout is None else timeout,
            self._pause.remaining if self._paused else math.inf,
            min((each.remaining for each in self._silent.values()), default=math.inf),
            math.inf if self._stream is None else self._stream.remaining,
        )
        return None if due == math.inf else due

    def _accept(self, listener: Listener) -> None:
        counts = self.connections.counts
        for _ in range(MAX_ACCEPTED):
            try:
                stream = listener.accept()
            except AuthenticationError as error:
                counts["auth_failures"] += 1
                self._lines.warn(logger, "%s", error)
                continue
            except TransportError as error:
                counts[ACCEPT_FAILURES] += 1
                if listener.worker is not None:
                    self._lines.warn(
                        logger, "a connection to %s could not be accepted: %s", listener.endpoint, error
                    )
                    continue
                self._pause_accepting(listener, error)
                return
            if stream is None:
                return
            self.connections.add(stream, listener.endpoint)

    def _pause_accepting(self, listener: Listener, error: TransportError) -> None:
        """Most likely no descriptor is left: the connection stays in the backlog for a while."""
        self._poller.unregister(listener.fileno())
        self._paused.append(listener)
        self._pause.begin(error)

    def _resume_accepting(self) -> None:
        if self._pause.remaining:
            return
        for listener in self._paused:
            self._poller.register(listener.fileno(), select.EPOLLIN)
        self._paused.clear()

    def _shut_down_silent(self, listener: Listener, silent: SilentPeers) -> None:
        assert listener.worker is not None
        listener.worker.progress()  # it may have connections to accept
        self._progress_due = True
        count = silent.shut_down()
        if count:
            self.connections.counts[UNPROVEN_CLOSED] += count
            self._lines.warn(logger, "closed %d connections to %s that were silent", count, listener.endpoint)

    def _progress(self) -> bool:
        """Serve the connections of workers until they have to wait; True if a turn ended before its work."""
        self._progress_due = bool(self._workers)
        for _ in range(ROUNDS if self._workers else 0):
            for worker in self._workers:
                worker.progress()
            steps = sum(worker.steps for worker in self._workers)
            for listener in self._driven:
                self._accept(listener)
            # Serving may make progress itself, and so complete a request of a connection that was served before.
            unfinished = self.connections.serve_driven()
            for worker in self._workers:
                worker.drop_strays()
            if unfinished:
                return True
            moved = sum(worker.steps for worker in self._workers) != steps
            waiting = moved or any(listener.waiting for listener in self._driven)
            if not waiting and all(worker.arm() for worker in self._workers):
                self._progress_due = False
                return False
        return self._progress_due

    def _watch(self, connection: ServedConnection) -> None:
        """Wait for room in the connection, or for messages: while an answer waits for room, none is received."""
        descriptor = connection.stream.fileno()
        wanted = select.EPOLLOUT if connection.unsent else select.EPOLLIN
        if descriptor in self._sockets:
            self._poller.modify(descriptor, wanted)
        else:
            self._poller.register(descriptor, wanted)
            self._sockets[descriptor] = connection

    def _unwatch(self, connection: ServedConnection) -> None:
        descriptor = connection.stream.fileno()
        if self._sockets.pop(descriptor, None) is not None:
            self._poller.unregister(descriptor)

    def _stop_listening(self) -> None:
        for descriptor, listener in self._listeners.items():
            if listener not in self._paused:
                self._poller.unregister(descriptor)
            listener.close()
        self._paused.clear()
        self._listeners.clear()
        for descriptor in self._silent:
            self._poller.unregister(descriptor)
        self._silent = {}
        for listener in self._driven:
            listener.close()
        self._driven = []

    def _close(self) -> None:
        """Close everything, the workers last: what they could not cancel ends with them."""
        self._stop_listening()
        self.connections.discard_all()
        for worker in self._workers:
            self._poller.stop_driving(worker)
            worker.close()
        self._workers = []
        self.connections.close()
