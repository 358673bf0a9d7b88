"""The connections of one server thread, served in turns: which is served, for how long, and when each is closed.

None of it waits for a peer, so a slow reader delays only its own connection.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable

from dray.admission import UNPROVEN_CLOSED, UNPROVEN_SECONDS, LineLimit, Unproven
from dray.clock import Deadline
from dray.errors import BufferClosedError, ConnectionClosed, DrayError, ProtocolError, TransportError
from dray.protocol.frames import MAX_BODY_BYTES
from dray.transport.lanes.base import Stream
from dray.transport.served_connection import LINGER_SECONDS, PROGRESS_CHECKS, ServedConnection
from dray.transport.server_statistics import COUNTED, LeaseInfo
from dray.transport.service import Service
from dray.transport.trace import Discard

logger = logging.getLogger("dray.server")

ROUNDS = 64
"""Batches of answers in a turn of one connection."""

TURN_SECONDS = 0.002
"""A turn ends after the batch of answers in which this time passes."""

MAX_MESSAGES = 256
"""Messages of one connection that are received together, and requests that may wait while more are received."""

_WATCHDOG_SECONDS = 0.05
"""Time between two checks while something can end without an event: a closed stream drains, or the loop stops."""


class ServedConnections:
    """All connections of one loop.

    Args:
        service: what is served.
        watch: called when a socket is to be waited for: for room if the connection is `unsent`, else for messages.
        unwatch: called before a socket is closed.
        attach: called when a consumer may lease directly.
        wake: called in any thread when `serve_pushed` has something to do.

    Attributes:
        counts: what has happened apart from the connections that exist now.
    """

    def __init__(
        self,
        service: Service,
        *,
        watch: Callable[[ServedConnection], None] = lambda _: None,
        unwatch: Callable[[ServedConnection], None] = lambda _: None,
        attach: Callable[[], None] = lambda: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self._service = service
        self._clock = service.clock
        self._watch = watch
        self._unwatch = unwatch
        self._attach = attach
        self._wake = wake
        self._pushed: deque[ServedConnection] = deque()
        # No connection has a shorter limit.
        self._shortest_limit = min(service.idle_timeout, service.lease_timeout / PROGRESS_CHECKS)
        self._sockets: dict[Stream, ServedConnection] = {}
        self._driven: dict[Stream, ServedConnection] = {}
        self._unfinished: dict[ServedConnection, None] = {}
        self._undrained: list[ServedConnection] = []
        self._counted: dict[ServedConnection, None] = {}
        self._counting = threading.Lock()
        self._next_sweep = math.inf
        self._unproven: Unproven[ServedConnection] = Unproven(
            self._clock, min(UNPROVEN_SECONDS, service.idle_timeout)
        )
        self._lines = LineLimit(clock=self._clock)

    # --- serving ----------------------------------------------------------------------------------------------

    def add(self, stream: Stream, endpoint: str = "") -> ServedConnection:
        """Serve a connection that was accepted at `endpoint`."""
        connection = ServedConnection(stream, endpoint, self._service, self._note_pushed)
        self.counts["connections"] += 1
        self._counted[connection] = None
        self._next_sweep = min(self._next_sweep, connection.active + connection.limit)
        displaced = self._unproven.add(connection)
        if displaced is not None:
            self._close_unproven(displaced, "newer ones displaced it")
        (self._sockets if stream.worker is None else self._driven)[stream] = connection
        self.serve(connection)
        return connection

    def serve(self, connection: ServedConnection) -> bool:
        """Give a connection its turn; True if the turn ended before its work."""
        stream, session, now = connection.stream, connection.session, self._clock.now
        turn_ends = now() + TURN_SECONDS
        unfinished = False
        try:
            for _ in range(ROUNDS):
                # First: an ACK may have come in the same step of progress that finished sending its payload.
                if connection.unsent:
                    if not connection.flush():
                        break
                    connection.unsent = False
                    connection.active = now()
                    connection.flushed()
                messages: bytes | memoryview | None = None
                descriptors: list[int] = []
                if session.expects_descriptor:
                    messages = stream.receive_with_descriptors(session.expects, descriptors)
                elif len(session.requests) < MAX_MESSAGES and session.body_bytes < MAX_BODY_BYTES:
                    # More of them stay in the connection.
                    messages = stream.receive(session.expects, MAX_MESSAGES if session.established else 1)
                if connection.lingering:
                    for descriptor in descriptors:
                        os.close(descriptor)
                elif messages is not None:
                    connection.receive(messages, descriptors)
                    if not connection.announced:
                        self._note_handshake(connection)
                items = connection.answer()
                if items:
                    shared: list[int] = []
                    if not connection.announced and session.established:
                        connection.announced = True
                        if not stream.lane.in_band:
                            shared = connection.shared_descriptors()
                            if connection.attached:
                                self._attach()
                    if not connection.send(items, shared):
                        connection.unsent = True
                        continue
                    connection.flushed()
                    if now() >= turn_ends:
                        unfinished = True
                        break
                elif connection.preparing:
                    if now() >= turn_ends:
                        unfinished = True
                        break
                elif messages is None:
                    break
            else:
                unfinished = True
        except (TransportError, ProtocolError, BufferClosedError) as error:
            self._discard(connection, error)
            return False
        if session.closing and not connection.lingering:
            # The peer reads the answer and closes. If the server closed first, the answer could be lost.
            connection.lingering = True
            self._next_sweep = min(self._next_sweep, now() + LINGER_SECONDS)
        elif connection.active + self._shortest_limit < self._next_sweep:
            due = connection.active + connection.limit
            if (next_check := connection.next_check) != math.inf:
                # `due` may have passed already, and would make the loop sweep repeatedly.
                due = now() + next_check
            self._next_sweep = min(self._next_sweep, due)
        if stream.worker is None:
            if unfinished:
                self._unfinished[connection] = None
            if connection.watched is not connection.unsent:
                connection.watched = connection.unsent
                self._watch(connection)
        return unfinished

    def serve_unfinished(self) -> bool:
        """Serve the sockets whose turn ended before their work; True if any has work left."""
        if not self._unfinished:
            return False
        waiting, self._unfinished = self._unfinished, {}
        for connection in waiting:
            if connection.stream in self._sockets:
                self.serve(connection)
        return bool(self._unfinished)

    def serve_pushed(self) -> None:
        """Serve the connections to which another thread wants to send."""
        while self._pushed:
            connection = self._pushed.popleft()
            if connection.stream in self._sockets or connection.stream in self._driven:
                self.serve(connection)

    def serve_driven(self) -> bool:
        """Serve every connection of a worker, whose progress names none of them; True if any has work left."""
        unfinished = False
        for connection in list(self._driven.values()):
            unfinished = self.serve(connection) or unfinished
        return unfinished

    # --- closing ----------------------------------------------------------------------------------------------

    def sweep(self) -> bool:
        """Close what was idle or silent for too long, and forget what is drained; True if there was any."""
        found = bool(self._undrained)
        if found:
            self._forget_drained()
        for connection in self._unproven.overdue() if self._unproven else ():
            self._close_unproven(connection, "its proof of the secret was late")
            found = True
        now = self._clock.now()
        if now < self._next_sweep:
            return found
        self._next_sweep = math.inf
        for connection in self.all():
            next_check = connection.next_check
            if next_check != math.inf:
                connection.check_progress(now)
            due = connection.silent_since + connection.limit
            if due <= now:
                self.counts["evicted"] += 1
                self._discard(connection, None)
                found = True
            else:
                self._next_sweep = min(self._next_sweep, due, now + next_check)
        return found

    def finish(self, deadline: Deadline) -> bool:
        """While the loop stops: close what has nothing in flight, after the deadline all; True if none is left.

        Until consumers have learned of the end, they may read and acknowledge, over any of their connections.
        """
        ending = any(connection.ending for connection in self.all())
        for connection in self.all():
            if deadline.expired or not (ending or connection.busy):
                self._discard(connection, None)
        return not self

    def discard_all(self) -> None:
        """Close every connection; the leases of those that are not drained are kept until `close`."""
        for connection in self.all():
            self._discard(connection, None)

    def close(self) -> None:
        """Release the leases of what is not drained: the workers have ended, and no slot is read any more."""
        self.discard_all()
        for connection in self._undrained:
            self._forget(connection)
        self._undrained.clear()

    # --- state ------------------------------------------------------------------------------------------------

    def timeout(self, stopping: bool) -> float | None:
        """Seconds until `sweep` or `finish` has something to do; None for no limit."""
        if self._undrained or stopping:
            return _WATCHDOG_SECONDS
        sweep = math.inf if self._next_sweep == math.inf else max(0.0, self._next_sweep - self._clock.now())
        remaining = min(sweep, self._unproven.remaining)
        return None if remaining == math.inf else remaining

    def leases(self) -> list[LeaseInfo]:
        """All live leases; also those of closed connections from whose slots a worker may still read."""
        now = self._clock.now()
        return [lease for each in (*self.all(), *self._undrained) if each.leased for lease in each.leases(now)]

    def totals(self) -> dict[str, int]:
        """All counters, summed over the connections."""
        with self._counting:
            all_counts = [self.counts, *(connection.counts for connection in list(self._counted))]
            return {name: sum(counts[name] for counts in all_counts) for name in COUNTED}

    def all(self) -> list[ServedConnection]:
        """The open connections."""
        return [*self._sockets.values(), *self._driven.values()]

    def __len__(self) -> int:
        return len(self._sockets) + len(self._driven)

    # --- inside -----------------------------------------------------------------------------------------------

    def _note_pushed(self, connection: ServedConnection) -> None:
        self._pushed.append(connection)
        self._wake()

    def _note_handshake(self, connection: ServedConnection) -> None:
        if connection.session.established:
            self._unproven.discard(connection)
        elif not connection.session.closing:
            self._unproven.received(connection)

    def _close_unproven(self, connection: ServedConnection, why: str) -> None:
        self.counts[UNPROVEN_CLOSED] += 1
        self._lines.warn(logger, "closed a connection on the %s lane: %s", connection.stream.lane.name, why)
        self._discard(connection, None)

    def _discard(self, connection: ServedConnection, error: DrayError | None) -> None:
        """Close a connection; its leases end when no slot is read for sending any more."""
        if isinstance(error, ProtocolError):
            self.counts["malformed"] += 1
            self._lines.warn(logger, "connection closed: %s", error)
        elif error is not None and not isinstance(error, ConnectionClosed):
            self.counts["failed_connections"] += 1
            logger.debug("connection failed: %s", error)
        stream = connection.stream
        self._unproven.discard(connection)
        if stream.worker is not None:
            del self._driven[stream]
        else:
            del self._sockets[stream]
            self._unwatch(connection)
        connection.end_subscription()
        stream.close()
        if self._service.trace is not None:
            self._service.trace(
                Discard(self._clock.now(), connection.endpoint, error, id(connection), connection.leased)
            )
        self._undrained.append(connection)
        self._forget_drained()

    def _forget_drained(self) -> None:
        waiting = []
        for connection in self._undrained:
            if connection.stream.drained:
                self._forget(connection)
            else:
                waiting.append(connection)
        self._undrained = waiting

    def _forget(self, connection: ServedConnection) -> None:
        connection.close()
        with self._counting:
            del self._counted[connection]
            for name, count in connection.counts.items():
                self.counts[name] += count
