"""`Source`: one producer, as a consumer sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from dray.clock import Clock, Deadline
from dray.errors import ProducerLostError, SlotError, StaleSlotError, TransportError
from dray.identifiers import PayloadId
from dray.payload import Selection, Values, unpack
from dray.protocol import PayloadRef, streams
from dray.resources import Closing
from dray.ring.attachment import Attachment, DirectLease
from dray.streams.payload import Payload
from dray.transport import PayloadClient
from dray.transport.direct_reads import DirectReads, end_with, in_slot
from dray.transport.receive_buffers import Bytes
from dray.transport.subscription import Subscription

MIN_FREE_LEASES: Final = 2
"""With fewer, a payload is copied out of its slot: one is needed to acknowledge, and arrays that the program keeps
must not stop the stream."""

READ_SECONDS: Final = 30.0
"""Time limit for a payload, or an acknowledgement, over a connection, besides the time for its bytes."""

PATIENCE_SECONDS: Final = 0.5
MIN_BYTES_PER_SECOND: Final = 10_000_000
"""A program that asks for a payload waits so long for the first attempt to read it, and for its bytes. Bytes may
travel as slowly as that."""

PAUSE_SECONDS: Final = 0.02
"""Time before such a request is repeated after a failure."""

T = TypeVar("T")


class Source(Closing):
    """A producer to which a consumer has subscribed.

    Args:
        subscription: the connection to it; the source owns it.
        name: what logs and errors call the producer.
        reads: the direct leases of the consumer.
        client: makes a client with a reader id, for what is not leased directly.
        release: returns a payload that the program had, from any thread.
        clock: where time comes from.
        pause: waits between two requests.
        selection: the part of each payload that is wanted; None for all.
        deltas: what it announces may be deltas, which have no parts.

    Attributes:
        received: payloads that it has given so far, without those that went back at once: until the producer has
            taken note of that, it gives no later one.
        producer: its id.
        reads_parts: a part of each payload is wanted, and can be read alone.
        draining: it puts nothing more, and nothing waits there.
        copies: payloads that were copied because arrays of others are kept.
        gone: payloads that were dropped, or taken back, before they were begun.
    """

    def __init__(
        self,
        subscription: Subscription,
        name: str,
        reads: DirectReads,
        *,
        client: Callable[[int], PayloadClient],
        release: Callable[[Source, streams.Given], None],
        clock: Clock,
        pause: Callable[[float], None],
        selection: Selection | None = None,
        deltas: bool = False,
    ) -> None:
        self.release = release
        self.subscription = subscription
        self.name = name
        self.producer = subscription.producer
        self.received = 0
        self.draining = False
        self.copies = self.gone = 0
        self._reads = reads
        self._client = client
        self._clock = clock
        self._pause = pause
        self._selection = selection
        self.reads_parts = selection is not None and not deltas
        self._selected = {} if selection is None else selection.arguments
        self._attachment: Attachment | None = subscription.attachment
        self._quiet: DirectLease | None = None  # the last one that was acknowledged without waking the producer

    @property
    def outstanding(self) -> int:
        """How many payloads it may give, or may have given, that have not come."""
        return self.subscription.credit - self.received

    # --- payloads ---------------------------------------------------------------------------------------------

    def read(self, given: streams.Given, deadline: Deadline) -> Values:
        """The arrays of a payload over a connection. Nothing is consumed.

        One attempt is made, which takes no longer than bytes that travel: meanwhile nothing is received from other
        producers, and the end of this one is not seen.

        Raises:
            StaleSlotError, ProducerLostError: it is gone.
            TransportError: it has failed, or its time had passed: `reader` continues with it.
            PayloadFormatError: its bytes are not arrays.
            SelectionError: it does not have the part that is wanted.
        """
        client = self._client(self.subscription.reader)
        attempt = deadline.capped_at(PATIENCE_SECONDS + given.nbytes / MIN_BYTES_PER_SECOND)
        return client.read(self._ref(given), timeout=attempt.timeout, consume=False, **self._selected)

    def reader(self, given: streams.Given) -> Callable[[], Values | None]:
        """A function, for any thread, that reads a payload over connections.

        It takes at most `READ_SECONDS`, and the time of the bytes at `MIN_BYTES_PER_SECOND`. It returns None if
        the payload is gone, and raises TransportError if it could not be read.
        """
        client, ref = self._client(self.subscription.reader), self._ref(given)
        selected = self._selected

        def read() -> Values | None:
            try:
                return self._persist(
                    lambda left: client.read(ref, timeout=left, consume=False, **selected), given.nbytes
                )
            except (StaleSlotError, ProducerLostError):
                return None

        return read

    def read_in_place(self, given: streams.Given) -> Values | None:
        """The arrays of a payload in its slot; None if it is to be read over a connection. Nothing is consumed.

        Raises:
            StaleSlotError, ProducerLostError: it is gone.
            PayloadFormatError: its bytes are not arrays.
        """
        attachment = self._attachment
        if attachment is None:
            return None
        lease = attachment.lease(given.slot, given.sequence, given.nbytes)
        if lease is not None:
            return self._in_place(attachment, lease)
        if attachment.closed:
            raise ProducerLostError(f"{self.name} has ended")
        return None

    def read_bytes(self, given: streams.Given, deadline: Deadline) -> Bytes:
        """The bytes of a payload over a connection, by one attempt as in `read`. Nothing is consumed.

        Raises:
            StaleSlotError, ProducerLostError: it is gone.
            TransportError: it has failed, or its time had passed.
        """
        client = self._client(self.subscription.reader)
        attempt = deadline.capped_at(PATIENCE_SECONDS + given.nbytes / MIN_BYTES_PER_SECOND)
        return client.read_bytes(self._ref(given), timeout=attempt.timeout, consume=False)

    def bytes_reader(self) -> Callable[[streams.Given], Bytes]:
        """A function, for any thread, that is like `read_bytes` and makes attempts as long as `reader`."""
        client = self._client(self.subscription.reader)

        def read(given: streams.Given) -> Bytes:
            ref = self._ref(given)
            return self._persist(lambda left: client.read_bytes(ref, timeout=left, consume=False), given.nbytes)

        return read

    def read_given(
        self, given: streams.Given, deadline: Deadline, warn: Callable[[Values], None]
    ) -> Payload | None:
        """The payload of a hand-out; None if it is gone or was taken back.

        Args:
            given: what the producer has announced.
            deadline: as for `read`.
            warn: called when the payload had to be copied.

        Raises:
            TransportError: it could not be read at once. It is begun: `reader` continues with it.
            PayloadFormatError: its bytes are not arrays; it is given back.
            SelectionError: it does not have the part that is wanted; it is given back.
        """
        try:
            if not self.subscription.begin(given):
                # The producer may have seen that it was begun, and left it to this consumer.
                self.received -= 1
                self.give_back(given, begun=False)
                self.gone += 1
                return None
            attachment = self._attachment
            if attachment is not None:
                lease = attachment.lease(given.slot, given.sequence, given.nbytes)
                if lease is not None:
                    return self._leased(attachment, given, lease, warn)
                if attachment.closed:
                    return self.payload(given, None)
            found = self.read(given, deadline)
        except (StaleSlotError, ProducerLostError):
            found = None
        except TransportError:
            raise
        except BaseException:
            self.give_back(given, begun=True)
            raise
        return self.payload(given, found)

    def payload(self, given: streams.Given, arrays: Values | None) -> Payload | None:
        """The payload with arrays in memory of their own; None if it is gone."""
        if arrays is None:
            self.gone += 1
            return None
        return Payload(self, given, arrays, None)

    def acknowledge(self, given: streams.Given | PayloadId, lease: DirectLease | None, ring: bool = True) -> bool:
        """The group has consumed a payload; False if it is gone.

        Without `ring`, a producer that waits learns it when the lease ends, or by `announce`.
        """
        attachment = self._attachment
        if attachment is not None:
            if not ring:
                self._quiet = lease
            if lease is not None and attachment.acknowledge(lease):
                if ring:
                    attachment.ring_if_awaited()
                return True
            try:
                lease = attachment.lease(given.slot, given.sequence, given.nbytes)
            except SlotError:
                return False
            if lease is not None:
                return lease.end(consumed=True)
            if attachment.closed:
                return False
        client, ref = self._client(self.subscription.reader), self._ref(given)
        try:
            return self._persist(lambda timeout: client.consume([ref], timeout=timeout)) == 1
        except ProducerLostError:
            return False

    def announce(self) -> None:
        """Wake the producer if it waits and may not have learnt of acknowledged payloads.

        The end of a lease wakes it as well. It learns of all payloads then, so that only the last lease counts.
        """
        lease, self._quiet = self._quiet, None
        if lease is not None and lease.word >= 0:
            lease.attachment.ring_if_awaited()

    def give_back(self, given: streams.Given, begun: bool) -> None:
        """Return a payload to the producer, for another consumer."""
        self.subscription.give_back(given, begun)

    def close(self) -> None:
        """End the subscription. Values of leased payloads stay valid. Twice is fine."""
        self.subscription.close()

    def __repr__(self) -> str:
        return f"<Source {self.name}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _leased(
        self, attachment: Attachment, given: streams.Given, lease: DirectLease, warn: Callable[[Values], None]
    ) -> Payload:
        if attachment.free_leases < MIN_FREE_LEASES - 1:
            arrays = unpack(self._reads.copy(lease, self._selection))
            self._reads.end(lease, consumed=False)
            self.copies += 1
            warn(arrays)
            return Payload(self, given, arrays, None)
        return Payload(self, given, self._in_place(attachment, lease), lease)

    def _in_place(self, attachment: Attachment, lease: DirectLease) -> Values:
        """The arrays in their slot; the lease ends with the last of them."""
        array = in_slot(lease)
        end_with(array, lease, self._reads).entered = True
        attachment.count_read(lease)
        return unpack(array, selection=self._selection)

    def _persist(self, request: Callable[[float | None], T], nbytes: int = 0) -> T:
        """The result of a request that brings `nbytes` bytes, over new connections, before its deadline.

        While a process dies, its sockets are closed one after the other: several connections may be accepted and
        reset before its address refuses them, which shows that it is lost.

        Raises:
            ProducerLostError: the producer is gone.
            TransportError: it could not be reached in time.
        """
        deadline = Deadline.after(READ_SECONDS + nbytes / MIN_BYTES_PER_SECOND, self._clock)
        while True:
            try:
                return request(deadline.timeout)
            except TransportError:
                if deadline.remaining <= PAUSE_SECONDS:
                    raise
                self._pause(PAUSE_SECONDS)

    def _ref(self, given: streams.Given | PayloadId) -> PayloadRef:
        endpoints = (self.subscription.endpoint,)
        return PayloadRef(self.producer, given.slot, given.sequence, given.nbytes, endpoints)
