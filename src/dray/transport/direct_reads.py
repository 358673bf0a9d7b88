"""The direct leases of a client: its attachments to the rings of this host, one for each producer."""

from __future__ import annotations

import threading
import weakref

import numpy as np

from dray.clock import MONOTONIC, Clock
from dray.errors import SelectionError
from dray.payload.selection import Selection
from dray.protocol import PayloadRef
from dray.resources import Closing
from dray.ring.attachment import Attachment, DirectLease
from dray.transport.receive_buffers import MIN_POOLED_BYTES, Bytes, ReceiveBuffers
from dray.transport.trace import Acknowledgement, Payload, Trace

DIRECT = "direct"
"""The endpoint in the trace events of direct leases."""
_UINT8 = np.dtype(np.uint8)


class DirectReads(Closing):
    """Thread-safe.

    Attributes:
        reader: the client's reader id.
        closed: true after `close`.

    Args:
        reader: the client's reader id.
        wanted: direct leases are asked for at all.
        buffers: where the memory of copies comes from.
        lock: guards the attachments.
        clock, trace: those of the client.
    """

    def __init__(
        self,
        reader: int,
        wanted: bool,
        buffers: ReceiveBuffers,
        *,
        lock: threading.Lock,
        clock: Clock = MONOTONIC,
        trace: Trace | None = None,
    ) -> None:
        self.reader = reader
        self.closed = False
        self._wanted = wanted
        self._buffers = buffers
        self._now = clock.now
        self._trace = trace
        self._lock = lock  # guards what follows against concurrent changes; `lease` reads without it
        self._attachments: dict[bytes, Attachment] = {}
        self._reads = self._bytes = 0  # over attachments that are gone

    def attach_as(self, producer: bytes) -> int | None:
        """The reader id with which a new connection asks for direct leases; None if it must not."""
        if not self._wanted:
            return None
        with self._lock:
            for each, attachment in list(self._attachments.items()):
                if not attachment.usable:
                    self._forget(each)
            return None if producer in self._attachments else self.reader

    def add(self, attachment: Attachment) -> None:
        """Lease payloads of its producer with this attachment."""
        producer = attachment.segment.producer_id
        with self._lock:
            if not self._wanted or producer in self._attachments:
                _end_attachment(attachment)
            else:
                self._attachments[producer] = attachment

    def forget(self, producer: bytes) -> None:
        """Begin no more leases of payloads of a producer. Those that have begun last, with the memory."""
        with self._lock:
            if producer in self._attachments:
                self._forget(producer)

    def lease(self, ref: PayloadRef) -> DirectLease | None:
        """Lease a payload; None if that needs its server.

        Raises:
            StaleSlotError: the payload is gone, or this reader has consumed it.
            SlotError: it has another size than in the reference.
        """
        attachment = self._attachments.get(ref.producer)
        if attachment is None:
            return None
        lease = attachment.lease(ref.slot, ref.sequence, ref.nbytes)
        if lease is None:
            self._find_cause(ref.producer, attachment)
        elif self._trace is not None:
            self._trace(Payload(self._now(), DIRECT, ref.slot, ref.sequence, ref.nbytes, id(self)))
        return lease

    def copy(self, lease: DirectLease, selection: Selection | None = None) -> Bytes:
        """The payload, or the part that is selected, in memory of its own.

        Raises:
            SelectionError: the payload does not have that part; the lease has ended, released.
        """
        begin, nbytes = lease.offset, lease.nbytes
        payload: Bytes = lease.attachment.array[begin : begin + nbytes]
        if selection is None and nbytes < MIN_POOLED_BYTES:
            return payload.copy()
        try:
            return self._buffers.copy(payload, selection)
        except SelectionError:
            lease.end(consumed=False)
            raise

    def in_place(self, lease: DirectLease) -> Bytes:
        """The payload in its slot. The lease ends, released, when the last array into it is gone."""
        array = in_slot(lease)
        end_with(array, lease, self).entered = True
        lease.attachment.count_read(lease)
        return array

    def end(self, lease: DirectLease, consumed: bool) -> None:
        """End the lease of a payload that is handed out."""
        lease.attachment.count_read(lease)
        lease.end(consumed)
        if self._trace is not None:
            self._trace(
                Acknowledgement(self._now(), DIRECT, lease.slot, lease.sequence, self.reader, consumed, id(self))
            )

    def totals(self) -> tuple[int, int]:
        """Payloads that were handed out, and their size."""
        with self._lock:
            attachments = self._attachments.values()
            reads = self._reads + sum(each.reads for each in attachments)
            return reads, self._bytes + sum(each.read_bytes for each in attachments)

    def close(self) -> None:
        """Begin no more leases, and release those whose block was not entered. Others live on. Twice is fine."""
        with self._lock:
            self._wanted, self.closed = False, True
            for producer in list(self._attachments):
                self._forget(producer)
        for root in list(_roots.values()):
            if root.reads is self and not root.entered:
                root.lease.end(consumed=False)

    def __repr__(self) -> str:
        return f"<DirectReads of {len(self._attachments)} rings>"

    def _find_cause(self, producer: bytes, attachment: Attachment) -> None:
        """There was no lease: the owner may be gone, or all lease words in use."""
        if not attachment.closed:
            self._end_dead()
        else:
            with self._lock:
                if self._attachments.get(producer) is attachment:
                    self._forget(producer)

    def _end_dead(self) -> None:
        """End leases whose array is gone: an exception of a signal handler may have ended the call that does."""
        for root in list(_roots.values()):
            if root.reads is self and root() is None:
                _end(root)

    def _forget(self, producer: bytes) -> None:
        attachment = self._attachments.pop(producer)
        _end_attachment(attachment)
        self._reads += attachment.reads
        self._bytes += attachment.read_bytes


def _end_attachment(attachment: Attachment) -> None:
    try:
        attachment.close()
    finally:
        attachment.close()  # an exception of a signal handler may have come first; its connection refers to it


def in_slot(lease: DirectLease) -> Bytes:
    """The payload in its slot: uint8 of shape (nbytes,), read-only, its own base."""
    return np.frombuffer(lease.attachment.memory, _UINT8, lease.nbytes, lease.offset)


# --- arrays that outlive their block ------------------------------------------------------------------------


class Root(weakref.ref[Bytes]):
    """The array on which all arrays of a direct lease are based. The lease ends when it is gone.

    Attributes:
        lease: the lease.
        reads: what it was leased with.
        consumed: how it ends.
        entered: arrays were handed out: closing the client does not end it.
    """

    __slots__ = ("consumed", "entered", "lease", "reads")
    lease: DirectLease
    reads: DirectReads
    consumed: bool
    entered: bool


_roots: dict[int, Root] = {}
"""Those that live. Nothing else keeps a weak reference alive, and with it what it calls."""


def end_with(array: Bytes, lease: DirectLease, reads: DirectReads) -> Root:
    """Let a lease end, released unless `consumed` is set, when the array is gone."""
    root = Root(array, _end)
    root.lease, root.reads, root.consumed, root.entered = lease, reads, False, False
    _roots[id(root)] = root
    return root


def _end(root: Root) -> None:
    root.lease.end(root.consumed)
    _roots.pop(id(root), None)
