"""Idle connections, kept for the next exchange. Decides; `client` opens and closes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

MOST_IDLE = 2
IDLE_SECONDS = 100.0
"""A connection idle for longer is replaced: the server evicts at 120 s."""

C = TypeVar("C")
G = TypeVar("G", bound=Hashable)


class _Idle(NamedTuple, Generic[C, G]):
    connection: C
    group: G | None
    since: float


class Checkout(NamedTuple, Generic[C, G]):
    """What to use for an exchange.

    Attributes:
        connection: an idle connection, or None: open one.
        group: the group to open it in, or None: there is no free one.
        expired: connections to close, each with its group, of any endpoint; `discard` the group afterwards.
        idle: seconds for which the connection was not used.
    """

    connection: C | None
    group: G | None
    expired: Sequence[tuple[C, G | None]] = ()
    idle: float = 0.0


class ConnectionPool(Generic[C, G]):
    """Up to two idle connections for each endpoint.

    Connections may share a *group* (a UCX worker) that only one thread can use at a time: a group is busy from
    checkout to `checkin` or `discard`, and its other connections stay where they are until then.
    """

    def __init__(self, most_idle: int = MOST_IDLE, idle_seconds: float = IDLE_SECONDS) -> None:
        self._most_idle = most_idle
        self._idle_seconds = idle_seconds
        self._idle: dict[str, list[_Idle[C, G]]] = {}
        self._groups: dict[G, bool] = {}
        self._next_sweep = 0.0

    def at_hand(self, endpoint: str, now: float) -> tuple[C, float] | None:
        """Take the connection that was used last, and say for how long it was not, if nothing else is to be done.

        None where something is: no connection, one of a group, or idle ones that are to be replaced.
        """
        waiting = self._idle.get(endpoint)
        if waiting and now < self._next_sweep and now - waiting[0][2] < self._idle_seconds:
            connection, group, since = waiting[-1]
            if group is None:
                del waiting[-1]
                return connection, now - since
        return None

    def checkout(self, endpoint: str, now: float, fits: Callable[[G], bool] | None = None) -> Checkout[C, G]:
        """Take the connection that was used last, or say in which group that fits to open one, if any."""
        expired: list[tuple[C, G | None]] = []
        chosen: _Idle[C, G] | None = None
        kept: list[_Idle[C, G]] = []
        for idle in reversed(self._idle.pop(endpoint, [])):
            connection, group, since = idle
            if group is not None and self._groups[group]:
                kept.append(idle)
                continue
            if now - since >= self._idle_seconds:
                expired.append((connection, self._take(group)))
            elif chosen is None:
                chosen = idle
                self._take(group)
            else:
                kept.append(idle)
        if kept:
            self._idle[endpoint] = kept[::-1]
        if chosen is not None:
            connection, group, since = chosen
            self._sweep(now, group, expired)
            return Checkout(connection, group, expired, now - since)
        free = (group for group, busy in self._groups.items() if not busy and fits is not None and fits(group))
        group = self._take(next(free, None))
        self._sweep(now, group, expired)
        return Checkout(None, group, expired)

    def add_group(self, group: G) -> None:
        """A new group, busy with the exchange it was made for."""
        self._groups[group] = True

    def checkin(self, endpoint: str, connection: C, group: G | None, now: float) -> C | None:
        """Keep a connection after a clean exchange; one that is too many comes back to be closed.

        Its group is free from then on, unless the connection came back: then `discard` it after closing.
        """
        idle = self._idle.get(endpoint)
        if idle is None:
            idle = self._idle[endpoint] = []
        if len(idle) >= self._most_idle:
            return connection
        idle.append(tuple.__new__(_Idle, (connection, group, now)))  # `_Idle(…)` is a function in Python
        if group is not None:
            self.discard(group)
        return None

    def discard(self, group: G | None) -> None:
        """The connection that made the group busy is closed, or in the pool."""
        if group is not None and group in self._groups:
            self._groups[group] = False

    def has(self, group: G) -> bool:
        """The group was added, and was not given out for good."""
        return group in self._groups

    def occupy(self, group: G | None) -> None:
        """Make a group busy, so that one of its connections can be closed; see `discard`."""
        if group is not None and group in self._groups:
            self._groups[group] = True

    def drain(self) -> tuple[list[C], list[G]]:
        """Give out, for good, the idle connections and groups that no thread uses."""
        connections: list[C] = []
        for endpoint, kept in list(self._idle.items()):
            busy = [idle for idle in kept if idle[1] is not None and self._groups[idle[1]]]
            connections += [idle[0] for idle in kept if idle not in busy]
            self._idle[endpoint] = busy
        groups = [group for group, busy in self._groups.items() if not busy]
        for group in groups:
            del self._groups[group]
        return connections, groups

    def withheld(self) -> list[C]:
        """The idle connections that `drain` leaves, as a thread uses their group."""
        return [connection for kept in self._idle.values() for connection, _, _ in kept]

    def count(self, endpoint: str) -> int:
        """Idle connections to an endpoint."""
        return len(self._idle.get(endpoint, ()))

    def _sweep(self, now: float, mine: G | None, expired: list[tuple[C, G | None]]) -> None:
        """Once in a while, add what is expired at every endpoint: some of them nobody asks for any more.

        Connections of the group `mine`, which the caller has taken, are closed by the caller as well.
        """
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._idle_seconds
        taken: dict[G, C] = {}
        for endpoint, waiting in list(self._idle.items()):
            kept = []
            for idle in waiting:
                connection, group, since = idle
                held = group is not None and self._groups[group] and group != mine and group not in taken
                if held or now - since < self._idle_seconds:
                    kept.append(idle)
                elif group is None or group == mine or group in taken:
                    expired.append((connection, None))
                else:
                    self._take(group)
                    taken[group] = connection
            if kept:
                self._idle[endpoint] = kept
            else:
                del self._idle[endpoint]
        # Last, as each of these gives its group back.
        expired += [(connection, group) for group, connection in taken.items()]

    def _take(self, group: G | None) -> G | None:
        if group is not None:
            self._groups[group] = True
        return group
