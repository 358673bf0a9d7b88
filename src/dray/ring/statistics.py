"""What a ring tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReadySlot:
    """A committed payload that still waits for a reader.

    Attributes:
        slot: index of its slot.
        sequence: its sequence number.
        nbytes: its size.
    """

    slot: int
    sequence: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """A ring at one moment.

    Counters run from the ring's creation; ages are seconds, ``None`` where there is nothing.

    Attributes:
        slots: how many slots the ring has.
        slot_bytes: capacity of each.
        free: slots that hold nothing.
        writing: slots claimed and not yet committed.
        ready: slots with a payload that nobody reads now.
        reading: slots with at least one lease.
        leases: live leases.
        claimed: claims granted; also the next sequence number.
        committed: payloads committed.
        committed_bytes: their bytes.
        aborted: claims given back.
        leased: leases granted.
        copied: payloads read without a lease, copied out at once.
        consumed: payloads consumed by all of their readers.
        dropped_unread: payloads overwritten before anybody had leased or copied them.
        dropped_delivered: payloads overwritten after somebody had leased and returned, or copied them.
        retired: payloads replaced by a newer one (``retain="newest"``).
        stale_reads: `read_raw` calls answered with `StaleSlotError`.
        stale_consumes: `consume` calls for payloads that were gone or already consumed by that reader.
        late_finalises: leases and writers finished twice, late, or on the wrong ring.
        claim_waits: claims that found no free slot and waited.
        claim_wait_seconds: how long they waited, together.
        full_errors: claims that ended with `BufferFullError`.
        oldest_ready_age: since the READY payload with the lowest sequence was committed.
        oldest_lease_age: for how long the slot that has been READING longest has been so.
    """

    slots: int
    slot_bytes: int
    free: int
    writing: int
    ready: int
    reading: int
    leases: int
    claimed: int
    committed: int
    committed_bytes: int
    aborted: int
    leased: int
    copied: int
    consumed: int
    dropped_unread: int
    dropped_delivered: int
    retired: int
    stale_reads: int
    stale_consumes: int
    late_finalises: int
    claim_waits: int
    claim_wait_seconds: float
    full_errors: int
    oldest_ready_age: float | None
    oldest_lease_age: float | None
