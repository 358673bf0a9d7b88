"""`Inbox`: what a consumer does in one process. It finds producers, asks for payloads, and waits for them.

Every method needs the consumer's lock, except `interrupt`. No thread is started: the sockets are looked at when
the program asks for a payload.

How many payloads a producer may give is its *credit*. While the program works on a payload, the credit of all
producers together is `prefetch` less what was given and not begun. While the consumer waits, each producer has a
credit of one. What comes above `prefetch` goes back at once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import (
    BufferClosedError,
    DrayError,
    ProtocolError,
    SchemaError,
    SlotError,
    StreamTimeout,
    TransportError,
)
from dray.forking import descriptor_not_inherited
from dray.payload import Arrays
from dray.protocol import streams
from dray.protocol.handshake import ANY_PRODUCER
from dray.resources import Closing, needing
from dray.ring.consumer_events import Descriptor
from dray.streams.payload import Payload
from dray.streams.registry import Nudges, Peer, ProducerEntry, Registry
from dray.streams.source import Source
from dray.streams.surroundings import SURROUNDINGS, Surroundings
from dray.transport import PayloadClient
from dray.transport.direct_reads import DirectReads
from dray.transport.subscription import Subscription

logger = logging.getLogger("dray.streams")

CONNECT_SECONDS: Final = 2.0
"""Time limit for connecting to one producer; another attempt follows."""

RETRY_SECONDS: Final = 0.1
MAX_RETRY_SECONDS: Final = 2.0
"""Time before the next attempt to connect, doubled after each."""

FIRST_REPORT_SECONDS: Final = 5.0
REPORT_SECONDS: Final = 30.0
"""A wait without a producer is reported after the first, any other wait after the second, and so on."""

SEND_AGAIN_SECONDS: Final = 0.05
"""Time before another attempt to send what a connection had no room for."""

RING_AGAIN_SECONDS: Final = 0.002
"""The producers whose payloads wait for credit are woken a few at a time, so that not all of them send at once.
The next ones follow if nothing comes from the first within this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a consumer wants.

    Attributes:
        name, scope: the stream; the name is empty where producers are found by address.
        endpoints: the endpoints of producers on other hosts.
        group: the name of its group.
        prefetch: payloads that it may have been given and has not begun.
        schema: the text of the schema that payloads must have; None accepts any.
        secret: the secret of producers on other hosts.
        direct: lease payloads in place where that is possible.
    """

    name: str = ""
    scope: str = ""
    endpoints: tuple[str, ...] = ()
    group: str = "default"
    prefetch: int = 2
    schema: str | None = None
    secret: bytes | None = None
    direct: bool = True

    def __str__(self) -> str:
        return (
            f"stream {self.name!r} in scope {self.scope!r}"
            if self.name
            else f"stream at {', '.join(self.endpoints)}"
        )


@dataclass(slots=True)
class _Place:
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
    """

    endpoints: tuple[str, ...]
    producer: bytes = ANY_PRODUCER
    reader: int | None = None
    peer: Peer | None = None
    retry: float = RETRY_SECONDS
    due: float = -math.inf
    failure: DrayError | None = None
    ended: bool = False
    source: Source | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.peer) if self.peer is not None else self.endpoints[0]


