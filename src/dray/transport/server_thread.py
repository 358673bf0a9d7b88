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
from dataclasses import dataclass

from dray.clock import Clock, Deadline
from dray.errors import AuthenticationError, ConnectionClosed, ProtocolError, TransportError
from dray.telemetry import Counters
from dray.transport.stream import Stream
from dray.transport.tcp import TcpListener
from dray.transport.ucx import UcxListener
from dray.transport.ucx_worker import UcxWorker
from dray.transport.unix import UnixListener, UnixStream
from dray.wire.handshake import Lane
from dray.wire.session import ServerSession

logger = logging.getLogger("dray.server")

_ROUNDS = 64
"""Answers one connection gets in a row before the others have their turn."""
_LINGER_SECONDS = 1.0
_HANDSHAKE_SECONDS = 10.0
_ACCEPT_PAUSE_SECONDS = 1.0
_WATCHDOG_SECONDS = 0.05
_MOST_LISTED = 100


@dataclass(frozen=True, slots=True)
class ThreadSettings:
    """What a server thread needs to know, in seconds.

    Attributes:
        idle: a connection without requests and leases is closed after this.
        lease: on network lanes, a lease whose reader is silent ends after this, with its connection.
    """

    idle: float
    lease: float


class _Connection:
    """A connection as the loop sees it."""

    __slots__ = ("active", "again", "announced", "lingering", "pid", "registered", "session", "stream")

    def __init__(self, stream: Stream, session: ServerSession, now: float) -> None:
        self.stream = stream
        self.session = session
        self.active = now
        self.announced = False
        self.again = False
        self.lingering = False
        self.registered = 0
        self.pid = stream.peer()[0] if isinstance(stream, UnixStream) else None


