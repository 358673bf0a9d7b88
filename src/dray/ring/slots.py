"""The slots of a ring, the payloads in them, and the lock that guards both.

`SlotTable` is all the state of a ring. Its `Slot` objects are authoritative; the slot headers in the segment are
copies for debuggers. The cost of an operation does not depend on the number of slots: free slots wait in a queue,
the others are kept in the order of their sequence numbers. A refused operation changes only counters.

A signal handler may raise an exception between any two bytecodes. Therefore every operation that moves a slot runs
between `begin_change` and ``changing = False``. An operation that finds `changing` set calls `mend`, which
completes the interrupted one: everything follows from the states of the slots.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from dray.clock import Clock, Deadline
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    PayloadError,
    PayloadTooLargeError,
    SlotError,
    StaleSlotError,
)
from dray.identifiers import Wanted
from dray.ring.layout import (
    CHECKSUM_OFFSET,
    CONSUMED_BY_OFFSET,
    FLAGS_OFFSET,
    HAS_CHECKSUM,
    SLOT_HEADER,
    STATE_OFFSET,
    U64,
)
from dray.ring.segment import Segment
from dray.ring.slot_state import SlotEvent, SlotState, after

OnFull: TypeAlias = Literal["block", "error", "overwrite"]
"""What a claim does without a free slot: wait, raise at once, or drop the oldest payload that is not leased."""

Retain: TypeAlias = Literal["unread", "newest"]
"""Keep each payload until it is consumed, or keep only the payload committed last."""

Copied: TypeAlias = tuple[bytes, int | None]
"""The bytes of a payload, and its checksum if one is known."""

_FREE, _WRITING, _READY, _READING = SlotState
_CLAIM, _COMMIT, _ABORT, _LEASE, _RETURN, _END = SlotEvent
_write_header: Final = SLOT_HEADER.pack_into
_write_u64: Final = U64.pack_into


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
    leases: int  # live leases
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
    checksum: int | None = None
    committed_at: float = 0.0
    leased_at: float = 0.0  # when it became READING
    consumed_by: int = 0
    leases: int = 0
    delivered: bool = False  # a reader has leased or copied the payload
    retired: bool = True
    retirement: threading.Condition | None = None  # of the threads that wait until the payload retires
    writer: weakref.ref[object] | None = None  # the `SlotWriter`, while the slot is WRITING

    def info(self) -> SlotInfo:
        """The slot as it is now."""
        return SlotInfo(
            self.index, self.state, self.sequence, self.nbytes, self.leases, self.consumed_by, self.retired,
            self.committed_at,
        )  # fmt: skip

    def wake(self) -> None:
        """Wake the threads that wait until this payload retires."""
        if self.retirement is not None:
            self.retirement.notify_all()
            self.retirement = None


class SlotTable:
    """The slots of one ring. `SharedRingBuffer` explains the arguments.

    The caller holds `lock` for everything below, with these exceptions: `close` takes the lock, `closed` and
    `disowned` may be read without it, and the garbage collector adds to `lost` in any thread.
    """

    __slots__ = (
        "__weakref__", "_aborted", "_all_readers", "_claim_wait_seconds", "_claim_waits", "_claimable", "_claimed",
        "_claimers", "_committed", "_committed_bytes", "_consumed", "_copied", "_dropped_delivered",
        "_dropped_unread", "_full_errors", "_leased", "_memory", "_newest", "_newest_only", "_now", "_on_full",
        "_replaced", "_slot_bytes", "_stale_consumes", "_stale_reads", "changing", "clock", "closed", "disowned",
        "double_releases", "free", "leases", "live", "lock", "lost", "ready", "slots",
    )  # fmt: skip

    def __init__(self, segment: Segment, *, readers: int, on_full: OnFull, retain: Retain, clock: Clock) -> None:
        layout = segment.layout
        self.lock = threading.Lock()
        self.slots = [Slot(i, layout.header_offset(i), layout.slot_offset(i)) for i in range(layout.slots)]
        self.free = deque(self.slots)  # the slot that has been free longest comes first
        self.live: OrderedDict[int, Slot] = OrderedDict()  # the other slots, by sequence number
        self.ready = self.leases = self.double_releases = 0
        self.changing = False  # an operation that moves a slot has begun and has not ended
        self.lost: deque[object] = deque()  # of writers that were deleted while their slots were WRITING
        self.closed = False  # true after `close`, and in a forked child
        self.disowned = False  # true in a forked child
        self.clock = clock
        self._claimable = threading.Condition(self.lock)
        self._claimers = 0  # threads that wait on `_claimable`; with none, there is nothing to notify
        self._slot_bytes = layout.slot_bytes
        self._memory = segment.view
        self._on_full = on_full
        self._newest_only = retain == "newest"
        self._newest: Slot | None = None
        self._all_readers = (1 << readers) - 1
        self._now = clock.now
        self._claimed = self._committed = self._committed_bytes = self._aborted = 0
        self._leased = self._copied = self._consumed = 0
        self._dropped_unread = self._dropped_delivered = self._replaced = 0
        self._stale_reads = self._stale_consumes = 0
        self._claim_waits = self._full_errors = 0
        self._claim_wait_seconds = 0.0
        _tables.add(self)

    def begin_change(self) -> None:
        """To be called before `commit`, `give_back`, `end_lease` and `consume`, which end the change."""
        if self.lost or self.changing:
            self.mend()
        self.changing = True

    def mend(self) -> None:
        """Complete a change that an exception interrupted, and free the slots of lost writers."""
        if not (self.lost or self.changing):
            return
        self.changing = True
        self.lost.clear()
        for slot in self.slots:
            if slot.state is _WRITING:
                if slot.writer is None or slot.writer() is None:
                    slot.state = _FREE
            elif slot.consumed_by == self._all_readers or (self._newest_only and slot is not self._newest):
                slot.retired = True
            if slot.state is _FREE or (slot.retired and not slot.leases):
                slot.state, slot.retired, slot.writer = _FREE, True, None
            elif slot.state is not _WRITING:
                slot.state = _READING if slot.leases else _READY
            if slot.retired:
                slot.wake()
            self._memory[slot.header + STATE_OFFSET] = slot.state
        free = dict.fromkeys(slot for slot in (*self.free, *self.slots) if slot.state is _FREE)
        live = sorted((slot for slot in self.slots if slot not in free), key=lambda slot: slot.sequence)
        self.free = deque(free)
        self.live = OrderedDict((slot.sequence, slot) for slot in live)
        self.ready = sum(slot.state is _READY for slot in live)
        self.leases = sum(slot.leases for slot in live)
        if self._newest is not None and self._newest.retired:
            self._newest = None
        self._claimed = max(self._claimed, 1 + max(slot.sequence for slot in self.slots))
        self._aborted = self._claimed - self._committed - sum(slot.state is _WRITING for slot in live)
        # What the interrupted change retired and did not count, counts as dropped.
        kept = sum(slot.state is not _WRITING and not slot.retired for slot in live)
        self._dropped_unread = self._committed - self._consumed - self._dropped_delivered - self._replaced - kept
        self._claimable.notify_all()
        self.changing = False

    def wait_for_slot(self, timeout: float | None) -> None:
        """Return when a slot is free; a thread that claims later may get it first. Raises like `claim`."""
        overwrite = self._on_full == "overwrite"
        if overwrite and self._drop_oldest():
            return
        deadline = Deadline.after(0 if self._on_full == "error" else timeout, self.clock)
        waited = False
        self._claimers += 1
        try:
            while deadline.remaining > 0:
                waited = True
                self._claimable.wait(min(deadline.remaining, threading.TIMEOUT_MAX))
                self.check_open()
                self.mend()
                if self.free or (overwrite and self._drop_oldest()):
                    return
            self._full_errors += 1
            count = ", ".join(f"{number} {state.name}" for state, number in self._count().items())
            raise BufferFullError(
                f"no slot became free: {count} of {len(self.slots)} slots", elapsed=deadline.elapsed
            )
        except BaseException:
            self._claimable.notify()  # if this thread was woken for a slot, another one must get it
            raise
        finally:
            self._claimers -= 1
            self._claim_waits += waited
            self._claim_wait_seconds += deadline.elapsed

    def claim(self, nbytes: int) -> Slot:
        """FREE → WRITING for the slot that has been free longest; there must be one.

        The caller sets `changing` before, and clears it when the slot refers to its writer.
        """
        slot = self.free.popleft()
        slot.state = after(slot.state, _CLAIM)
        slot.sequence = sequence = self._claimed
        self._claimed = sequence + 1
        slot.nbytes = nbytes
        slot.checksum = None
        slot.consumed_by = 0
        slot.delivered = slot.retired = False
        self.live[sequence] = slot
        _write_header(self._memory, slot.header, _WRITING, 0, sequence, nbytes, 0, 0.0, 0)
        return slot

    def commit(self, slot: Slot, nbytes: int) -> None:
        """WRITING → READY with `nbytes` bytes; with ``retain="newest"``, the payload before it retires."""
        slot.committed_at = now = self._now()
        slot.state = after(slot.state, _COMMIT)
        slot.nbytes = nbytes
        slot.writer = None
        self.ready += 1
        self._committed += 1
        self._committed_bytes += nbytes
        _write_header(self._memory, slot.header, _READY, 0, slot.sequence, nbytes, 0, now, 0)
        if self._newest_only:
            if self._newest is not None:
                self._retire(self._newest)
                self._replaced += 1
            self._newest = slot
        self.changing = False
        if self._claimers:
            self._claimable.notify()

    def give_back(self, slot: Slot) -> None:
        """End a claim, or a committed payload whose reference has not been given out."""
        slot.writer = None
        if slot.state is _WRITING:
            self._set_free(slot, _ABORT)
            self._aborted += 1
            slot.retired = True
            slot.wake()
        else:
            if self._newest is slot:
                self._newest = None
            self._retire(slot)
            self._dropped_unread += 1
        self.changing = False
        if self._claimers:
            self._claimable.notify()

    def end_lease(self, slot: Slot, reader: int, consumed: bool) -> None:
        """End one lease of `reader`, which has `consumed` the payload or not."""
        slot.leases -= 1
        self.leases -= 1
        if consumed and not slot.retired and not self._newest_only:
            self._consume(slot, reader)
        if slot.leases == 0 and slot.state is _READING:
            if slot.retired:
                self._set_free(slot, _END)
            else:
                slot.state = after(slot.state, _RETURN)
                self._memory[slot.header + STATE_OFFSET] = _READY
                self.ready += 1
        self.changing = False
        if self._claimers:
            self._claimable.notify()

    def consume(self, index: int, sequence: int, reader: int) -> bool:
        """Mark a payload consumed by `reader`, leased or not; false when it is stale for that reader."""
        slot = self.slots[index]
        stale = (
            slot.sequence != sequence or slot.retired or slot.state is _WRITING or slot.consumed_by >> reader & 1
        )
        if stale:
            self._stale_consumes += 1
        elif not self._newest_only:
            self._consume(slot, reader)
        self.changing = False
        if self._claimers:
            self._claimable.notify()
        return not stale

    def close(self) -> None:
        """Wake all waiting threads, and release the memory. Takes the lock; twice is fine."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self._claimable.notify_all()
                for slot in self.live.values():
                    slot.wake()
                self._memory = memoryview(b"")

    def lease(self, index: int, sequence: int, reader: int) -> Slot:
        """READY or READING → READING, with one lease more. Raises `StaleSlotError`."""
        slot = self.slots[index]
        if slot.sequence != sequence or slot.retired or slot.state is _WRITING or slot.consumed_by >> reader & 1:
            self._stale_reads += 1
            raise self.stale_error(slot, sequence, reader)
        if slot.leases == 0:
            self.ready -= 1
            slot.leased_at = self._now()
            self._memory[slot.header + STATE_OFFSET] = _READING
        slot.state = after(slot.state, _LEASE)
        slot.leases += 1
        slot.delivered = True
        self.leases += 1
        self._leased += 1
        return slot

    def copy_many(self, wanted: Sequence[Wanted], most: int) -> list[Copied | PayloadError | SlotError]:
        """See `SharedRingBuffer.copy_many`."""
        memory, slots, readers = self._memory, self.slots, self._all_readers
        found: list[Copied | PayloadError | SlotError] = []
        for index, sequence, reader in wanted:
            if index >= len(slots) or not readers >> reader & 1:
                found.append(SlotError(f"the ring has no slot {index}, or no reader {reader}", slot=index))
                continue
            slot = slots[index]
            if (
                slot.sequence != sequence
                or slot.retired
                or slot.state is _WRITING
                or slot.consumed_by >> reader & 1
            ):
                self._stale_reads += 1
                found.append(self.stale_error(slot, sequence, reader))
            elif slot.nbytes > most:
                why = f"a payload of {slot.nbytes} bytes needs a lease; at most {most} are copied"
                found.append(PayloadTooLargeError(why, slot=index, sequence=sequence))
            else:
                slot.delivered = True
                self._copied += 1
                found.append((memory[slot.offset : slot.offset + slot.nbytes].tobytes(), slot.checksum))
        return found

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of the segment, writable; the ring must be open."""
        return self._memory[offset : offset + nbytes]

    def committed(self, index: int, sequence: int) -> Slot:
        """The slot of a committed payload, which may be retired and leased. Raises `StaleSlotError`."""
        slot = self.slots[index]
        if slot.sequence != sequence or slot.state is _FREE or slot.state is _WRITING:
            raise self.stale_error(slot, sequence, 0)
        return slot

    def keep_checksum(self, slot: Slot, checksum: int) -> None:
        """Record the checksum of the payload in `slot`."""
        slot.checksum = checksum
        self._memory[slot.header + FLAGS_OFFSET] = HAS_CHECKSUM
        _write_u64(self._memory, slot.header + CHECKSUM_OFFSET, checksum)

    def statistics(self) -> RingStatistics:
        """All counters. The ages cost a walk past the live payloads older than those that they are about."""
        now = self._now()
        count = self._count()
        ready = (now - slot.committed_at for slot in self.live.values() if slot.state is _READY)
        reading = (now - slot.leased_at for slot in self.live.values() if slot.state is _READING)
        return RingStatistics(
            slots=len(self.slots), slot_bytes=self._slot_bytes,
            free=count[_FREE], writing=count[_WRITING], ready=count[_READY], reading=count[_READING],
            leases=self.leases, claimed=self._claimed, aborted=self._aborted,
            committed=self._committed, committed_bytes=self._committed_bytes,
            leased=self._leased, copied=self._copied, consumed=self._consumed, retired=self._replaced,
            dropped_unread=self._dropped_unread, dropped_delivered=self._dropped_delivered,
            stale_reads=self._stale_reads, stale_consumes=self._stale_consumes,
            double_releases=self.double_releases, full_errors=self._full_errors,
            claim_waits=self._claim_waits, claim_wait_seconds=self._claim_wait_seconds,
            oldest_ready_age=next(ready, None) if count[_READY] else None,
            oldest_lease_age=max(itertools.islice(reading, count[_READING]), default=None),
        )  # fmt: skip

    def check_open(self) -> None:
        """Raise `BufferClosedError` if the ring is closed, or belongs to the parent of this process."""
        if self.closed:
            self.check_owned()
            raise BufferClosedError("the ring is closed")

    def check_owned(self) -> None:
        """Raise `BufferClosedError` if the ring belongs to the parent of this process."""
        if self.disowned:
            raise BufferClosedError("the ring belongs to the process that this one was forked from")

    def stale_error(self, slot: Slot, sequence: int, reader: int) -> StaleSlotError:
        """The reason why `reader` cannot read `sequence` in `slot`."""
        if slot.sequence < sequence:
            why = "the slot never held that payload"
        elif slot.sequence > sequence:
            why = f"the payload is gone, the slot has moved on to sequence {slot.sequence}"
        elif slot.retired:
            why = "the payload is gone: consumed, overwritten, retired or aborted"
        elif slot.state is _WRITING:
            why = "the payload is not committed"
        else:
            why = f"reader {reader} has consumed the payload"
        return StaleSlotError(why, slot=slot.index, sequence=sequence)

    def _count(self) -> dict[SlotState, int]:
        writing = self._claimed - self._committed - self._aborted
        reading = len(self.live) - writing - self.ready
        return {_FREE: len(self.free), _WRITING: writing, _READY: self.ready, _READING: reading}

    def _drop_oldest(self) -> bool:
        """Free the oldest READY payload; false when there is none. Walks past older ones that are in use."""
        if not self.ready:
            return False
        self.changing = True
        slot = next(slot for slot in self.live.values() if slot.state is _READY)
        self._retire(slot)
        if slot.delivered:
            self._dropped_delivered += 1
        else:
            self._dropped_unread += 1
        self.changing = False
        return True

    def _consume(self, slot: Slot, reader: int) -> None:
        slot.consumed_by |= 1 << reader
        if slot.consumed_by == self._all_readers:
            self._consumed += 1
            self._retire(slot)
        else:
            _write_u64(self._memory, slot.header + CONSUMED_BY_OFFSET, slot.consumed_by)

    def _retire(self, slot: Slot) -> None:
        """Refuse new leases; the slot is free now, or with its last lease."""
        slot.retired = True
        slot.wake()
        if slot.leases == 0:
            if slot.state is _READY:
                self.ready -= 1
            self._set_free(slot, _END)

    def _set_free(self, slot: Slot, event: SlotEvent) -> None:
        slot.state = after(slot.state, event)
        self._memory[slot.header + STATE_OFFSET] = _FREE
        del self.live[slot.sequence]
        self.free.append(slot)

    def disown(self) -> None:
        """In a forked child: the memory is not mapped, and a thread that does not exist may hold the lock."""
        self.lock = threading.Lock()
        self._claimable = threading.Condition(self.lock)
        self.closed = self.disowned = True
        self._memory = memoryview(b"")


_tables: weakref.WeakSet[SlotTable] = weakref.WeakSet()


def _disown_in_child() -> None:
    for table in _tables:
        table.disown()
    _tables.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_in_child)
