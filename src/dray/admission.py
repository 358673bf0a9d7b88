"""What bounds connections that have not proven the secret: how many there are, for how long, and what they cost.

Everything that accepts connections uses it: server threads on every lane, the controller, and the head of a job on
several nodes. Nothing here waits, and nothing here closes a socket: a driver accepts, asks, and carries out.

- At most `MAX_UNPROVEN` connections have not proven the secret. One more displaces the oldest that has not sent a
  complete message, or else the oldest: a flood of silent connections leaves those alone that are in the handshake.
- A proof must have come `UNPROVEN_SECONDS` after a connection was accepted.
- A driver accepts at most `MAX_ACCEPTED` connections before it serves those that it has.
- Where accepting fails, an `AcceptPause` begins. A driver that waits with epoll unregisters its listening sockets
  until it is over, as they stay readable.
- Lines about strangers pass a `LineLimit`.
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
"""Connections of one listener, or of one server thread, that have not proven the secret."""

UNPROVEN_SECONDS = 10.0
"""Seconds from the acceptance of a connection to its proof of the secret."""

MAX_ACCEPTED = 8
"""Connections that are accepted before others are served. The limit is a multiple of it, so that what a connection
has sent by the time it is accepted is read before it can be displaced."""

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted; it may allow fewer."""

ACCEPT_PAUSE_SECONDS = 1.0
"""Seconds without accepting after accepting has failed."""

STRANGER_LINE_SECONDS = 10.0
"""Seconds between two lines about strangers in a log."""

UNPROVEN_CLOSED = "unproven_closed"
"""The counter of connections that were closed because their proof was late, or newer ones displaced them."""

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
"""From `accept`, these are about the connection, which is gone, and not about the listening socket: accept(2)."""

_Connection = TypeVar("_Connection")


def accept(listening: socket.socket) -> socket.socket | None:
    """The next connection of a non-blocking listening socket, or None where there is none, or one that has failed.

    Raises:
        OSError: this process or the system cannot accept: it is out of descriptors or memory.
    """
    try:
        return listening.accept()[0]
    except OSError as error:
        if error.errno in _FAILED_BEFORE:
            return None
        raise


class Unproven(Generic[_Connection]):
    """The connections of one listener that have not proven the secret, in the order in which they came.

    Args:
        clock: where time comes from.
        seconds: from `add` to the proof.
        limit: how many there may be.
    """

    def __init__(
        self, clock: Clock = MONOTONIC, seconds: float = UNPROVEN_SECONDS, limit: int = MAX_UNPROVEN
    ) -> None:
        self._clock = clock
        self._seconds = seconds
        self._limit = limit
        self._silent: dict[_Connection, float] = {}
        self._greeted: dict[_Connection, float] = {}

    def __len__(self) -> int:
        return len(self._silent) + len(self._greeted)

    def __iter__(self) -> Iterator[_Connection]:
        return chain(self._silent, self._greeted)

    def __contains__(self, connection: _Connection) -> bool:
        return connection in self._silent or connection in self._greeted

    def add(self, connection: _Connection) -> _Connection | None:
        """Note a connection that was accepted; returns the one that it displaces, which is to be closed."""
        displaced = None
        if len(self) >= self._limit:
            from_ = self._silent or self._greeted
            displaced = next(iter(from_))
            del from_[displaced]
        self._silent[connection] = self._clock.now() + self._seconds
        return displaced

    def greeted(self, connection: _Connection) -> None:
        """It has sent a complete message, which proves nothing yet: silent ones are displaced before it."""
        deadline = self._silent.pop(connection, None)
        if deadline is not None:
            self._greeted[connection] = deadline

    def discard(self, connection: _Connection) -> None:
        """It has proven the secret, or is closed. One that is not here is no error."""
        if self._silent.pop(connection, None) is None:
            self._greeted.pop(connection, None)

    def overdue(self) -> list[_Connection]:
        """Those whose proof is late; they are to be closed, and are not here any more."""
        now = self._clock.now()
        late = [each for each, deadline in self._deadlines() if deadline <= now]
        for connection in late:
            self.discard(connection)
        return late

    @property
    def remaining(self) -> float:
        """Seconds until the next proof is late, never negative; ``inf`` if none is awaited."""
        if not self:
            return math.inf
        return max(0.0, min(deadline for _, deadline in self._deadlines()) - self._clock.now())

    def _deadlines(self) -> chain[tuple[_Connection, float]]:
        return chain(self._silent.items(), self._greeted.items())

    def __repr__(self) -> str:
        return f"<Unproven {len(self._silent)} silent, {len(self._greeted)} in the handshake>"


class LineLimit:
    """Lets one log line through in a time, and counts the others.

    Args:
        seconds: between two lines.
        clock: where time comes from.
    """

    def __init__(self, seconds: float = STRANGER_LINE_SECONDS, clock: Clock = MONOTONIC) -> None:
        self._seconds = seconds
        self._clock = clock
        self._next = -math.inf
        self._left_out = 0

    def passes(self) -> str | None:
        """None if a line is to be left out now; else what it ends with: how many were left out before it."""
        now = self._clock.now()
        if now < self._next:
            self._left_out += 1
            return None
        self._next = now + self._seconds
        left_out, self._left_out = self._left_out, 0
        return f" (similar lines left out: {left_out})" if left_out else ""

    def warn(self, logger: logging.Logger, message: str, *arguments: object) -> None:
        """Log a warning, unless it is to be left out."""
        ending = self.passes()
        if ending is not None:
            logger.warning(message + "%s", *arguments, ending)


class AcceptPause:
    """A time without accepting, after accepting has failed: what is in the backlog waits there.

    Args:
        logger: where one line a second at most says so.
        clock: where time comes from.
    """

    def __init__(self, logger: logging.Logger, clock: Clock = MONOTONIC) -> None:
        self._logger = logger
        self._clock = clock
        self._lines = LineLimit(ACCEPT_PAUSE_SECONDS, clock)
        self._until = -math.inf

    def begin(self, error: Exception) -> None:
        """Accepting has failed with `error`."""
        self._until = self._clock.now() + ACCEPT_PAUSE_SECONDS
        message = "a connection could not be accepted: %s; the next attempt follows in %g s"
        self._lines.warn(self._logger, message, error, ACCEPT_PAUSE_SECONDS)

    @property
    def remaining(self) -> float:
        """Seconds left; 0 when there is no pause."""
        return max(0.0, self._until - self._clock.now())