class Inbox(Closing):
    """The consumer's side of a stream, in one process.

    Args:
        wanted: what the consumer wants.
        clock: where time comes from.
        surroundings: the process and the host.

    Attributes:
        queue: hand-outs that are not begun.
        attached: producers that have been attached so far.
        ended: those that have closed their stream.
        lost: those that have died.
        returned: hand-outs that were given back because there were enough.
        closing: `interrupt` was called.
    """

    def __init__(
        self, wanted: Wanted, clock: Clock = MONOTONIC, surroundings: Surroundings = SURROUNDINGS
    ) -> None:
        self.wanted = wanted
        self.queue: deque[tuple[Source, streams.Given]] = deque()
        self.attached = self.ended = self.lost = self.returned = 0
        self.closing = False
        self._clock = clock
        self._missing = 0  # producers that have died, less those that have come since
        self._sources: deque[Source] = deque()
        self._by_descriptor: dict[int, _Place] = {}
        self._places: list[_Place] = [_Place((endpoint,)) for endpoint in wanted.endpoints]
        self._ignored: set[str] = set()  # entries that are none of a producer
        self._favoured: list[Source] = []  # they have credit while the program works
        self._warned = False
        self._past = [0, 0]  # copies and gone payloads of sources that have ended
        self._clients: dict[int, PayloadClient] = {}
        self._surroundings = surroundings
        self._network = network = surroundings.network()
        buffers = network.receive_buffers()
        self._reads = DirectReads(0, wanted.direct, buffers, lock=network.lock(), clock=clock)
        with contextlib.ExitStack() as opened, needing("a consumer"):
            self._epoll = opened.enter_context(contextlib.closing(surroundings.epoll()))
            descriptor_not_inherited(self, Inbox.fileno)
            self._wake = opened.enter_context(Descriptor(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._epoll.register(self._wake.fileno(), select.EPOLLIN)
            self._poll: Callable[[float | None], list[tuple[int, int]]] = surroundings.poller(self._epoll)
            self._registry: Registry | None = None
            self._nudges: Nudges | None = None
            if wanted.name:
                self._registry = opened.enter_context(surroundings.registry(wanted.name, wanted.scope))
                self._nudges = opened.enter_context(surroundings.nudges())
                self._epoll.register(self._nudges.fileno(), select.EPOLLIN)
                about = {"group": wanted.group, "nudges": self._nudges.path}
                self._registry.add("c", about)
            opened.pop_all()
        try:
            self._find_producers()
        except BaseException:
            self.close()
            raise

    # --- payloads ---------------------------------------------------------------------------------------------

    def pop(self) -> Payload | None:
        """The next payload that has been given to this consumer; None if there is none. It does not wait."""
        queue = self.queue
        try:
            while queue or self.receive():
                source, given = queue.popleft()
                self._spread_credit()
                payload = source.take(given, self._warn_of_copies)
                if payload is not None:
                    return payload
        except DrayError:
            raise
        except BaseException:
            self._attach_again()
            raise
        return None

    def receive(self) -> bool:
        """Take in what has come; True if a payload was given."""
        if len(self._by_descriptor) == 1:  # cheaper than to ask which one it is
            (place,) = self._by_descriptor.values()
            self._receive(place)
        for descriptor, _ in self._epoll.poll(0) if not self.queue else ():
            self._handle(descriptor)
        self._connect_due()
        return bool(self.queue)

    def wait(self, deadline: Deadline, report: Report) -> None:
        """Wait until something has happened that concerns this consumer.

        Raises:
            BufferClosedError: the consumer was closed meanwhile.
            StreamTimeout: the deadline came first.
        """
        try:
            self._wait(deadline, report)
        except DrayError:
            raise
        except BaseException:
            self._attach_again()
            raise

    def _wait(self, deadline: Deadline, report: Report) -> None:
        again = self._raise_credit()
        timeout = self.idle()
        if timeout:
            timeout = min(timeout, deadline.remaining, report.remaining(bool(self._sources)))
            events = self._poll(_seconds(min(timeout, RING_AGAIN_SECONDS) if again else timeout))
            if not events and again:
                for source in again:
                    source.subscription.ring()
                events = self._poll(_seconds(timeout))
            for descriptor, _ in events:
                self._handle(descriptor)
        if self.closing:
            raise BufferClosedError("the consumer was closed while it waited")
        if not self.queue:
            if deadline.expired:
                raise StreamTimeout(self.explain(), elapsed=deadline.elapsed)
            report.log(self)

    def _attach_again(self) -> None:
        """After an exception of a signal handler: what has come may be lost here. Producers hand it out again."""
        for place in list(self._by_descriptor.values()):
            place.due = -math.inf
            self._drop(place)

    def idle(self) -> float:
        """Prepare for a wait for `fileno`; the seconds that it may take, 0 if there is something to do already."""
        latest = math.inf
        for place in self._by_descriptor.values():
            if place.source is not None and not place.source.subscription.arm():
                self._receive(place)
                return 0.0
            if place.source is not None and place.source.subscription.unsent:
                latest = SEND_AGAIN_SECONDS
        due = min(
            (place.due for place in self._places if place.source is None and not place.ended), default=math.inf
        )
        return max(0.0, min(latest, due - self._clock.now()))

    def prepare_to_wait(self) -> float:
        """For waits elsewhere, such as in an event loop: let every producer give; returns as `idle`."""
        for source in self._raise_credit():
            source.subscription.ring()
        return self.idle()

    @property
    def finished(self) -> bool:
        """Every producer that was attached has closed its stream, and nothing is left."""
        if self.queue or self._sources or not self.attached or self._missing:
            return False
        if self._registry is not None:
            self._find_producers()
            return not self._sources and all(place.ended for place in self._places)
        return all(place.ended for place in self._places)

    def source_of(self, producer: bytes) -> Source | None:
        """The source of a producer that is attached, also of one that has ended."""
        for place in self._places:
            if place.source is not None and place.source.producer == producer:
                return place.source
        return None

    def find(self, producer: bytes, deadline: Deadline) -> Source:
        """The source of a producer; waits until it is attached.

        Raises:
            StreamTimeout: the deadline came first.
        """
        report = Report(self._clock)
        while (source := self.source_of(producer)) is None:
            self.wait(deadline, report)
        return source

    # --- state ------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor that is readable when `receive` may have something to do."""
        return self._epoll.fileno()

    @property
    def producers(self) -> list[str]:
        """The producers that are attached."""
        return [source.name for source in self._sources]

    def counts(self) -> dict[str, int]:
        """Counters, over all producers so far."""
        sources = self._sources
        return {
            "copies": self._past[0] + sum(source.copies for source in sources),
            "gone": self._past[1] + sum(source.gone for source in sources),
        }

    def explain(self) -> str:
        """What this consumer waits for, in words."""
        wanted = self.wanted
        if self._sources:
            names = ", ".join(self.producers[:3])
            more = f" and {len(self._sources) - 3} more" if len(self._sources) > 3 else ""
            return f"{wanted}: no payload has come from {names}{more}"
        text = f"{wanted}: no producer is attached"
        if self.ended or self.lost:
            text += f"; {self.ended} have ended, {self.lost} have died"
        failures = [f"{place}: {place.failure}" for place in self._places if place.failure is not None]
        if failures:
            text += f"; {'; '.join(failures[:3])}"
        if self._registry is not None:
            text += f"; the folder is {self._registry.folder}"
            elsewhere = self._registry.elsewhere()
            if elsewhere:
                text += f"; producers exist of {', '.join(elsewhere[:5])} (DRAY_SCOPE sets the scope)"
        return text

    def interrupt(self) -> None:
        """End a wait in another thread; no lock is needed."""
        self.closing = True
        number = self._wake.fileno()
        if number >= 0:
            os.eventfd_write(number, 1)

    def close(self) -> None:
        """End all subscriptions. Twice is fine."""
        self.closing = True
        for source, given in self.queue:
            with contextlib.suppress(DrayError):
                source.give_back(given, begun=False)
        self.queue.clear()
        for place in list(self._by_descriptor.values()):
            self._drop(place)
        self._reads.close()
        for client in self._clients.values():
            client.close()
        if self._registry is not None:
            self._registry.close()
        if self._nudges is not None:
            self._nudges.close()
        self._epoll.close()
        self._wake.close()

    def __repr__(self) -> str:
        return f"<Inbox of {self.wanted}, {len(self._sources)} producers>"

    # --- credit -----------------------------------------------------------------------------------------------

    def _spread_credit(self) -> None:
        """Let producers give as many payloads as there is room for, while the program works."""
        room = self.wanted.prefetch - len(self.queue)
        sources = self._sources
        if len(sources) == 1:
            source = sources[0]
            source.subscription.set_credit(source.received + room)
            return
        for source in self._favoured:
            source.subscription.set_credit(source.received)
        self._favoured = []
        for _ in range(min(room, len(sources))):
            sources.rotate(-1)
            source = sources[-1]
            source.subscription.set_credit(source.received + 1)
            self._favoured.append(source)

    def _raise_credit(self) -> list[Source]:
        """Let every producer give a payload, and wake some of those that have one; returns the others of these."""
        favoured = self._favoured
        pending = []
        several = len(self._sources) > 1
        for source in self._sources:
            subscription = source.subscription
            if several:
                subscription.set_credit(source.received + 1)
                favoured.append(source)
            else:
                subscription.set_credit(source.received + self.wanted.prefetch)
            if subscription.pending:
                pending.append(source)
            if subscription.attachment is not None:
                subscription.attachment.ring_if_awaited()
        if not pending:
            return pending
        self._sources.rotate(-1)
        first = self.wanted.prefetch
        for source in pending[:first]:
            source.subscription.ring()
        return pending[first:]

    # --- events -----------------------------------------------------------------------------------------------

    def _handle(self, descriptor: int) -> None:
        place = self._by_descriptor.get(descriptor)
        if place is not None:
            self._receive(place)
        elif self._nudges is not None and descriptor == self._nudges.fileno():
            self._nudges.clear()
            self._find_producers()

    def _receive(self, place: _Place) -> None:
        source = place.source
        assert source is not None
        try:
            for event in source.subscription.receive():
                if isinstance(event, streams.Ended):
                    self._end(place, event)
                    return
                source.received += 1
                if len(self.queue) < self.wanted.prefetch:
                    self.queue.append((source, event))
                else:
                    self.returned += 1
                    source.give_back(event, begun=False)
        except (TransportError, ProtocolError) as error:
            self._lose(place, error)

    def _end(self, place: _Place, event: streams.Ended) -> None:
        self.ended += 1
        place.ended = True
        logger.info("%s: %s has ended", self.wanted, place)
        if event.lost:
            logger.warning("%s: %s has ended, and %d payloads are lost", self.wanted, place, event.lost)
        self._drop(place)

    def _lose(self, place: _Place, error: DrayError) -> None:
        """A connection has failed: its producer may have died."""
        self._drop(place)
        if self._registry is not None and place.peer is not None:
            if any(peer.entry == place.peer.entry for peer in self._registry.peers("p")):
                self._retry(place, error)
                return
            self._places.remove(place)
        else:
            self._retry(place, error)
        self.lost += 1
        self._missing += 1
        logger.warning("%s: %s has died: %s", self.wanted, place, error)

    def _drop(self, place: _Place) -> None:
        """End a subscription; its producer has ended, or gives what was not begun to others."""
        source = place.source
        assert source is not None
        self._epoll.unregister(source.subscription.fileno())
        del self._by_descriptor[source.subscription.fileno()]
        self._sources.remove(source)
        self._past[0] += source.copies
        self._past[1] += source.gone
        kept = [each for each in self.queue if each[0] is not source]
        self.queue.clear()
        self.queue.extend(kept)
        self._favoured = [each for each in self._favoured if each is not source]
        if not place.ended:
            place.source = None  # before what follows, in which an exception of a signal handler may come
        source.close()
        self._reads.drop(source.producer)  # else a later connection to it would not be used for leases

    # --- producers --------------------------------------------------------------------------------------------

    def _find_producers(self) -> None:
        """Connect to the producers of the name that are not known yet."""
        if self._registry is not None:
            known = {place.peer.entry for place in self._places if place.peer is not None}
            peers = self._registry.peers("p")
            for peer in peers:
                if peer.entry not in known and peer.entry not in self._ignored:
                    self._add_place(peer)
            alive = {peer.entry for peer in peers}
            self._places = [
                place
                for place in self._places
                if place.source is not None or place.peer is None or place.peer.entry in alive
            ]
        self._connect_due()

    def _add_place(self, peer: Peer) -> None:
        try:
            entry = ProducerEntry.of(peer)
        except ProtocolError as error:
            # Another process of the user has written it: that must not end this one.
            self._ignored.add(peer.entry)
            logger.warning("%s: %s; it is ignored", str(self.wanted), str(error))
            return
        reader = self._reader_of(entry.groups, peer, entry.schema)
        self._places.append(_Place(entry.endpoints, entry.producer, reader, peer))

    def _reader_of(self, groups: Sequence[str], who: object, schema: object) -> int:
        if self.wanted.group not in groups:
            names = ", ".join(map(repr, groups))
            raise ProtocolError(f"{self.wanted}: {who} has no group {self.wanted.group!r}, only {names}")
        if schema is not None and self.wanted.schema is not None and schema != self.wanted.schema:
            raise SchemaError(f"{self.wanted}: {who} has another schema: {schema}, not {self.wanted.schema}")
        return groups.index(self.wanted.group)

    def _connect_due(self) -> None:
        if not self._places:
            return
        now = self._clock.now()
        for place in self._places:
            if place.source is None and not place.ended and place.due <= now:
                self._connect(place)

    def _connect(self, place: _Place) -> None:
        wanted = self.wanted
        try:
            subscription = Subscription.open(
                place.endpoints[0],
                Deadline.after(CONNECT_SECONDS, self._clock),
                network=self._network,
                producer=ANY_PRODUCER if place.peer is None else place.producer,
                reader=place.reader,
                choose=lambda about: self._reader_of(about["groups"], place, about.get("schema")),
                secret=wanted.secret,
                direct=wanted.direct,
            )
        except TransportError as error:
            self._retry(place, error)
            return
        except (ProtocolError, SlotError) as error:
            if place.peer is None:
                raise
            # What an entry names need not be a producer; at an address, the program has named it.
            self._retry(place, error)
            return
        try:
            if subscription.attachment is not None:
                self._reads.add(subscription.attachment)
        except BaseException:  # of a signal handler
            subscription.close()
            raise
        place.producer = subscription.producer
        place.source = source = Source(subscription, str(place), self._reads, self._client)
        place.failure, place.retry = None, RETRY_SECONDS
        self._by_descriptor[subscription.fileno()] = place
        self._epoll.register(subscription.fileno(), select.EPOLLIN)
        self._sources.append(source)
        self.attached += 1
        self._missing = max(0, self._missing - 1)
        logger.info("%s: attached to %s", wanted, place)

    def _retry(self, place: _Place, error: DrayError) -> None:
        place.failure = error
        place.due = self._clock.now() + place.retry
        place.retry = min(2 * place.retry, MAX_RETRY_SECONDS)

    def _client(self, reader: int) -> PayloadClient:
        """For payloads that are not leased in place."""
        client = self._clients.get(reader)
        if client is None:
            client = self._clients[reader] = self._surroundings.client(self.wanted.secret, reader)
        return client

    def _warn_of_copies(self, arrays: Arrays) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: payloads are copied from now on while the program keeps arrays of earlier ones (fields %s); "
                "payload.copy() makes arrays that can be kept",
                self.wanted, ", ".join(arrays),
            )  # fmt: skip


class Report:
    """Logs every 30 s what a consumer waits for.

    Args:
        clock: where time comes from.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.now()
        self._said = 0

    def remaining(self, attached: bool) -> float:
        """Seconds until the next line."""
        return max(0.0, self._due(attached) - self._clock.now())

    def log(self, inbox: Inbox) -> None:
        """Log the line if it is due."""
        attached = bool(inbox.producers)
        now = self._clock.now()
        if now >= self._due(attached):
            self._said = int((now - self._began) // REPORT_SECONDS) + 1
            logger.warning("waiting for %.0f s: %s", now - self._began, inbox.explain())

    def _due(self, attached: bool) -> float:
        if not self._said and not attached:
            return self._began + FIRST_REPORT_SECONDS
        return self._began + REPORT_SECONDS * max(1, self._said)


def _seconds(timeout: float) -> float | None:
    return None if timeout == math.inf else timeout
