"""`Inbox`: what a consumer does in one process. It asks producers for payloads, and waits for them.

Every method needs the consumer's lock, except `interrupt` and `release`. The sockets are read when the
program asks for a payload; only `dray.streams.tasks` starts threads.

How many payloads a producer may give is its credit, see `dray.streams.credit`. What comes above `prefetch` goes
back at once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import (
    BufferClosedError,
    DrayError,
    ProtocolError,
    StreamTimeout,
    TransportError,
)
from dray.exclusive import Exclusive
from dray.forking import descriptor_not_inherited
from dray.payload import Values
from dray.protocol import streams
from dray.resources import Closing, needing
from dray.ring.consumer_events import Descriptor
from dray.streams.credit import Credit
from dray.streams.payload import Payload
from dray.streams.places import Place, Places
from dray.streams.registry import Nudges, Registry
from dray.streams.source import Source
from dray.streams.surroundings import SURROUNDINGS, Surroundings
from dray.streams.tasks import Tasks
from dray.streams.wanted import Report, Wanted
from dray.transport import PayloadClient
from dray.transport.direct_reads import DirectReads
from dray.transport.subscription import Subscription

logger = logging.getLogger("dray.streams")

FIRST_SECONDS: Final = 2.0
"""How long a new consumer waits for the first connections to addresses, before the program continues."""

RECEIVE_SECONDS: Final = 0.01
"""A consumer that is never without payloads checks all producers this often, and searches for new ones."""

SEND_AGAIN_SECONDS: Final = 0.05
"""Time before another attempt to send what a connection had no room for."""

RING_AGAIN_SECONDS: Final = 0.002
"""The producers whose payloads wait for credit are woken a few at a time, so that not all of them send at once.
The next ones follow if nothing comes from the first within this time."""


class Inbox(Closing):
    """The consumer's side of a stream, in one process.

    Args:
        wanted: what the consumer wants.
        clock: where time comes from.
        surroundings: the process and the host.
        exclusive: the lock that every method but `interrupt` and `release` needs.

    Attributes:
        queue: hand-outs that are not begun.
        sources: the producers that are attached.
        attached: producers that have been attached so far.
        ended: those that have closed their stream.
        lost: those that have died.
        returned: hand-outs that were given back because there were enough.
        closing: `interrupt` was called.
        late: payloads that are begun and are being read in threads, by producer.
        in_hand: a hand-out on its way to the program: after an exception of a signal handler it goes back.
    """

    def __init__(
        self,
        wanted: Wanted,
        clock: Clock = MONOTONIC,
        surroundings: Surroundings = SURROUNDINGS,
        exclusive: Exclusive | None = None,
    ) -> None:
        self.wanted = wanted
        self._exclusive = exclusive or Exclusive()
        self.queue: deque[tuple[Source, streams.Given]] = deque()
        self.attached = self.ended = self.lost = self.returned = 0
        self.closing = False
        self.in_hand: tuple[Source, streams.Given] | None = None
        self._clock = clock
        self._framed: list[Place] = []  # those that share no memory with this process
        self._returns: deque[tuple[Source, streams.Given]] = deque()
        self._missing = 0  # producers that have died, less those that have come since
        self.sources: deque[Source] = deque()
        self._by_descriptor: dict[int, Place] = {}
        self._credit = Credit(self.sources, wanted.prefetch)
        self._warned = False
        self._past = [0, 0]  # copies and gone payloads of sources that have ended
        self._clients: dict[int, PayloadClient] = {}
        self._surroundings = surroundings
        self._receive_at = -math.inf
        self._reading: Tasks[Source, Any] = Tasks(surroundings.start, self._wake_up, max(1, wanted.prefetch))
        self.late = self._reading.by_key
        with contextlib.ExitStack() as opened:
            with needing("a consumer"):
                self._network = network = opened.enter_context(surroundings.network(bool(wanted.endpoints)))
                buffers = network.receive_buffers()
                self._reads = DirectReads(0, wanted.direct, buffers, lock=network.lock(), clock=clock)
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
            self._places = Places(
                wanted, clock, network, self._registry,
                attach=self._attach, died=self._count_lost, start=surroundings.start, notify=self._wake_up,
            )  # fmt: skip
            opened.callback(self.close)
            self._places.find()
            self._wait_for_first(Deadline.after(FIRST_SECONDS, clock))
            opened.pop_all()

    # --- payloads ---------------------------------------------------------------------------------------------

    def _wait_for_first(self, deadline: Deadline) -> None:
        """Let the first attempts to connect to addresses end."""
        while self._places.attempts and not deadline.expired:
            for descriptor, _ in self._poll(deadline.timeout):
                self._handle(descriptor)
            self._places.connect_due()

    def pop(self, deadline: Deadline) -> Payload | None:
        """The next payload that has been given to this consumer; None if there is none.

        Where its bytes come over a connection, it waits for them alone, but no longer than bytes travel: then a
        thread continues, and this call or a later one gets the payload.
        """
        try:
            if self.late and (payload := self._fetched()) is not None:
                return payload
            while (entry := self._next_given()) is not None:
                self.in_hand = source, given = entry
                if self._credit.spread(len(self.queue) + len(self.late)):
                    self.take_in()  # several were asked: what is too much goes back
                try:
                    payload = source.read_given(given, deadline, self._warn_of_copies)
                except TransportError:
                    self._reading.begin(source, source.reader(given), given)
                    continue
                if payload is not None and (payload.in_place or self._is_ours(source)):
                    return payload
            self.in_hand = None
        except DrayError:
            raise
        except BaseException:
            self._attach_again()
            raise
        return None

    def _next_given(self) -> tuple[Source, streams.Given] | None:
        """The hand-out to begin next. Those of a producer whose payload is being read have to wait for that."""
        queue = self.queue
        if not self.late:
            here = queue and self._clock.now() < self._receive_at
            return queue.popleft() if here or self.receive() else None
        entry = self._free_entry()
        if entry is None:
            self.receive()
            entry = self._free_entry()
        if entry is not None:
            queue.remove(entry)
        return entry

    def _free_entry(self) -> tuple[Source, streams.Given] | None:
        if self._reading.full:
            return None
        return next((entry for entry in self.queue if entry[0] not in self.late), None)

    def _fetched(self) -> Payload | None:
        """A payload that a thread has read."""
        while (found := self._reading.pop_done()) is not None:
            source, read = found
            given = read.about
            self.in_hand = source, given
            try:
                payload = source.payload(given, read.result())
            except TransportError as error:
                self._lose_source(source, error)
                continue
            except DrayError:
                source.give_back(given, begun=True)
                raise
            if payload is not None and self._is_ours(source):
                return payload
        return None

    def release(self, source: Source, given: streams.Given) -> None:
        """Return a payload that the program had, from any thread: a thread that uses this inbox does it."""
        self._returns.append((source, given))
        if not self._exclusive.try_call(self._send_returns, False):
            self._wake_up()

    def give_back_lost(self) -> None:
        """Return the payload that an exception of a signal handler has kept from the program."""
        if self.in_hand is not None:
            (source, given), self.in_hand = self.in_hand, None
            source.give_back(given, begun=True)

    def receive(self) -> bool:
        """Take in what has come; True if a payload was given."""
        now = self._clock.now()
        if len(self._by_descriptor) == 1 and now < self._receive_at:  # cheaper than to ask which one it is
            (place,) = self._by_descriptor.values()
            self._receive(place)
        else:
            self._receive_at = now + RECEIVE_SECONDS
            self.take_in()
        if self._places.due != math.inf:
            self._places.connect_due()
        return bool(self.queue)

    def count_ready(self) -> int:
        """Take in what has come, and ask for as much as may lie here; how many payloads are there."""
        self.receive()
        self.take_in()
        self._credit.spread_and_wake(len(self.queue) + len(self.late))
        return len(self.queue) + self._reading.ready

    def wait(self, deadline: Deadline, report: Report, *, ask: bool = True) -> None:
        """Wait until something has happened that concerns this consumer.

        Args:
            deadline: when the wait ends at the latest.
            report: logs what is waited for.
            ask: producers may give payloads meanwhile.

        Raises:
            BufferClosedError: the consumer was closed meanwhile.
            StreamTimeout: the deadline came first.
        """
        try:
            self._wait(deadline, report, ask)
        except DrayError:
            raise
        except BaseException:
            self._attach_again()
            raise

    def _wait(self, deadline: Deadline, report: Report, ask: bool) -> None:
        again = self._raise_credit() if ask else []
        timeout = self.idle()
        if timeout:
            timeout = min(timeout, deadline.remaining, report.remaining(bool(self.sources)))
            events = self._poll(_seconds(min(timeout, RING_AGAIN_SECONDS) if again else timeout))
            if not events and again:
                self._credit.ask(again, 1)
                events = self._poll(_seconds(timeout))
            for descriptor, _ in events:
                self._handle(descriptor)
        if self.closing:
            raise BufferClosedError("the consumer was closed while it waited")
        if not self.has_news():
            if deadline.expired:
                raise StreamTimeout(self.explain(), elapsed=deadline.elapsed)
            report.log(self)

    def has_news(self) -> bool:
        """There is something to do after a wait."""
        return self._reading.ready > 0 or self._free_entry() is not None

    def _attach_again(self) -> None:
        """After an exception of a signal handler: what has come may be lost here. Producers hand it out again."""
        self.in_hand = None
        for place in list(self._by_descriptor.values()):
            self._places.again(place)
            self._drop(place)

    def idle(self) -> float:
        """Prepare for a wait for `fileno`; the seconds that it may take, 0 if there is something to do already."""
        latest = math.inf
        for place in self._framed:
            if place.source is not None and not place.source.subscription.arm():
                self._receive(place)
                return 0.0
            if place.source is not None and place.source.subscription.unsent:
                latest = SEND_AGAIN_SECONDS
        if self.late and self._reading.ready:
            return 0.0
        due = self._places.due
        return latest if due == math.inf else max(0.0, min(latest, due - self._clock.now()))

    def prepare_to_wait(self) -> float:
        """For waits elsewhere, such as in an event loop: let every producer give; returns as `idle`."""
        self._credit.ask(self._raise_credit(), 1)
        return self.idle()

    @property
    def finished(self) -> bool:
        """Every producer that was attached has closed its stream, and nothing is left."""
        if self.queue or self.sources or not self.attached or self._missing:
            return False
        return self._places.all_ended() and not self.sources

    @property
    def drained(self) -> bool:
        """Nothing is there, and no producer puts more: only payloads that other consumers return may come."""
        return (
            bool(self.sources)
            and not self.queue
            and not self.late
            and self._places.complete
            and all(source.draining for source in self.sources)
        )

    def source_of(self, producer: bytes) -> Source | None:
        """The source of a producer that is attached. No lock is needed."""
        return next((source for source in tuple(self.sources) if source.producer == producer), None)

    def find(self, producer: bytes, deadline: Deadline) -> Source | None:
        """The source of a producer; None if the producer is gone. It waits while it may still attach.

        Raises:
            StreamTimeout: the deadline came first.
        """
        report = Report(self._clock)
        while True:
            if (source := self.source_of(producer)) is not None:
                return source
            if self._places.is_gone(producer):
                return None
            if deadline.expired:
                raise StreamTimeout(self.explain(), elapsed=deadline.elapsed)
            self.wait(deadline, report, ask=False)

    # --- state ------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor that is readable when `receive` may have something to do."""
        return self._epoll.fileno()

    @property
    def producers(self) -> list[str]:
        """The producers that are attached."""
        return [source.name for source in self.sources]

    def counts(self) -> dict[str, int]:
        """Counters, over all producers so far."""
        sources = self.sources
        return {
            "copies": self._past[0] + sum(source.copies for source in sources),
            "gone": self._past[1] + sum(source.gone for source in sources),
        }

    def explain(self) -> str:
        """What this consumer waits for, in words."""
        if self.sources:
            late = [f"{read.about.sequence} of {source.name}" for source, read in self.late.items()]
            return self.wanted.explain(self.producers, late)
        text = f"{self.wanted}: no producer is attached"
        if self.ended or self.lost:
            text += f"; {self.ended} have ended, {self.lost} have died"
        return text + self._places.explain()

    def interrupt(self) -> None:
        """End a wait in another thread; no lock is needed."""
        self.closing = True
        self._wake_up()

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
        self._network.close()
        self._reading.close()
        self.late.clear()
        self._places.close()
        if self._registry is not None:
            self._registry.close()
        if self._nudges is not None:
            self._nudges.close()
        self._epoll.close()
        self._wake.close()

    def __repr__(self) -> str:
        return f"<Inbox of {self.wanted}, {len(self.sources)} producers>"

    def _raise_credit(self) -> list[Source]:
        """Let every producer give; returns producers that have payloads and were not woken."""
        return self._credit.raise_all(len(self.queue) + len(self.late))

    # --- events -----------------------------------------------------------------------------------------------

    def take_in(self) -> None:
        """Handle what has happened."""
        for descriptor, _ in self._epoll.poll(0):
            self._handle(descriptor)

    def _wake_up(self) -> None:
        number = self._wake.fileno()
        if number >= 0:
            os.eventfd_write(number, 1)

    def _send_returns(self) -> bool:
        while self._returns:
            source, given = self._returns.popleft()
            source.give_back(given, begun=True)
        return True

    def _handle(self, descriptor: int) -> None:
        place = self._by_descriptor.get(descriptor)
        if place is not None:
            self._receive(place)
        elif descriptor == self._wake.fileno():
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(descriptor)
            self._send_returns()
            if self._places.attempts:
                self._places.connect_due()
        elif self._nudges is not None and descriptor == self._nudges.fileno():
            self._places.expect()
            self._nudges.clear()
            self._places.connect_due()

    def _receive(self, place: Place) -> None:
        source = place.source
        assert source is not None
        try:
            for event in source.subscription.receive():
                if isinstance(event, streams.Ended):
                    self._end(place, event)
                    return
                if isinstance(event, streams.Draining):
                    source.draining = True
                elif isinstance(event, streams.TakenBack):
                    self._forget(source, event.number)
                else:
                    self._take_in(source, event)
        except (TransportError, ProtocolError) as error:
            self._lose(place, error)

    def _take_in(self, source: Source, given: streams.Given) -> None:
        """Keep a hand-out, or give it back because there are enough."""
        overtakes = source.subscription.overtakes(given)
        if not overtakes and len(self.queue) + len(self.late) < self._credit.room_for(source):
            source.received += 1
            self.queue.append((source, given))
            return
        self.returned += 1
        if not overtakes:
            source.subscription.set_credit(source.received)  # first: else it would come again
        source.give_back(given, begun=False)

    def _forget(self, source: Source, number: int) -> None:
        """A producer has taken back the payload of a hand-out, which was not begun in time."""
        for entry in [each for each in self.queue if each[0] is source and each[1].number == number]:
            self.queue.remove(entry)
            source.gone += 1
        read = self.late.get(source)
        if read is not None and read.about.number == number:
            self._reading.drop(source)
            source.gone += 1
        if self.in_hand is not None and self.in_hand[0] is source and self.in_hand[1].number == number:
            self.in_hand = None
            source.gone += 1

    def _is_ours(self, source: Source) -> bool:
        """The producer of what is in hand has not taken it back while it was read over a connection."""
        if self._framed:
            self.take_in()  # from all producers: this one may never pause
        for place in [each for each in self._framed if each.source is source]:
            self._receive(place)
        return self.in_hand is not None

    def _attached_to(self, source: Source) -> None:
        """A producer has come."""

    def _dropped(self, source: Source) -> None:
        """A producer is gone."""
        self._credit.forget(source)

    def _end(self, place: Place, event: streams.Ended) -> None:
        self.ended += 1
        place.ended = True
        logger.info("%s: %s has ended", str(self.wanted), str(place))
        if event.lost:
            logger.warning("%s: %s has ended, and %d payloads are lost", str(self.wanted), str(place), event.lost)
        self._drop(place)
        self._places.again(place)

    def _lose(self, place: Place, error: DrayError) -> None:
        """A connection has failed: its producer may have died."""
        self._drop(place)
        if self._places.lose(place, error):
            self._count_lost(place)

    def _lose_source(self, source: Source, error: DrayError) -> None:
        for place in [each for each in self._by_descriptor.values() if each.source is source]:
            self._lose(place, error)

    def _count_lost(self, place: Place) -> None:
        self.lost += 1
        self._missing += 1
        logger.warning("%s: %s has died: %s", str(self.wanted), str(place), place.failure)

    def _drop(self, place: Place) -> None:
        """End a subscription; its producer has ended, or gives what was not begun to others."""
        source = place.source
        assert source is not None
        if place in self._framed:
            self._framed.remove(place)
        self._epoll.unregister(source.subscription.fileno())
        del self._by_descriptor[source.subscription.fileno()]
        self.sources.remove(source)
        self._reading.drop(source)
        if self.in_hand is not None and self.in_hand[0] is source:
            self.in_hand = None
        self._past[0] += source.copies
        self._past[1] += source.gone
        kept = [each for each in self.queue if each[0] is not source]
        self.queue.clear()
        self.queue.extend(kept)
        self._dropped(source)
        place.source = None  # before what follows, in which an exception of a signal handler may come
        source.close()
        self._reads.forget(source.producer)
        for client in self._clients.values():
            client.forget(source.subscription.endpoint)

    def _attach(self, place: Place, subscription: Subscription) -> None:
        """A producer is attached."""
        try:
            if subscription.attachment is not None:
                self._reads.add(subscription.attachment)
        except BaseException:  # of a signal handler
            subscription.close()
            raise
        place.source = source = Source(
            subscription, str(place), self._reads, client=self._client, release=self.release,
            clock=self._clock, pause=self._surroundings.pause, selection=self.wanted.selection,
            deltas=place.deltas,
        )  # fmt: skip
        self._by_descriptor[subscription.fileno()] = place
        self._epoll.register(subscription.fileno(), select.EPOLLIN)
        if not subscription.direct:
            self._framed.append(place)
        self.sources.append(source)
        self.attached += 1
        self._missing = max(0, self._missing - 1)
        self._attached_to(source)
        logger.info("%s: attached to %s", str(self.wanted), str(place))

    def _client(self, reader: int) -> PayloadClient:
        """For payloads that are not leased in place."""
        client = self._clients.get(reader)
        if client is None:
            client = self._clients[reader] = self._surroundings.client(self.wanted.secret, reader)
        return client

    def _warn_of_copies(self, arrays: Values) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: payloads are copied from now on while the program keeps arrays of earlier ones (fields %s); "
                "payload.copy() makes arrays that can be kept",
                str(self.wanted), ", ".join(arrays),
            )  # fmt: skip


def _seconds(timeout: float) -> float | None:
    return None if timeout == math.inf else timeout
