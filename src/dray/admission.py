"""Limits on connections that have not proven the secret: their number, their time, and their log lines.

Everything that accepts connections uses these: server threads on every lane, the controller, and the head of a job
on several nodes. Nothing here waits or closes a socket; the caller does that.

- At most `MAX_UNPROVEN` connections have not proven the secret. One more displaces the oldest that has not sent a
  complete message, or else the oldest, so that a flood of silent connections does not displace handshakes.
- The proof must arrive within `UNPROVEN_SECONDS` after the connection was accepted.
- A caller accepts at most `MAX_ACCEPTED` connections before it serves those that it has.
- An `AcceptPause` begins when accepting fails. During the pause a caller with epoll unregisters its listening
  sockets, which stay readable.
- A `LineLimit` limits log lines about connections without a proof.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Iterator
from itertools import chain
from typing import Generic, TypeVar

from dray.clock import MONOTONIC, Clock

MAX_UNPROVEN = 64
"""Connections of one listener, or of one server thread, without a proof of the secret."""

UNPROVEN_SECONDS = 10.0
"""Seconds from accepting a connection to its proof of the secret."""

MAX_ACCEPTED = 8
"""Connections that are accepted before others are served. `MAX_UNPROVEN` is a multiple of it: what a connection
has sent before it is accepted is read before another one can displace it."""

BACKLOG = 1024
"""Connections that the kernel queues until they are accepted; it may allow fewer."""

ACCEPT_PAUSE_SECONDS = 1.0
"""Length of the pause after accepting has failed."""

STRANGER_LINE_SECONDS = 10.0
"""Seconds between two log lines about connections without a proof."""

UNPROVEN_CLOSED = "unproven_closed"
"""The counter of connections that were closed because their proof was late or a newer one displaced them."""

ACCEPT_FAILURES = "accept_failures"
"""The counter of failures to accept."""

_FAILED_BEFORE = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
        errno.EPERM,
    }
)
"""From `accept`, these errors concern the connection, which has ended, not the listening socket: accept(2)."""

_Connection = TypeVar("_Connection")


def accept(listening: socket.socket) -> socket.socket | None:
    """The next connection of a non-blocking listening socket; None if there is none, or it has failed.

    Raises:
        OSError: the process or the system is out of descriptors or memory.
    """
    try:
        return listening.accept()[0]
    except OSError as error:
        if error.errno in _FAILED_BEFORE:
            return None
        raise


class Unproven(Generic[_Connection]):
    """The connections of one listener that have not proven the secret, oldest first.

    Args:
        clock: where time comes from.
        seconds: time limit from `add` to the proof.
        limit: maximum number of connections.
    """

    def __init__(
        self, clock: Clock = MONOTONIC, seconds: float = UNPROVEN_SECONDS, limit: int = MAX_UNPROVEN
    ) -> None:
        self._clock = clock
        self._seconds = seconds
        self._limit = limit
        self._silent: dict[_Connection, float] = {}
        self._started: dict[_Connection, float] = {}

    def __len__(self) -> int:
        return len(self._silent) + len(self._started)

    def __iter__(self) -> Iterator[_Connection]:
        return chain(self._silent, self._started)

    def __contains__(self, connection: _Connection) -> bool:
        return connection in self._silent or connection in self._started

    def add(self, connection: _Connection) -> _Connection | None:
        """Add an accepted connection; returns the one that it displaces, which the caller closes."""
        displaced = None
        if len(self) >= self._limit:
            displaced = next(iter(self))
            self.discard(displaced)
        self._silent[connection] = self._clock.now() + self._seconds
        return displaced

    def received(self, connection: _Connection) -> None:
        """A complete message has arrived, without a proof so far: silent connections are displaced first."""
        deadline = self._silent.pop(connection, None)
        if deadline is not None:
            self._started[connection] = deadline

    def discard(self, connection: _Connection) -> None:
        """Remove a connection that has proven the secret or is closed; an unknown one is not an error."""
        if self._silent.pop(connection, None) is None:
            self._started.pop(connection, None)

    def overdue(self) -> list[_Connection]:
        """Remove and return the connections whose proof is late; the caller closes them."""
        now = self._clock.now()
        late = [each for each, at in (*self._silent.items(), *self._started.items()) if at <= now]
        for connection in late:
            self.discard(connection)
        return late

    @property
    def remaining(self) -> float:
        """Seconds until the next proof is late, never negative; ``inf`` if there are no connections."""
        deadlines = chain(self._silent.values(), self._started.values())
        return max(0.0, min(deadlines, default=math.inf) - self._clock.now())

    def __repr__(self) -> str:
        return f"<Unproven {len(self._silent)} silent, {len(self._started)} in the handshake>"


class LineLimit:
    """Passes one log line in a period, and counts the others.

    Args:
        seconds: the period.
        clock: where time comes from.
    """

    def __init__(self, seconds: float = STRANGER_LINE_SECONDS, clock: Clock = MONOTONIC) -> None:
        self._seconds = seconds
        self._clock = clock
        self._next = -math.inf
        self._left_out = 0

    def passes(self) -> str | None:
        """None if the line must be left out; else its ending, with the number of lines left out before it."""
        now = self._clock.now()
        if now < self._next:
            self._left_out += 1
            return None
        self._next = now + self._seconds
        left_out, self._left_out = self._left_out, 0
        return f" (similar lines left out: {left_out})" if left_out else ""

    def warn(self, logger: logging.Logger, message: str, *arguments: object) -> None:
        """Log a warning, unless it must be left out."""
        ending = self.passes()
        if ending is not None:
            logger.warning(message + "%s", *arguments, ending)


class AcceptPause:
    """A time without accepting, after accepting has failed: connections stay in the backlog.

    Args:
        logger: gets at most one warning in a second.
        clock: where time comes from.
    """

    def __init__(self, logger: logging.Logger, clock: Clock = MONOTONIC) -> None:
        self._logger = logger
        self._clock = clock
        self._lines = LineLimit(ACCEPT_PAUSE_SECONDS, clock)
        self._until = -math.inf

    def begin(self, error: Exception) -> None:
        """Begin a pause, because accepting has failed with `error`."""
        self._until = self._clock.now() + ACCEPT_PAUSE_SECONDS
        message = "a connection could not be accepted: %s; the next attempt follows in %g s"
        self._lines.warn(self._logger, message, error, ACCEPT_PAUSE_SECONDS)

    @property
    def remaining(self) -> float:
        """Seconds left; 0 without a pause."""
        return max(0.0, self._until - self._clock.now())
