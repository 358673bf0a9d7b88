"""The connections of one server thread: what is served, in whose turn, and when each is ended. Never waits.

Streams, sessions and a clock are all that it sees: `server_thread` drives it from epoll.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from dray.admission import UNPROVEN_CLOSED, UNPROVEN_SECONDS, LineLimit, Unproven
from dray.clock import Clock, Deadline
from dray.counters import Counters
from dray.errors import ConnectionClosed, ProtocolError, TransportError
from dray.protocol.server_session import ServerSession
from dray.transport.lanes.base import Lane, Stream

logger = logging.getLogger("dray.server")

ROUNDS = 64
"""Batches of answers one connection gets in a row before the others have their turn."""
TURN_SECONDS = 0.002
"""A turn ends with the batch of answers in which this time is over."""
MOST_MESSAGES = 256
"""Messages of one connection that are taken at a time."""
_LINGER_SECONDS = 1.0
_WATCHDOG_SECONDS = 0.05
_MOST_LISTED = 100
_PROGRESS_CHECKS = 8
"""How often the progress of a reader with a lease is checked within the lease's limit."""


@dataclass(frozen=True, slots=True)
class ThreadSettings:
    """What a server thread needs to know, in seconds.

    Attributes:
        idle: a connection without requests and leases is closed after this.
        lease: on network lanes, a lease whose reader is silent, and to which no bytes travel, ends after this,
            with its connection.
    """

    idle: float
    lease: float


class ServedConnection:
    """A connection as the server sees it.

    Attributes:
        stream, session: its two halves.
        unsent: answers wait for room.
        active: when its last message came, or the last payload had left.
        progressed: when its stream was last seen to have made progress.
        progress: what the stream said of its progress then.
        watched: whether the driver was told so; None before it was told anything.
    """

    __slots__ = (
        "active",
        "announced",
        "lingering",
        "progress",
        "progressed",
        "session",
        "stream",
        "unsent",
        "watched",
    )

    def __init__(self, stream: Stream, session: ServerSession, now: float) -> None:
        self.stream = stream
        self.session = session
        self.active = self.progressed = now
        self.progress: object = None
        self.announced = False
        self.lingering = False
        self.unsent = False
        self.watched: bool | None = None

    @property
    def silent_since(self) -> float:
        """When it was last seen to do anything."""
        return max(self.active, self.progressed)


