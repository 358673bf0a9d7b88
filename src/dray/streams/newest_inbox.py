"""`NewestInbox`: what a `Subscriber` does in one process. It reads versions and applies deltas."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from dray.clock import Deadline
from dray.errors import PayloadFormatError, ProducerLostError, StaleSlotError, TransportError, TransportTimeout
from dray.payload import Values, unpack, unpack_metadata
from dray.payload.ragged import arrays_in
from dray.protocol.streams import Given
from dray.streams import sparse
from dray.streams.inbox import Inbox
from dray.streams.payload import Weights
from dray.streams.source import Source
from dray.streams.wanted import Report, Wanted
from dray.transport.receive_buffers import Bytes, ReceiveBuffers

logger = logging.getLogger("dray.streams")

MAX_BYTES_AT_ONCE: Final = 1 << 20
"""What is larger is read in a thread from the start, so that a call that is out of time wastes nothing."""

_CREDIT: Final = 16
"""Announcements that may lie at a subscriber that does not receive."""


class Base(NamedTuple):
    """The image of a version that a delta can change. It is read-only: arrays of the program are views of it."""

    producer: bytes
    number: int
    image: Bytes


class FetchedPart(NamedTuple):
    """The part of a version that is wanted, which came over a connection."""

    values: Values

    @property
    def nbytes(self) -> int:
        """How many bytes of arrays have travelled."""
        return sum(array.nbytes for _, array in arrays_in(self.values))


class Fetched(NamedTuple):
    """A whole version that came over a connection.

    Attributes:
        image: its bytes.
        delta: only what has changed has travelled.
        nbytes: how many bytes have travelled.
    """

    image: Bytes
    delta: bool
    nbytes: int


def fetch(
    read: Callable[[Given], Bytes], given: Given, base: Base | None, allocate: Callable[[int], Bytes]
) -> Fetched:
    """Read the version that was announced: a whole one, or a delta, which is applied to `base`.

    If the delta does not fit the base, the whole version is read: a version is right or is not returned.

    Args:
        read: returns the bytes of a payload.
        given: what was announced.
        base: the version of the same publisher that is here.
        allocate: returns memory.

    Raises:
        StaleSlotError, ProducerLostError: the version is gone.
        TransportError: it could not be read in time.
        PayloadFormatError: what has come is no version.
    """
    payload = read(given)
    delta = sparse.Delta.parse(payload)
    if delta is None:
        return Fetched(payload, False, len(payload))
    if base is not None and (base.number, len(base.image)) == (delta.base, delta.nbytes):
        image = allocate(delta.nbytes)
        try:
            sparse.apply(payload, delta, base.image, image)
            return Fetched(image, True, len(payload))
        except PayloadFormatError as error:
            logger.warning("version %d is read whole: %s", given.deliveries, error)
    image = read(given._replace(slot=delta.slot, sequence=delta.sequence, nbytes=delta.nbytes))
    return Fetched(image, False, len(payload) + len(image))


class NewestInbox(Inbox):
    """Keeps the announcement that came last, of any publisher; see `dray.streams.newest`.

    Args:
        wanted: what the subscriber wants.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._expecting: set[Source] = set()
        self._news = self._begun = False
        self._held: tuple[Source, Given, Weights] | None = None  # what a thread has read
        self._base: Base | None = None
        self._buffers = ReceiveBuffers()
        super().__init__(wanted)

    def begin_call(self) -> None:
        """The program asks for a version."""
        self._begun = False

    def ask(self) -> None:
        """Give credit; where it was used up, an announcement follows."""
        self.receive()
        for source in self.sources:
            self._give_credit(source)

    def read(self, after: int | Weights | None, deadline: Deadline) -> Weights | None:
        """The newest version; None if there is none, if it is not newer than `after`, or if it is on its way.

        Where many bytes come over a connection, a thread reads them, for this call or a later one. A version that
        this call has begun to read is returned although a newer one was announced meanwhile, and one that an
        earlier call has begun is if the newest one does not come in time: so a subscriber whose publisher is
        faster than its connection gets versions.

        Raises:
            TransportError: it could not be read in time.
            PayloadFormatError: its bytes are not arrays.
        """
        newest = None if self._expecting or not self.queue else self.queue[-1]
        while (task := self._reading.pop_done()) is not None:
            source, given = task[0], task[1].about
            replaced = self.queue and self.queue[-1] != (source, given)
            try:
                found = task[1].result()
            except TransportError:
                if replaced and not deadline.expired:
                    continue  # the newer version is read now
                raise
            if found is not None:
                self._held = source, given, self._weights(source, given, found)
            elif not replaced:
                self.queue.clear()  # a newer version has replaced it, and is announced
                newest = None
        if self._held is not None:
            source, given, weights = self._held
            if not _is_newer(source, given, after):
                self._held = None
            elif self._begun or deadline.expired or (not self._expecting and newest in (None, (source, given))):
                self._held = None
                return weights
        if newest is None or not _is_newer(*newest, after) or newest[0] in self.late:
            return None
        return self._read(*newest, deadline)

    def _read(self, source: Source, given: Given, deadline: Deadline) -> Weights | None:
        try:
            values = source.read_in_place(given)
            if values is not None:
                return Weights(
                    values, version=given.deliveries, publisher=source.producer,
                    in_place=True, delta=False, received_bytes=0,
                )  # fmt: skip
            if source.reads_parts:
                _check_size(given)
                return self._weights(source, given, FetchedPart(source.read(given, deadline)))
            found = fetch(
                lambda each: _read_at_once(source, each, deadline),
                given, self._base_of(source), self._buffers.allocate,
            )  # fmt: skip
            return self._weights(source, given, found)
        except (StaleSlotError, ProducerLostError):
            self.queue.clear()  # a newer version has replaced it, and is announced
            return None
        except TransportError:
            self._reading.begin(source, self._reader(source, given), given)
            self._begun = True
            return None

    def _reader(self, source: Source, given: Given) -> Callable[[], Fetched | FetchedPart | None]:
        """A function, for any thread, that reads a version; it returns None if the version is gone."""
        if source.reads_parts:
            read_part = source.reader(given)
            return lambda: None if (values := read_part()) is None else FetchedPart(values)
        read, base, allocate = source.bytes_reader(), self._base_of(source), self._buffers.allocate

        def run() -> Fetched | None:
            try:
                return fetch(read, given, base, allocate)
            except (StaleSlotError, ProducerLostError):
                return None

        return run

    def _base_of(self, source: Source) -> Base | None:
        return self._base if self._base is not None and self._base.producer == source.producer else None

    def _weights(self, source: Source, given: Given, found: Fetched | FetchedPart) -> Weights:
        """The arrays of a version that has come; it is kept if a delta may follow."""
        if isinstance(found, FetchedPart):
            return Weights(
                found.values, version=given.deliveries, publisher=source.producer,
                in_place=False, delta=False, received_bytes=found.nbytes,
            )  # fmt: skip
        image = found.image
        if self.wanted.endpoints and sparse.METADATA.items() <= unpack_metadata(image).items():
            image.flags.writeable = False
            self._base = Base(source.producer, given.deliveries, image)
        return Weights(
            unpack(image, selection=self.wanted.selection), version=given.deliveries, publisher=source.producer,
            in_place=False, delta=found.delta, received_bytes=found.nbytes,
        )  # fmt: skip

    def has_news(self) -> bool:
        return self._news or self._held is not None or self._reading.ready > 0

    def wait(self, deadline: Deadline, report: Report, *, ask: bool = True) -> None:
        self._news = False
        super().wait(deadline, report, ask=ask)

    def close(self) -> None:
        self._held = self._base = None
        super().close()

    def _attached_to(self, source: Source) -> None:
        self._give_credit(source)

    def _take_in(self, source: Source, given: Given) -> None:
        source.received += 1
        self._expecting.discard(source)
        self._news = True
        self.queue.clear()
        self.queue.append((source, given))

    def _dropped(self, source: Source) -> None:
        self._expecting.discard(source)

    def _raise_credit(self) -> list[Source]:
        return []

    def _give_credit(self, source: Source) -> None:
        subscription = source.subscription
        if subscription.credit == source.received:
            self._expecting.add(source)
            subscription.set_credit(source.received + _CREDIT)
            if subscription.pending:
                subscription.ring()
        else:
            subscription.set_credit(source.received + _CREDIT)


def _read_at_once(source: Source, given: Given, deadline: Deadline) -> Bytes:
    _check_size(given)
    return source.read_bytes(given, deadline)


def _check_size(given: Given) -> None:
    if given.nbytes > MAX_BYTES_AT_ONCE:
        raise TransportTimeout(f"{given.nbytes} bytes are read in a thread")


def _is_newer(source: Source, given: Given, after: int | Weights | None) -> bool:
    if after is None:
        return True
    if isinstance(after, Weights):
        return source.producer != after.publisher or given.deliveries > after.version
    return given.deliveries > after
