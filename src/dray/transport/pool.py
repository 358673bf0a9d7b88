"""Which connections are idle, and which are held: by a thread, by a caller between two results, or by arrays.

An exception of a signal handler can end any call between any two of its steps, those of its clean-up too. So no
hand-over depends on clean-up. A connection that is open, not in the pool and not held is unused; the next call
that opens or closes a connection closes it, `PayloadClient.close` at the latest. `Holder.inside` is a lock of the
interpreter's own, which a ``with`` statement gives back after every exception.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Collection, Iterable
from typing import Generic, NamedTuple, TypeVar

MAX_IDLE = 2
IDLE_SECONDS = 100.0
"""A connection that was idle for longer is replaced; the server closes it after 120 s."""

_NOTHING: tuple[tuple[()], tuple[()]] = (), ()

C = TypeVar("C")
W = TypeVar("W")


class Keeper(enum.Enum):
    """What keeps a held connection open while no thread is inside its holder."""

    NONE = enum.auto()
    CALLER = enum.auto()
    """A batch between two results, a lease whose block was not entered, or a read that no task has received."""
    ARRAYS = enum.auto()
    """A lease whose arrays were handed out: its slot must not be used again while they exist."""


KEEPS = {
    Keeper.NONE: (False, False),
    Keeper.CALLER: (True, False),
    Keeper.ARRAYS: (True, True),
}
"""Whether a connection stays open: while the client is open, and while it closes."""


class Holder(Generic[C, W]):
    """What one call, or one lease, holds.

    Attributes:
        inside: held by the thread that uses the connection.
        connection, worker: what it uses.
        keeper: what keeps them when no thread is inside.
        drained: connections out of the pool, and workers, that are about to be closed.
    """

    __slots__ = ("connection", "drained", "inside", "keeper", "worker")

    def __init__(self) -> None:
        self.inside = threading.Lock()
        self.connection: C | None = None
        self.worker: W | None = None
        self.keeper = Keeper.NONE
        self.drained: tuple[Collection[C], Collection[W]] = _NOTHING

    def holds(self, closing: bool) -> bool:
        """Other threads must not close what it has."""
        return self.inside.locked() or KEEPS[self.keeper][closing]

    def clear(self) -> None:
        """Hold nothing."""
        self.connection = self.worker = None
        self.keeper = Keeper.NONE
        self.drained = _NOTHING


class Idle(NamedTuple, Generic[C, W]):
    """A connection that no call uses, its worker, and since when."""

    connection: C
    worker: W | None
    since: float


class ConnectionPool(Generic[C, W]):
    """The idle connections to each endpoint. Decides what to use again and what to give up; does no I/O.

    Only one thread can use a worker at a time: a connection whose worker is busy stays in the pool.
    """

    def __init__(self, max_idle: int = MAX_IDLE, idle_seconds: float = IDLE_SECONDS) -> None:
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._idle: dict[str, list[Idle[C, W]]] = {}
        self._next_sweep = 0.0

    def at_hand(self, endpoint: str, now: float, alone: bool) -> Idle[C, W] | None:
        """The connection used last, if nothing is due, and it needs no worker, or no other call can have it.

        The short way of a small read. `alone`: no other call has a connection or worker.
        """
        idle = self._idle.get(endpoint)
        due = not idle or now >= self._next_sweep or now - idle[0].since >= self._idle_seconds
        return idle.pop() if idle and not due and (alone or idle[-1].worker is None) else None

    def checkout(self, endpoint: str, busy: Collection[W]) -> Idle[C, W] | None:
        """The connection used last whose worker is not busy; call `expire` before."""
        idle = self._idle.get(endpoint, [])
        for index in reversed(range(len(idle))):
            if idle[index].worker is None or idle[index].worker not in busy:
                return idle.pop(index)
        return None

    def checkin(self, endpoint: str, connection: C, worker: W | None, now: float) -> bool:
        """Keep a connection after its use; False if there are enough."""
        idle = self._idle.get(endpoint)
        if idle is None:
            idle = self._idle[endpoint] = []
        if len(idle) >= self._max_idle:
            return False
        idle.append(tuple.__new__(Idle, (connection, worker, now)))  # `Idle(…)` is a function in Python
        return True

    def expire(self, endpoint: str, now: float) -> bool:
        """Give up connections that were idle for too long; whether any may be left to close.

        Once in `idle_seconds` this is done for all endpoints, as some of them are never asked for again.
        """
        sweep = now >= self._next_sweep
        if not sweep:
            idle = self._idle.get(endpoint)
            if not idle or now - idle[0].since < self._idle_seconds:  # the first is the oldest
                return False
        else:
            self._next_sweep = now + self._idle_seconds
        for each in list(self._idle) if sweep else [endpoint]:
            kept = [entry for entry in self._idle.pop(each) if now - entry.since < self._idle_seconds]
            if kept:
                self._idle[each] = kept
        return True

    def forget(self, endpoint: str) -> None:
        """Give up the connections to an endpoint."""
        self._idle.pop(endpoint, None)

    def drain(self, busy: Collection[W]) -> list[C]:
        """Give up all connections whose worker is not busy."""
        given_up = []
        for endpoint, idle in list(self._idle.items()):
            kept = [entry for entry in idle if entry.worker is not None and entry.worker in busy]
            given_up += [entry.connection for entry in idle if entry not in kept]
            if kept:
                self._idle[endpoint] = kept
            else:
                del self._idle[endpoint]
        return given_up

    def connections(self) -> set[C]:
        """All idle connections."""
        return {entry.connection for idle in self._idle.values() for entry in idle}

    def __repr__(self) -> str:
        return f"<ConnectionPool: {len(self.connections())} idle>"


def held(holders: Iterable[Holder[C, W]], closing: bool) -> tuple[set[C], set[W]]:
    """The connections and workers that are held."""
    connections: set[C] = set()
    workers: set[W] = set()
    for holder in holders:
        if holder.holds(closing):
            if holder.connection is not None:
                connections.add(holder.connection)
            if holder.worker is not None:
                workers.add(holder.worker)
            connections.update(holder.drained[0])
            workers.update(holder.drained[1])
    return connections, workers
