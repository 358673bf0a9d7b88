"""Who holds a client's connections: a thread inside one, a caller between two results, or the arrays of a lease.

An exception of a signal handler can end any call between any two of its steps, those of its clean-up too. So
nothing depends on the clean-up: a connection that is open, not idle, and held by none of these is left over. It is
closed by the next call that opens or closes one, by `PayloadClient.close` at the latest. `Holder.inside` is a lock
of the interpreter's own, which a ``with`` statement gives back whatever happens.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

C = TypeVar("C")
G = TypeVar("G")


class Keeper(enum.Enum):
    """Who keeps a connection while no thread is inside it."""

    NOBODY = enum.auto()
    CALLER = enum.auto()
    """A batch between two results, a lease whose block was not entered, or a read that no task has received."""
    ARRAYS = enum.auto()
    """A lease whose arrays were handed out: its slot must not be used again while they are there."""


KEEPS = {
    Keeper.NOBODY: (False, False),
    Keeper.CALLER: (True, False),
    Keeper.ARRAYS: (True, True),
}
"""Whether a connection stays open: while the client is open, and once it closes."""


class Holder(Generic[C, G]):
    """What one call, or one lease, holds.

    Attributes:
        inside: held by the thread that uses the connection.
        connection, group: what it uses.
        keeper: who keeps it when no thread is inside.
        drained: idle connections, and their groups, that are about to be closed.
    """

    __slots__ = ("connection", "drained", "group", "inside", "keeper")

    def __init__(self) -> None:
        self.inside = threading.Lock()
        self.connection: C | None = None
        self.group: G | None = None
        self.keeper = Keeper.NOBODY
        self.drained: tuple[list[C], list[G]] = [], []

    def holds(self, closing: bool) -> bool:
        """What it has must not be closed by others."""
        return self.inside.locked() or KEEPS[self.keeper][closing]

    def clear(self) -> None:
        """Hold nothing any more."""
        self.connection = self.group = None
        self.keeper = Keeper.NOBODY
        self.drained = [], []


def held(holders: Iterable[Holder[C, G]], closing: bool) -> tuple[set[C], set[G]]:
    """The connections and groups that must not be closed by others."""
    connections: set[C] = set()
    groups: set[G] = set()
    for holder in holders:
        if holder.holds(closing):
            if holder.connection is not None:
                connections.add(holder.connection)
            if holder.group is not None:
                groups.add(holder.group)
            connections.update(holder.drained[0])
            groups.update(holder.drained[1])
    return connections, groups