class ServerThread:
    """Serves one ring over its own endpoints.

    Args:
        name: the thread's name.
        unix, tcp: bound listeners; the thread closes them.
        worker, ucx: its UCX worker and listener, if the lane is served.
        make_session: a session for a new connection on a lane.
        descriptor: the segment's descriptor, to be sent to readers on the Unix lane.
        settings: time limits.
        counters: where the thread counts.
        clock: where time comes from.
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
    ) -> None:
        self.endpoints = [listener.endpoint for listener in (*listeners, *((ucx,) if ucx else ()))]
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._worker = worker
        self._ucx = ucx
        self._make_session = make_session
        self._descriptor = descriptor
        self._settings = settings
        self._counters = counters
        self._clock = clock
        self._sockets: dict[int, _Connection] = {}
        self._ucx_connections: list[_Connection] = []
        self._undrained: list[_Connection] = []
        self._paused: list[UnixListener | TcpListener] = []
        self._next_sweep = math.inf
        self._stop_by: Deadline | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._poll = select.epoll()
            for watched in (self._wake, *self._listeners, *((worker.fileno(),) if worker else ())):
                self._poll.register(watched, select.EPOLLIN)
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
        """The longest silent readers with live leases: pid (Unix lane), leases, seconds since their last word."""
        now = self._clock.now()
        holding = sorted((c for c in self._connections() if c.session.leases), key=lambda c: c.active)
        return [{"pid": c.pid, "leases": c.session.leases, "age": now - c.active} for c in holding[:_MOST_LISTED]]

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._sockets) + len(self._ucx_connections)

    def abandon_after_fork(self) -> None:
        """In a forked child, where the thread does not run: close what only it uses."""
        self._close_wake()
        self._poll.close()

    # --- the loop ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._finished():
                again = self._serve_again()
                again = self._progress_ucx() or again
                timeout = 0.0 if again else self._timeout()
                for descriptor, _ in self._poll.poll(timeout):
                    if descriptor in self._sockets:
                        self._sockets[descriptor].stream.idle()
                        self._serve(self._sockets[descriptor])
                    elif descriptor in self._listeners:
                        self._accept(self._listeners[descriptor])
                    elif descriptor == self._wake:
                        os.eventfd_read(self._wake)
                self._sweep()
        except BaseException:
            logger.exception("server thread %s failed; its endpoints are closed", self._thread.name)
            raise
        finally:
            self._tear_down()

    def _finished(self) -> bool:
        if self._stop_by is None:
            return False
        self._stop_listening()
        for connection in self._connections():
            session = connection.session
            if self._stop_by.expired or not (session.busy or session.leases):
                self._drop(connection, None)
        return not self._connections()

    def _timeout(self) -> float | None:
        if self._undrained or self._stop_by is not None:
            return _WATCHDOG_SECONDS
        return None if self._next_sweep == math.inf else max(0.0, self._next_sweep - self._clock.now())

    def _accept(self, listener: UnixListener | TcpListener | UcxListener) -> None:
        while True:
            try:
                stream = listener.accept()
            except AuthenticationError as error:
                self._counters.add("auth_failures")
                logger.warning("%s", error)
                continue
            except TransportError as error:
                self._counters.add("accept_failures")
                logger.warning("a connection could not be accepted: %s", error)
                if isinstance(listener, UcxListener):
                    continue
                self._pause_accepting(listener)
                return
            if stream is None:
                return
            now = self._clock.now()
            connection = _Connection(stream, self._make_session(stream.lane), now)
            self._counters.add("connections")
            self._next_sweep = min(self._next_sweep, now + self._limit(connection))
            if stream.lane is Lane.UCX:
                self._ucx_connections.append(connection)
            else:
                self._sockets[stream.fileno()] = connection
                self._watch(connection)
            self._serve(connection)

    def _pause_accepting(self, listener: UnixListener | TcpListener) -> None:
        """Out of descriptors, most likely: leave the connection in the backlog rather than spin on it."""
        self._poll.unregister(listener.fileno())
        self._paused.append(listener)
        self._next_sweep = min(self._next_sweep, self._clock.now() + _ACCEPT_PAUSE_SECONDS)

    def _progress_ucx(self) -> bool:
        """Serve the UCX connections until there is nothing to do but wait; True if their turn is over before."""
        worker, listener = self._worker, self._ucx
        if worker is None:
            return False
        for _ in range(_ROUNDS):
            worker.progress()
            seen = worker.steps
            if listener is not None and self._stop_by is None:
                self._accept(listener)
            for connection in list(self._ucx_connections):
                self._serve(connection)
            # Serving may itself have made progress and so completed a request of a connection already looked at.
            unfinished = any(connection.again for connection in self._ucx_connections)
            if worker.steps == seen and not unfinished and worker.arm():
                return False
        return True

    def _serve_again(self) -> bool:
        """Continue with the connections whose turn ended before their work did."""
        waiting = [connection for connection in self._sockets.values() if connection.again]
        for connection in waiting:
            self._serve(connection)
        return any(connection.again for connection in self._sockets.values())

    def _serve(self, connection: _Connection) -> None:
        stream, session = connection.stream, connection.session
        connection.again = False
        try:
            for _ in range(_ROUNDS):
                # First: an ACK may have come in the same step of progress that finished sending its payload.
                if not stream.flush():
                    break
                session.flushed()
                received = self._receive(connection)
                items = session.take()
                if items:
                    descriptor = None
                    if session.established and not connection.announced:
                        connection.announced = True
                        descriptor = self._descriptor if stream.lane is Lane.SHM else None
                    stream.send(items, descriptor)
                elif not received:
                    break
            else:
                connection.again = True
        except ConnectionClosed:
            self._drop(connection, None)
            return
        except (TransportError, ProtocolError) as error:
            self._drop(connection, error)
            return
        if session.closing and not connection.lingering:
            # The peer reads the refusal and closes; closing first could take it from under its eyes.
            connection.lingering = True
            self._next_sweep = min(self._next_sweep, self._clock.now() + _LINGER_SECONDS)
        else:
            # A lease has a shorter limit than the idleness before it.
            self._next_sweep = min(self._next_sweep, connection.active + self._limit(connection))
        if stream.lane is not Lane.UCX:
            self._watch(connection)

    def _receive(self, connection: _Connection) -> bool:
        """Hand what has arrived to the session; whether there was anything."""
        stream, session = connection.stream, connection.session
        received = False
        for _ in range(_ROUNDS):
            message = stream.receive(session.expects)
            if message is None:
                break
            received = True
            if not connection.lingering:
                session.receive(message)
        if received and not connection.lingering:
            connection.active = self._clock.now()
        return received

    def _watch(self, connection: _Connection) -> None:
        """Keep epoll's interest in step: while an answer waits for room, no more requests are read."""
        wanted = select.EPOLLOUT if connection.stream.wants_write else select.EPOLLIN
        if wanted == connection.registered:
            return
        change = self._poll.modify if connection.registered else self._poll.register
        change(connection.stream.fileno(), wanted)
        connection.registered = wanted

    def _sweep(self) -> None:
        """Close what has been idle or silent for too long, and forget what is drained."""
        self._settle_undrained()
        now = self._clock.now()
        if now < self._next_sweep:
            return
        self._next_sweep = math.inf
        for listener in self._paused:
            self._poll.register(listener.fileno(), select.EPOLLIN)
        self._paused.clear()
        for connection in self._connections():
            due = connection.active + self._limit(connection)
            if due <= now:
                self._counters.add("evicted")
                self._drop(connection, None)
            else:
                self._next_sweep = min(self._next_sweep, due)

    def _limit(self, connection: _Connection) -> float:
        if connection.lingering:
            return _LINGER_SECONDS
        if not connection.session.established:
            return min(_HANDSHAKE_SECONDS, self._settings.idle)
        if not connection.session.leases:
            return self._settings.idle
        return math.inf if connection.stream.lane is Lane.SHM else self._settings.lease

    # --- endings ----------------------------------------------------------------------------------------------

    def _drop(self, connection: _Connection, error: Exception | None) -> None:
        """End a connection; its leases are returned once nothing reads their slots for sending."""
        if isinstance(error, ProtocolError):
            self._counters.add("malformed")
            logger.warning("connection closed: %s", error)
        elif error is not None:
            self._counters.add("failed_connections")
            logger.debug("connection lost: %s", error)
        stream = connection.stream
        if stream.lane is Lane.UCX:
            self._ucx_connections.remove(connection)
        else:
            del self._sockets[stream.fileno()]
            if connection.registered:
                self._poll.unregister(stream.fileno())
        stream.close()
        self._undrained.append(connection)
        self._settle_undrained()

    def _settle_undrained(self) -> None:
        if not self._undrained:
            return
        waiting = []
        for connection in self._undrained:
            if connection.stream.drained:
                connection.session.close()
            else:
                waiting.append(connection)
        self._undrained = waiting

    def _stop_listening(self) -> None:
        for descriptor, listener in self._listeners.items():
            if listener not in self._paused:
                self._poll.unregister(descriptor)
            listener.close()
        self._paused.clear()
        self._listeners.clear()
        if self._ucx is not None:
            self._ucx.close()
            self._ucx = None

    def _tear_down(self) -> None:
        """Close everything, the UCX worker last: what it could not cancel ends with it."""
        self._stop_listening()
        for connection in self._connections():
            self._drop(connection, None)
        if self._worker is not None:
            self._poll.unregister(self._worker.fileno())
            self._worker.close()
        for connection in self._undrained:
            connection.session.close()
        self._undrained.clear()
        self._poll.close()

    def _close_wake(self) -> None:
        """Not when the thread ends: one that has failed may be told to stop long after."""
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _connections(self) -> list[_Connection]:
        return [*self._sockets.values(), *self._ucx_connections]
