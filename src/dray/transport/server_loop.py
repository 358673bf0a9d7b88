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
from dray.protocol.handshake import Lane
from dray.protocol.server_session import ServerSession
from dray.resources import needing
from dray.transport.lanes.tcp import TcpListener
from dray.transport.lanes.ucx import UcxListener, UcxStream
from dray.transport.lanes.ucx_sockets import SilentPeers
from dray.transport.lanes.ucx_worker import UcxWorker
from dray.transport.lanes.unix import UnixListener, UnixStream
from dray.transport.served_connections import ROUNDS, ServedConnection, ServedConnections, ThreadSettings
from dray.transport.spinning import SpinningEpoll

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
        listeners: bound sockets; the thread closes them.
        worker, ucx: its UCX worker and listener, if the lane is served.
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
        listeners: Sequence[UnixListener | TcpListener],
        worker: UcxWorker | None,
        ucx: UcxListener | None,
        make_session: Callable[[Lane], ServerSession],
        descriptor: int,
        settings: ThreadSettings,
        counters: Counters,
        clock: Clock,
        make_poll: Callable[[], Poll] = SpinningEpoll,
    ) -> None:
        self.endpoints = [listener.endpoint for listener in (*listeners, *((ucx,) if ucx else ()))]
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._worker = worker
        self._ucx = ucx
        self._silent = ucx.silent if ucx is not None else None
        self._silent_watched = self._silent.filenos() if self._silent is not None else []
        self._counters = counters
        self._clock = clock
        self._served = ServedConnections(
            make_session, descriptor, settings, counters, clock, self._watch, self._unwatch
        )
        self._sockets: dict[int, ServedConnection] = {}
        self._paused: list[UnixListener | TcpListener] = []
        self._pause = AcceptPause(logger, clock)
        self._lines = LineLimit(clock=clock)
        self._stop_by: Deadline | None = None
        self._ucx_due = worker is not None
        with needing("a server thread"):
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with needing("a server thread"):
                self._poll = make_poll()
            for watched in (self._wake, *self._listeners, *((worker.fileno(),) if worker else ())):
                self._poll.register(watched, select.EPOLLIN)
            for watched in self._silent_watched:
                # Level-triggered, it would be readable until UCX has accepted.
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
                if self._ucx_due or self._stop_by is not None:
                    again = self._progress_ucx() or again
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
                    elif self._silent is not None and descriptor in self._silent_watched:
                        self._silent.hasten()
                    else:
                        self._ucx_due = True
                if self._paused:
                    self._resume_accepting()
                if self._silent is not None and not self._silent.remaining:
                    self._shut_down_silent(self._silent)
                if self._served.sweep() or not events:
                    self._ucx_due = True
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
            self._silent.remaining if self._silent is not None else math.inf,
        )
        return None if due == math.inf else due

    def _accept(self, listener: UnixListener | TcpListener | UcxListener) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                stream = listener.accept()
            except AuthenticationError as error:
                self._counters.add("auth_failures")
                self._lines.warn(logger, "%s", error)
                continue
            except TransportError as error:
                self._counters.add(ACCEPT_FAILURES)
                if isinstance(listener, UcxListener):
                    self._lines.warn(logger, "a connection on the ucx lane could not be accepted: %s", error)
                    continue
                self._pause_accepting(listener, error)
                return
            if stream is None:
                return
            self._served.add(stream, stream.peer()[0] if isinstance(stream, UnixStream) else None)

    def _pause_accepting(self, listener: UnixListener | TcpListener, error: TransportError) -> None:
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

    def _shut_down_silent(self, silent: SilentPeers) -> None:
        assert self._worker is not None
        self._worker.progress()  # it may hand over requests
        self._ucx_due = True
        count = silent.shut_down()
        if count:
            self._counters.add(UNPROVEN_CLOSED, count)
            self._lines.warn(logger, "closed %d connections on the ucx lane: they do not speak UCX", count)

    def _progress_ucx(self) -> bool:
        """Serve the UCX connections until there is nothing to do but wait; True if their turn is over before."""
        worker, listener = self._worker, self._ucx
        self._ucx_due = worker is not None
        if worker is None:
            return False
        for _ in range(ROUNDS):
            worker.progress()
            seen = worker.steps
            if listener is not None and self._stop_by is None:
                self._accept(listener)
                unaccepted = listener.waiting
            else:
                unaccepted = False
            # Serving may itself have made progress and so completed a request of a connection already looked at.
            unfinished = self._served.serve_ucx()
            worker.drop_strays(self._awaits)
            if unfinished:
                return True
            if worker.steps == seen and not unaccepted and worker.arm():
                self._ucx_due = False
                return False
        return True

    def _awaits(self, tag: int) -> bool:
        streams = (connection.stream for connection in self._served.all())
        return any(isinstance(stream, UcxStream) and stream.awaits(tag) for stream in streams)

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
        for descriptor in self._silent_watched:
            self._poll.unregister(descriptor)
        self._silent, self._silent_watched = None, []
        if self._ucx is not None:
            self._ucx.close()
            self._ucx = None

    def _tear_down(self) -> None:
        """Close everything, the UCX worker last: what it could not cancel ends with it."""
        self._stop_listening()
        self._served.drop_all()
        if self._worker is not None:
            self._poll.unregister(self._worker.fileno())
            self._worker.close()
        self._served.close()
        self._poll.close()

    def _close_wake(self) -> None:
        """Not when the thread ends: one that has failed may be told to stop long after."""
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
