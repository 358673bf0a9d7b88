"""What a ring knows of a slot and of itself: `Slot`, which only its table changes, and what it reports."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from dray.errors import StaleSlotError
from dray.ring.layout import HAS_CHECKSUM, SLOT_HEADER
from dray.ring.slot_state import SlotState

OnFull: TypeAlias = Literal["block", "error", "overwrite"]
"""What a claim does without a free slot: wait, raise at once, or drop the oldest payload that is not leased."""

Retain: TypeAlias = Literal["unread", "newest"]
"""Keep each payload until it is consumed, or keep only the payload committed last."""


class SlotInfo(NamedTuple):
    """One slot at one moment."""

    slot: int  # its index in the ring
    state: SlotState
    sequence: int  # of the payload claimed last in this slot; -1 if there was none
    nbytes: int  # size of that payload
    leases: int  # live leases on it
    consumed_by: int  # bit r is set when reader r has consumed it
    retired: bool  # no new lease may begin: it was consumed by all readers, dropped, replaced or aborted
    committed_at: float  # on the ring's clock; in a WRITING slot, of the payload before


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """A ring at one moment. Counters start when the ring is created; ages are in seconds."""

    slots: int  # number of slots
    slot_bytes: int  # capacity of each
    free: int  # slots in each state
    writing: int
    ready: int
    reading: int
    leases: int  # live leases, direct ones as they were found last
    claimed: int  # claims granted; also the next sequence number
    committed: int  # payloads committed
    committed_bytes: int  # their bytes
    aborted: int  # claims that ended without a commit
    leased: int  # leases granted
    copied: int  # payloads copied out without a lease
    consumed: int  # payloads that all readers have consumed
    dropped_unread: int  # payloads dropped before a reader had leased or copied them
    dropped_delivered: int  # payloads dropped after a reader had leased or copied them
    retired: int  # payloads replaced by a newer one (retain="newest")
    stale_reads: int  # reads of payloads that were gone, or that the reader had consumed
    stale_consumes: int  # `consume` calls for such payloads
    double_releases: int  # leases and writers that were ended again
    claim_waits: int  # claims that waited for a free slot
    claim_wait_seconds: float  # for how long, in total
    full_errors: int  # claims that ended with `BufferFullError`
    oldest_ready_age: float | None  # since the commit of the READY payload with the lowest sequence number
    oldest_lease_age: float | None  # for how long the slot that has been READING longest has been so
    attachments: int = 0  # consumers that may lease directly
    barriers: int = 0  # memory barriers for direct leases
    barrier_failures: int = 0  # those that failed; none may fail where direct leases are offered
    barrier_p99: float | None = None  # seconds; None until there were enough of them
    ignored_words: int = 0  # words in shared memory without a meaning, which a faulty consumer has written
    late_looks: int = 0  # waits that ended because the words were read again, not by the doorbell


@dataclass(slots=True, eq=False)
class Slot:
    """One slot, guarded by the table's lock. `SlotInfo` explains the fields that both have.

    `sequence` outlives the payload: it distinguishes old references from those that never existed.
    """

    index: int
    header: int  # byte offset of its header
    offset: int  # byte offset of its payload
    state: SlotState = SlotState.FREE
    sequence: int = -1
    nbytes: int = 0
    touched: int = 0  # bytes of its memory that a payload was given: it keeps them
    checksum: int | None = None
    committed_at: float = 0.0
    leased_at: float = 0.0  # when it became READING
    consumed_by: int = 0
    leases: int = 0  # over connections
    words: int = 0  # lease words of direct consumers that name the slot, as last read
    scan: weakref.ref[object] | None = None  # that decides whether the payload is dropped
    delivered: bool = False  # a reader has leased or copied the payload
    retired: bool = True
    retirement: threading.Condition | None = None  # of the threads that wait until the payload retires
    writer: weakref.ref[object] | None = None  # the `SlotWriter`, while the slot is WRITING

    @property
    def undecided(self) -> bool:
        """The payload may be dropped, unless a lease is found."""
        return self.scan is not None and self.scan() is not None

    def info(self) -> SlotInfo:
        """The slot as it is now."""
        return SlotInfo(
            self.index, self.state, self.sequence, self.nbytes, self.leases + self.words, self.consumed_by,
            self.retired, self.committed_at,
        )  # fmt: skip

    def wake(self) -> None:
        """Wake the threads that wait until this payload retires."""
        if self.retirement is not None:
            self.retirement.notify_all()
            self.retirement = None

    def stale_error(self, sequence: int, reader: int) -> StaleSlotError:
        """The reason why `reader` cannot read the payload `sequence` in this slot."""
        if self.sequence < sequence:
            why = "the slot never held that payload"
        elif self.sequence > sequence:
            why = f"the payload is gone, the slot has moved on to sequence {self.sequence}"
        elif self.retired:
            why = "the payload is gone: consumed, overwritten, retired or aborted"
        elif self.state is SlotState.WRITING:
            why = "the payload is not committed"
        else:
            why = f"reader {reader} has consumed the payload"
        return StaleSlotError(why, slot=self.index, sequence=sequence)

    def mend_header(self, memory: memoryview) -> None:
        """Write its header again. A consumer may lease the payload meanwhile: no field is zero in between."""
        flags, checksum = (0, 0) if self.checksum is None else (HAS_CHECKSUM, self.checksum)
        memory[self.header : self.header + SLOT_HEADER.size] = SLOT_HEADER.pack(
            self.state, flags, self.sequence, self.nbytes, checksum, self.committed_at, self.consumed_by
        )


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Scan:
    """What the table wants to know of direct consumers.

    While this object exists, it is undecided whether the victim is dropped. If an exception of a signal handler
    ends `observe`, the next one may choose the same victim.

    Attributes:
        due: slots that are free unless a lease word names them, with the sequence numbers of their payloads.
        victim: the slot of a payload that is dropped unless it is leased.
        sequence: the sequence number of that payload.
    """

    due: tuple[tuple[Slot, int], ...]
    victim: Slot | None
    sequence: int

    @property
    def needs_barrier(self) -> bool:
        """Only after a barrier something can be freed."""
        return bool(self.due) or self.victim is not None
