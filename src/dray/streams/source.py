"""`Source`: one producer, as a consumer sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from dray.errors import ProducerLostError, SlotError, StaleSlotError
from dray.identifiers import PayloadId
from dray.payload import Arrays, unpack
from dray.protocol import PayloadRef, streams
from dray.resources import Closing
from dray.ring.attachment import Attachment, DirectLease
from dray.streams.payload import Payload
from dray.transport import PayloadClient
from dray.transport.direct_reads import DirectReads, end_with, in_slot
from dray.transport.subscription import Subscription

MIN_FREE_LEASES: Final = 2
"""With fewer, a payload is copied out of its slot: one is needed to acknowledge, and arrays that the program keeps
must not stop the stream."""

READ_SECONDS: Final = 30.0


class Source(Closing):
    """A producer to which a consumer has subscribed.

    Args:
        subscription: the connection to it; the source owns it.
        name: what logs and errors call the producer.
        reads: the direct leases of the consumer.
        client: makes a client with a reader id, for what is not leased directly.

    Attributes:
        received: payloads that it has given so far.
        producer: its id.
        copies: payloads that were copied because arrays of others are kept.
        gone: payloads that were dropped, or taken back, before they were begun.
    """

    def __init__(
        self, subscription: Subscription, name: str, reads: DirectReads, client: Callable[[int], PayloadClient]
    ) -> None:
        self.subscription = subscription
        self.name = name
        self.producer = subscription.producer
        self.received = 0
        self.copies = self.gone = 0
        self._reads = reads
        self._client = client
        self._attachment: Attachment | None = subscription.attachment

    # --- payloads ---------------------------------------------------------------------------------------------

    def take(self, given: streams.Given, warn: Callable[[Arrays], None]) -> Payload | None:
        """The payload of a hand-out; None if it is gone or was taken back.

        Args:
            given: what the producer has announced.
            warn: called when the payload had to be copied.

        Raises:
            TransportError: it could not be read in time; it is given back.
            PayloadFormatError: its bytes are not arrays.
        """
        try:
            if not self.subscription.begin(given):
                # The producer may have seen that it was begun, and left it to this consumer.
                self.give_back(given, begun=False)
                self.gone += 1
                return None
            attachment = self._attachment
            if attachment is not None:
                lease = attachment.lease(given.slot, given.sequence, given.nbytes)
                if lease is not None:
                    return self._leased(attachment, given, lease, warn)
                if attachment.closed:
                    self.gone += 1
                    return None
            return self._read(given)
        except (StaleSlotError, ProducerLostError):
            self.gone += 1
            return None
        except BaseException:
            self.give_back(given, begun=False)
            raise

    def acknowledge(self, given: streams.Given | PayloadId, lease: DirectLease | None, ring: bool = True) -> bool:
        """The group has consumed a payload; False if it is gone.

        Without `ring`, a producer that waits learns it when the lease ends, or when the consumer waits.
        """
        attachment = self._attachment
        if attachment is not None:
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
        try:
            return self._client(self.subscription.reader).consume([self._ref(given)], timeout=READ_SECONDS) == 1
        except ProducerLostError:
            return False

    def give_back(self, given: streams.Given, begun: bool) -> None:
        """Return a payload to the producer, for another consumer."""
        self.subscription.give_back(given, begun)

    def close(self) -> None:
        """End the subscription. Arrays of leased payloads stay valid. Twice is fine."""
        self.subscription.close()

    def __repr__(self) -> str:
        return f"<Source {self.name}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _leased(
        self, attachment: Attachment, given: streams.Given, lease: DirectLease, warn: Callable[[Arrays], None]
    ) -> Payload:
        if attachment.free_leases < MIN_FREE_LEASES - 1:
            arrays = unpack(self._reads.copy(lease))
            self._reads.end(lease, consumed=False)
            self.copies += 1
            warn(arrays)
            return Payload(self, given, arrays, None)
        array = in_slot(lease)
        root = end_with(array, lease, self._reads)
        root.entered = True
        attachment.count_read(lease)
        return Payload(self, given, unpack(array), lease)

    def _read(self, given: streams.Given) -> Payload:
        client = self._client(self.subscription.reader)
        arrays = client.read(self._ref(given), timeout=READ_SECONDS, consume=False)
        return Payload(self, given, arrays, None)

    def _ref(self, given: streams.Given | PayloadId) -> PayloadRef:
        endpoints = (self.subscription.endpoint,)
        return PayloadRef(self.producer, given.slot, given.sequence, given.nbytes, endpoints)
