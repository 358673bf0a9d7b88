"""`Places`: the producers that a consumer knows, and when it connects to them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dray.clock import Clock, Deadline
from dray.errors import (
    DrayError,
    ProtocolError,
    SchemaError,
    SlotError,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.protocol.handshake import ANY_PRODUCER
from dray.resources import Closing
from dray.streams.registry import Peer, ProducerEntry, Registry
from dray.streams.source import Source
from dray.streams.tasks import Tasks
from dray.streams.wanted import Wanted
from dray.transport.lanes.base import Network
from dray.transport.subscription import Subscription

logger = logging.getLogger("dray.streams")

CONNECT_SECONDS: Final = 2.0
REMOTE_SECONDS: Final = 10.0
"""Time limit for connecting to one producer, on this host and on another one; another attempt follows."""

MAX_ATTEMPTS: Final = 16
"""Addresses that a consumer connects to at a time."""

RETRY_SECONDS: Final = 0.1
"""Time before the second attempt to connect."""

MAX_RETRY_SECONDS: Final = 2.0
"""The time before the next attempt doubles after each, up to this."""

SILENT_SECONDS: Final = 20.0
"""The same after an attempt that has met silence. On this host it delays other payloads."""


@dataclass(slots=True, eq=False)
class Place:
    """A producer that is to be connected to.

    Attributes:
        endpoints: its addresses.
        producer: its id, if it is known.
        reader: the reader id of the group, if it is known.
        peer: its entry, where it was found by name.
        retry: seconds before the next attempt.
        due: when that is.
        failure: why the last one failed.
        ended: the producer there has closed its stream.
        refused: no process listens there.
        failed: the connection to it has failed, and there was no other one since.
        deltas: it is a publisher whose announcements may be of deltas.
        source: the producer, while it is attached.
    """

    endpoints: tuple[str, ...]
    producer: bytes = ANY_PRODUCER
    reader: int | None = None
    peer: Peer | None = None
    retry: float = RETRY_SECONDS
    due: float = -math.inf
    failure: str | None = None
    ended: bool = False
    refused: bool = False
    failed: bool = False
    deltas: bool = False
    source: Source | None = field(default=None, repr=False)

    @property
    def is_wanted(self) -> bool:
        """It is to be connected to. At an address there may be another producer after one that has ended."""
        return self.source is None and (not self.ended or self.peer is None)

    def postpone(self, error: DrayError, now: float) -> None:
        """Make the next attempt later: this one has failed."""
        self.failure = str(error)
        self.refused = isinstance(error, Unreachable) and error.refused
        if isinstance(error, TransportTimeout):
            self.retry = min(4 * self.retry, SILENT_SECONDS)
        self.due = now + self.retry
        self.retry = min(2 * self.retry, max(self.retry, MAX_RETRY_SECONDS))

    def __str__(self) -> str:
        return str(self.peer) if self.peer is not None else self.endpoints[0]


class Places(Closing):
    """The producers of one consumer.

    Args:
        wanted: what the consumer wants.
        clock: where time comes from.
        network: where connections come from.
        registry: where producers are found by name; None if they are found by address.
        attach: called with each new connection; it sets `Place.source`.
        died: called for a producer that has died while it was not attached.
        start, notify: see `Tasks`.

    Attributes:
        due: when the next attempt to connect is made; ``inf`` if there is none.
        attempts: the attempts to connect to addresses, in threads.
    """

    def __init__(
        self,
        wanted: Wanted,
        clock: Clock,
        network: Network,
        registry: Registry | None,
        *,
        attach: Callable[[Place, Subscription], None],
        died: Callable[[Place], None],
        start: Callable[[Callable[[], None]], Callable[[], None]],
        notify: Callable[[], None],
    ) -> None:
        self.due = math.inf
        self._attempts: Tasks[Place, Subscription] = Tasks(start, notify, MAX_ATTEMPTS)
        self.attempts = self._attempts.by_key
        self._wanted = wanted
        self._clock = clock
        self._network = network
        self._registry = registry
        self._attach = attach
        self._died = died
        self._places = [Place((endpoint,)) for endpoint in wanted.endpoints]
        self._unseen = True  # the registry is to be read
        self._ignored: set[str] = set()  # entries that are none of a producer
        self._gone: set[bytes] = set()  # those at whose address there is another one now

    # --- attaching --------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Connect to the producers that are not attached yet, those that have come meanwhile included.

        Raises:
            ProtocolError, SchemaError: a producer is none for this consumer.
        """
        self.expect()
        self.connect_due()

    def expect(self) -> None:
        """There may be producers that are not known: `connect_due` looks."""
        self._unseen = True
        self.due = -math.inf

    def connect_due(self) -> None:
        """Make the attempts that are due, and take in those that have ended.

        After an exception of a signal handler, it is due again.

        Raises:
            ProtocolError, SchemaError: a producer is none for this consumer.
        """
        self.due = -math.inf
        if self._unseen:
            self._list()
            self._unseen = False
        while (attempt := self._attempts.pop_done()) is not None:
            self._connect(attempt[0], attempt[1].result)
        now, due = self._clock.now(), math.inf
        for place in self._places:
            if place.is_wanted and place not in self.attempts:
                if place.due <= now:
                    self._try(place)
                if place.is_wanted and place.due > now:  # others follow when an attempt has ended
                    due = min(due, place.due)
        self.due = due

    def _try(self, place: Place) -> None:
        """Connect to a producer of this host, or begin to connect to an address."""
        if place.peer is not None:
            self._connect(place, lambda: self._open(place, CONNECT_SECONDS))
        elif not self._attempts.full:
            self._attempts.begin(place, lambda: self._open(place, REMOTE_SECONDS))

    def _list(self) -> None:
        """Bring the places up to date with the registry."""
        if self._registry is None:
            return
        known = {place.peer.entry for place in self._places if place.peer is not None}
        peers = self._registry.peers("p")
        for peer in peers:
            if peer.entry not in known and peer.entry not in self._ignored:
                self._add(peer)
        alive = {peer.entry for peer in peers}
        for place in list(self._places):
            if place.source is None and place.peer is not None and place.peer.entry not in alive:
                self._places.remove(place)
                if place.failed and not place.ended:
                    self._died(place)

    def _add(self, peer: Peer) -> None:
        try:
            entry = ProducerEntry.of(peer)
        except ProtocolError as error:
            # Another process of the user has written it: that must not end this one.
            self._ignored.add(peer.entry)
            logger.warning("%s: %s; it is ignored", str(self._wanted), str(error))
            return
        try:
            reader = self._wanted.reader_of(entry.groups, peer, entry.schema)
        except (ProtocolError, SchemaError):
            self._ignored.add(peer.entry)  # reported once; others continue
            raise
        self._places.append(Place(entry.endpoints, entry.producer, reader, peer))

    def _open(self, place: Place, seconds: float) -> Subscription:
        return Subscription.open(
            place.endpoints[0],
            Deadline.after(seconds, self._clock),
            network=self._network,
            producer=ANY_PRODUCER if place.peer is None else place.producer,
            reader=place.reader,
            choose=lambda about: self._choose(place, about),
            secret=self._wanted.secret,
            direct=self._wanted.direct,
        )

    def _choose(self, place: Place, about: Mapping[str, Any]) -> int:
        place.deltas = about.get("delta") == "sparse"
        return self._wanted.reader_of(about["groups"], place, about.get("schema"))

    def _connect(self, place: Place, opened: Callable[[], Subscription]) -> None:
        try:
            subscription = opened()
        except TransportError as error:
            self._retry(place, error)
            return
        except (ProtocolError, SlotError) as error:
            if place.peer is None:
                raise
            # What an entry names need not be a producer; at an address, the program has named it.
            self._retry(place, error)
            return
        if place.producer not in (ANY_PRODUCER, subscription.producer):
            self._gone.add(place.producer)
        place.producer, place.ended, place.refused, place.failed = subscription.producer, False, False, False
        place.failure, place.retry = None, RETRY_SECONDS
        self._attach(place, subscription)

    def _retry(self, place: Place, error: DrayError) -> None:
        place.postpone(error, self._clock.now())
        self.due = min(self.due, place.due)

    def again(self, place: Place) -> None:
        """The connection of a place is closed: make another one, if it is wanted."""
        place.due = self.due = -math.inf

    def lose(self, place: Place, error: DrayError) -> bool:
        """A connection has failed; true if its producer has died, false if it may be alive."""
        if self._registry is None or place.peer is None:
            self._retry(place, error)
            return True
        if any(peer.entry == place.peer.entry for peer in self._registry.peers("p")):
            self._retry(place, error)
            place.failed = True  # a process that dies may still have its lock
            return False
        self._places.remove(place)
        place.failure = str(error)
        return True

    def close(self) -> None:
        """Wait for the attempts under way, which the end of the network has ended. Twice is fine."""
        self._attempts.close()
        while (attempt := self._attempts.pop_done()) is not None:
            with contextlib.suppress(DrayError):
                attempt[1].result().close()

    # --- state ------------------------------------------------------------------------------------------------

    def all_ended(self) -> bool:
        """All producers that are known have closed their streams."""
        if self._registry is not None:
            self.find()
        return all(place.ended for place in self._places)

    @property
    def complete(self) -> bool:
        """All producers that are known, and have not closed their streams, are attached."""
        return all(place.source is not None or place.ended for place in self._places)

    def is_gone(self, producer: bytes) -> bool:
        """A producer has ended or died: its payloads are gone."""
        if self._registry is not None:  # a producer is registered before it hands out anything
            self.find()
            return all(place.producer != producer or place.ended for place in self._places)
        self.connect_due()
        return producer in self._gone or any(
            place.producer == producer and (place.ended or place.refused) for place in self._places
        )

    def explain(self) -> str:
        """Why no producer is attached, in words."""
        failures = [f"{place}: {place.failure}" for place in self._places if place.failure is not None]
        text = f"; {'; '.join(failures[:3])}" if failures else ""
        if self._registry is not None:
            text += f"; the folder is {self._registry.folder}"
            elsewhere = self._registry.elsewhere()
            if elsewhere:
                text += f"; producers exist of {', '.join(elsewhere[:5])} (DRAY_SCOPE sets the scope)"
        return text
