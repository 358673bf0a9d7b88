"""Which version is announced to a subscriber: the decisions of a `Publisher`. No I/O, no waits.

A subscriber has credit for some announcements, so that a slow one does not make them pile up. While it has credit,
each version is announced to it. When it has used all of it, nothing is announced until it gives credit again; then
the newest version is, whether that is new to it or not. So a subscriber that finds its credit used up knows that
one announcement follows.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import NamedTuple

from dray.protocol.streams import Given, Returned
from dray.ring.shared_words import SharedWords
from dray.ring.stream_words import StreamWords
from dray.streams.delivery import Connection, RingView


class Part(NamedTuple):
    """A payload of a version."""

    slot: int
    sequence: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Version:
    """A version that was published.

    Attributes:
        number: its number.
        full: the payload that is all of it.
        delta: what has changed, see `dray.streams.sparse`; None if there is no such payload.
        base: the number of the version before it.
    """

    number: int
    full: Part
    delta: Part | None
    base: int

    def part_for(self, announced: Version | None) -> Part:
        """What a subscriber that takes deltas reads, given the version that was announced to it last."""
        if self.delta is None or announced is None or announced.number < self.base:
            return self.full
        return self.delta


class Follower:
    """A subscriber, as its publisher knows it.

    Args:
        newest: what it belongs to.
        connection: the connection to it.
        pid: its process; None if that is not known.
        words: shared memory, where it leases directly.
        deltas: versions travel over a network to it.
    """

    def __init__(
        self,
        newest: NewestDelivery,
        connection: Connection,
        *,
        pid: int | None,
        words: StreamWords | None,
        deltas: bool,
    ) -> None:
        self.connection = connection
        self.pid = pid
        self.stream_words = words
        self.deltas = deltas
        self.active = False
        self.announced: Version | None = None
        self.waits = True  # it has used up its credit, and gets the newest version once it gives more
        self.given = 0
        self._newest = newest
        self._credit = 0

    @property
    def words(self) -> SharedWords | None:
        """The memory to share with the subscriber."""
        return None if self.stream_words is None else self.stream_words.shared

    @property
    def has_credit(self) -> bool:
        """A version may be announced to it."""
        credit = self._credit if self.stream_words is None else self.stream_words.credit
        return self.active and credit > self.given

    # --- called by its connection, without the lock -----------------------------------------------------------

    def start(self) -> None:
        """Its subscription has been confirmed."""
        with self._newest.lock:
            self.active = True
        self._newest.serve()

    def set_credit(self, total: int) -> None:
        """`total` versions may have been announced to it."""
        with self._newest.lock:
            self._credit = total
        self._newest.serve()

    def begin(self, slot: int, sequence: int, number: int) -> None:
        """Nothing follows: versions are not handed out to one subscriber alone."""

    def take_back(self, returned: Returned) -> None:
        """Nothing follows: versions are not handed out to one subscriber alone."""

    def end(self) -> None:
        """It has ended."""
        with self._newest.lock:
            if self in self._newest.followers:
                self._newest.followers.remove(self)
                if self.stream_words is not None:
                    self.stream_words.close()


class NewestDelivery:
    """Announces the newest version to each subscriber. Thread-safe.

    Args:
        ring: the ring of the versions.

    Attributes:
        lock: guards everything here.
        followers: the subscribers.
        version: the newest version; None before the first.
    """

    def __init__(self, ring: RingView) -> None:
        self.lock = threading.Lock()
        self.followers: list[Follower] = []
        self.version: Version | None = None
        self._ring = ring
        self._numbers = itertools.count(1)
        self._closed = False

    def publish(self, version: Version) -> None:
        """Announce a version that was committed."""
        with self.lock:
            self.version = version
            self._announce_to_all()

    def serve(self) -> None:
        """Announce the newest version to those that have credit again."""
        with self.lock:
            self._announce_to_all()

    def subscribe(
        self, connection: Connection, *, pid: int | None, words: StreamWords | None, deltas: bool = False
    ) -> Follower:
        """A new subscriber, to which versions are announced from its `start` on; see `Follower`."""
        follower = Follower(self, connection, pid=pid, words=words, deltas=deltas)
        with self.lock:
            if words is not None:
                words.pending = True
            self.followers.append(follower)
        return follower

    @property
    def wants_deltas(self) -> bool:
        """A subscriber gets the next version over a network."""
        with self.lock:
            return any(follower.deltas for follower in self.followers)

    def close(self) -> None:
        """Announce nothing any more, and notify the subscribers of the end."""
        with self.lock:
            self._closed = True
            for follower in self.followers:
                follower.connection.end(0)

    # --- inside, with the lock --------------------------------------------------------------------------------

    def _announce_to_all(self) -> None:
        version = self.version
        if version is None or self._closed:
            return
        marked = False
        for follower in self.followers:
            self._announce(follower, version)
            words = follower.stream_words
            if words is not None and words.pending is not follower.waits:
                words.pending = follower.waits
                marked = marked or follower.waits
        if marked:
            self._ring.barrier()  # then read the credit once more
            for follower in self.followers:
                if follower.waits:
                    self._announce(follower, version)

    def _announce(self, follower: Follower, version: Version) -> None:
        if not follower.has_credit or (follower.announced is version and not follower.waits):
            return
        try:
            part = version.part_for(follower.announced) if follower.deltas else version.full
            follower.announced = version
            follower.given += 1
            follower.waits = not follower.has_credit
            follower.connection.announce(Given(*part, next(self._numbers), version.number))
        except BaseException:
            follower.connection.abort()
            raise