class ServedConnections:
    """All connections of one server thread.

    Args:
        make_session: a session for a new connection on a lane.
        descriptor: the segment's descriptor, to be sent to readers on the Unix lane.
        settings: time limits.
        counters: where connections and their ends are counted.
        clock: where time comes from.
        watch: called when a socket is to be waited for: for room if it is `unsent`, else for messages.
        unwatch: called before a socket is closed.
    """

    def __init__(
        self,
        make_session: Callable[[Lane], ServerSession],
        descriptor: int,
        settings: ThreadSettings,
        counters: Counters,
        clock: Clock,
        watch: Callable[[ServedConnection], None],
        unwatch: Callable[[ServedConnection], None],
    ) -> None:
        self._make_session = make_session
        self._descriptor = descriptor
        self._settings = settings
        self._shortest = min(settings.idle, settings.lease / _PROGRESS_CHECKS)
        self._counters = counters
        self._clock = clock
        self._watch = watch
        self._unwatch = unwatch
        self._sockets: dict[Stream, ServedConnection] = {}
        self._again: dict[ServedConnection, None] = {}
        self._driven: dict[Stream, ServedConnection] = {}
        self._undrained: list[ServedConnection] = []
        self._next_sweep = math.inf
        self._unproven: Unproven[ServedConnection] = Unproven(clock, min(UNPROVEN_SECONDS, settings.idle))
        self._lines = LineLimit(clock=clock)

    # --- events -----------------------------------------------------------------------------------------------

    def add(self, stream: Stream) -> None:
        """Serve a connection that has come in."""
        now = self._clock.now()
        connection = ServedConnection(stream, self._make_session(stream.lane), now)
        self._counters.add("connections")
        self._next_sweep = min(self._next_sweep, now + self._limit(connection))
        displaced = self._unproven.add(connection)
        if displaced is not None:
            self._close_unproven(displaced, "newer ones displaced it")
        (self._sockets if stream.worker is None else self._driven)[stream] = connection
        self.serve(connection)

    def serve(self, connection: ServedConnection) -> bool:
        """Go on with a connection as far as that is possible without waiting; whether its turn ended before."""
        stream, session = connection.stream, connection.session
        turn_ends = self._clock.now() + TURN_SECONDS
        again = False
        try:
            for _ in range(ROUNDS):
                # First: an ACK may have come in the same step of progress that finished sending its payload.
                if connection.unsent:
                    if not stream.flush():
                        break
                    connection.unsent = False
                    connection.active = self._clock.now()
                    session.flushed()
                messages = None
                if session.unanswered < MOST_MESSAGES:  # more of them stay in the connection
                    messages = stream.receive(session.expects, MOST_MESSAGES if session.established else 1)
                if messages is not None and not connection.lingering:
                    session.receive(messages)
                    connection.active = self._clock.now()
                    if not connection.announced:
                        self._note_progress(connection)
                items = session.take()
                if items:
                    descriptor = None
                    if not connection.announced and session.established:
                        connection.announced = True
                        descriptor = None if stream.lane.in_band else self._descriptor
                    if not stream.send(items, descriptor):
                        connection.unsent = True
                        continue
                    session.flushed()
                    if self._clock.now() >= turn_ends:
                        again = True
                        break
                elif messages is None:
                    break
            else:
                again = True
        except ConnectionClosed:
            self._drop(connection, None)
            return False
        except (TransportError, ProtocolError) as error:
            self._drop(connection, error)
            return False
        if session.closing and not connection.lingering:
            # The peer reads the refusal and closes; closing first could take it from under its eyes.
            connection.lingering = True
            self._next_sweep = min(self._next_sweep, self._clock.now() + _LINGER_SECONDS)
        elif connection.active + self._shortest < self._next_sweep:
            # Its own limit: a time that is past already would have the driver look again and again.
            limit = self._limit(connection)
            due = connection.active + limit
            if _holds_lease(connection):
                due = self._clock.now() + limit / _PROGRESS_CHECKS
            self._next_sweep = min(self._next_sweep, due)
        if stream.worker is None:
            if again:
                self._again[connection] = None
            if connection.watched is not connection.unsent:
                connection.watched = connection.unsent
                self._watch(connection)
        return again

    def serve_again(self) -> bool:
        """Continue with the sockets whose turn ended before their work did; whether any is left."""
        if not self._again:
            return False
        waiting, self._again = self._again, {}
        for connection in waiting:
            if connection.stream in self._sockets:
                self.serve(connection)
        return bool(self._again)

    def serve_driven(self) -> bool:
        """Serve every connection of a worker, whose progress names none of them; whether any has work left."""
        again = False
        for connection in list(self._driven.values()):
            again = self.serve(connection) or again
        return again

    def sweep(self) -> bool:
        """Close what has been idle or silent for too long, and forget what is drained; whether there was any."""
        found = bool(self._undrained)
        if found:
            self._settle_undrained()
        for connection in self._unproven.overdue() if self._unproven else ():
            self._close_unproven(connection, "its proof of the secret was late")
            found = True
        now = self._clock.now()
        if now < self._next_sweep:
            return found
        self._next_sweep = math.inf
        for connection in self.all():
            limit = self._limit(connection)
            next_check = math.inf
            if _holds_lease(connection):
                _note_progress(connection, now)
                next_check = now + limit / _PROGRESS_CHECKS
            due = connection.silent_since + limit
            if due <= now:
                self._counters.add("evicted")
                self._drop(connection, None)
                found = True
            else:
                self._next_sweep = min(self._next_sweep, due, next_check)
        return found

    def finished(self, stop_by: Deadline) -> bool:
        """While the server stops: end what has nothing in flight, from `stop_by` on all; whether none is left."""
        for connection in self.all():
            session = connection.session
            if stop_by.expired or not (session.busy or session.leases):
                self._drop(connection, None)
        return not self

    def drop_all(self) -> None:
        """Close every connection; the leases of those that are not drained yet stay until `close`."""
        for connection in self.all():
            self._drop(connection, None)

    def close(self) -> None:
        """Return the leases of what is not drained yet: nothing can be sending any more."""
        self.drop_all()
        for connection in self._undrained:
            connection.session.close()
        self._undrained.clear()

    # --- state ------------------------------------------------------------------------------------------------

    def timeout(self, stopping: bool) -> float | None:
        """Seconds until `sweep` or `finished` has something to do; None for no bound."""
        if self._undrained or stopping:
            return _WATCHDOG_SECONDS
        sweep = math.inf if self._next_sweep == math.inf else max(0.0, self._next_sweep - self._clock.now())
        remaining = min(sweep, self._unproven.remaining)
        return None if remaining == math.inf else remaining

    def leases(self) -> list[dict[str, float | int | None]]:
        """The longest silent readers with live leases: pid (where the lane tells), leases, seconds since then."""
        now = self._clock.now()
        holding = sorted((c for c in self.all() if c.session.leases), key=lambda c: c.silent_since)
        return [
            {"pid": c.stream.peer_pid, "leases": c.session.leases, "age": now - c.silent_since}
            for c in holding[:_MOST_LISTED]
        ]

    def all(self) -> list[ServedConnection]:
        """The open connections."""
        return [*self._sockets.values(), *self._driven.values()]

    def __len__(self) -> int:
        return len(self._sockets) + len(self._driven)

    # --- inside -----------------------------------------------------------------------------------------------

    def _limit(self, connection: ServedConnection) -> float:
        if connection.lingering:
            return _LINGER_SECONDS
        if not connection.session.established:
            return math.inf  # its proof has a deadline
        if not connection.session.leases:
            return self._settings.idle
        return math.inf if connection.stream.lane.local else self._settings.lease

    def _note_progress(self, connection: ServedConnection) -> None:
        if connection.session.established:
            self._unproven.discard(connection)
        elif not connection.session.closing:
            self._unproven.received(connection)

    def _close_unproven(self, connection: ServedConnection, why: str) -> None:
        self._counters.add(UNPROVEN_CLOSED)
        self._lines.warn(logger, "closed a connection on the %s lane: %s", connection.stream.lane.name, why)
        self._drop(connection, None)

    def _drop(self, connection: ServedConnection, error: Exception | None) -> None:
        """End a connection; its leases are returned once nothing reads their slots for sending."""
        if isinstance(error, ProtocolError):
            self._counters.add("malformed")
            self._lines.warn(logger, "connection closed: %s", error)
        elif error is not None:
            self._counters.add("failed_connections")
            logger.debug("connection lost: %s", error)
        stream = connection.stream
        self._unproven.discard(connection)
        if stream.worker is not None:
            del self._driven[stream]
        else:
            del self._sockets[stream]
            self._unwatch(connection)
        stream.close()
        self._undrained.append(connection)
        self._settle_undrained()

    def _settle_undrained(self) -> None:
        waiting = []
        for connection in self._undrained:
            if connection.stream.drained:
                connection.session.close()
            else:
                waiting.append(connection)
        self._undrained = waiting


def _holds_lease(connection: ServedConnection) -> bool:
    """It has a lease that a time limit ends."""
    return not connection.stream.lane.local and connection.session.leases > 0 and not connection.lingering


def _note_progress(connection: ServedConnection, now: float) -> None:
    """Note whether bytes have travelled since the last check."""
    progress = connection.stream.progress()
    if progress is None or progress == connection.progress:
        return
    connection.progress = progress
    connection.progressed = now
    if (slowest := connection.stream.lane.min_bytes_per_second) is not None:
        slowest_seconds = connection.session.sending_bytes / slowest
        connection.progressed = min(now, connection.active + slowest_seconds)
