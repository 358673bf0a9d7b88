"""The bookkeeping of a ring's slots: what is claimed, committed, leased and consumed. No lock, no waiting.

The caller holds the ring's lock. The truth is in the `Slot` objects; the segment's slot headers mirror it. Every
operation costs the same whatever the number of slots: free slots wait in a queue, live payloads stand in the order
of their sequence numbers. An operation that is refused changes nothing but counters.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final, TypeAlias

from dray.clock import Clock
from dray.errors import PayloadError, PayloadTooLargeError, SlotError, StaleSlotError
from dray.ring.layout import (
    CHECKSUM_OFFSET,
    CONSUMED_BY_OFFSET,
    FLAGS_OFFSET,
    HAS_CHECKSUM,
    SLOT_HEADER,
    STATE_OFFSET,
    U64,
    SegmentLayout,
)
from dray.ring.slot_state import SlotEvent, SlotState, after
from dray.ring.statistics import ReadySlot, RingStatistics

_FREE, _WRITING, _READY, _READING = SlotState
_CLAIM, _COMMIT, _ABORT, _LEASE, _RETURN, _END = SlotEvent
_write_header: Final = SLOT_HEADER.pack_into
_write_u64: Final = U64.pack_into

Wanted: TypeAlias = tuple[int, int, int]
"""(slot, sequence, reader) that somebody asks for."""

Copied: TypeAlias = tuple[bytes, int | None]
"""A payload's bytes, and its checksum if one is kept."""


class Slot:
    """What the ring knows about one slot.

    `over` says that the payload's life has ended (consumed by all, overwritten, retired or aborted); the slot is
    FREE as soon as no lease is left. `sequence` stays, so that old references are told from those never given.
    `writer` is the one who has claimed it, while it is WRITING.
    """

    __slots__ = (
        "checksum",
        "committed_at",
        "consumed_by",
        "delivered",
        "ended",
        "header",
        "index",
        "leased_at",
        "leases",
        "nbytes",
        "offset",
        "over",
        "sequence",
        "state",
        "writer",
    )

    def __init__(self, index: int, header: int, offset: int) -> None:
        self.index = index
        self.header = header
        self.offset = offset
        self.state = _FREE
        self.sequence = -1
        self.nbytes = 0
        self.checksum: int | None = None
        self.committed_at = 0.0
        self.leased_at = 0.0
        self.consumed_by = 0
        self.leases = 0
        self.delivered = False
        self.over = True
        self.ended: threading.Condition | None = None
        self.writer: weakref.ref[object] | None = None

    def wake(self) -> None:
        """Wake those who wait for the end of this payload."""
        if self.ended is not None:
            self.ended.notify_all()
            self.ended = None


class SlotTable:
    """All slots of a ring.

    Args:
        layout: where headers and slots lie.
        memory: the writable segment; only slot headers are written.
        readers: how many readers each payload is meant for.
        newest_only: keep only the payload committed last.
        clock: tells commit and lease times.
    """

    def __init__(
        self, layout: SegmentLayout, memory: memoryview, *, readers: int, newest_only: bool, clock: Clock
    ) -> None:
        self.slots = [Slot(i, layout.header_offset(i), layout.slot_offset(i)) for i in range(layout.slots)]
        self.free = deque(self.slots)
        self.live: OrderedDict[int, Slot] = OrderedDict()  # by sequence, so in the order of claims
        self.ready = 0
        self.leases = 0
        self.late_finalises = 0
        self.claim_waits = 0
        self.claim_wait_seconds = 0.0
        self.full_errors = 0
        self.changing = False  # while set by nobody who is inside: a change was not finished, see `mend`
        self._slot_bytes = layout.slot_bytes
        self._memory = memory
        self._newest_only = newest_only
        self._newest: Slot | None = None
        self._all_readers = (1 << readers) - 1
        self._now = clock.now
        self._claimed = self._committed = self._committed_bytes = self._aborted = 0
        self._leased = self._copied = self._consumed = 0
        self._dropped_unread = self._dropped_delivered = self._retired = 0
        self._stale_reads = self._stale_consumes = 0

    def claim(self, nbytes: int) -> Slot:
        """Take the slot that has been free longest; there must be one."""
        slot = self.free.popleft()
        slot.state = after(slot.state, _CLAIM)
        slot.sequence = sequence = self._claimed
        self._claimed = sequence + 1
        slot.nbytes = nbytes
        slot.checksum = None
        slot.consumed_by = 0
        slot.delivered = slot.over = False
        self.live[sequence] = slot
        _write_header(self._memory, slot.header, _WRITING, 0, sequence, nbytes, 0, 0.0, 0)
        return slot

    def commit(self, slot: Slot, nbytes: int) -> None:
        """WRITING → READY with `nbytes` bytes; with `newest_only`, the payload before it retires."""
        slot.state = after(slot.state, _COMMIT)
        slot.nbytes = nbytes
        slot.committed_at = now = self._now()
        self.ready += 1
        self._committed += 1
        self._committed_bytes += nbytes
        _write_header(self._memory, slot.header, _READY, 0, slot.sequence, nbytes, 0, now, 0)
        if self._newest_only:
            if self._newest is not None:
                self._retired += 1
                self._end(self._newest)
            self._newest = slot

    def abort(self, slot: Slot) -> None:
        """WRITING → FREE."""
        self._set_free(slot, _ABORT)
        self._aborted += 1
        slot.over = True
        slot.wake()

    def withdraw(self, slot: Slot) -> None:
        """End a committed payload whose reference nobody was given."""
        self._dropped_unread += 1
        if self._newest is slot:
            self._newest = None
        self._end(slot)

    def mend(self) -> None:
        """Finish what an exception of a signal handler came in the middle of: all follows from the slots' states.

        A slot whose writer is gone is free.
        """
        for slot in self.slots:
            lost = slot.state is _WRITING and (slot.writer is None or slot.writer() is None)
            if lost or (slot.state in (_READY, _READING) and slot.over and not slot.leases):
                slot.state, slot.over, slot.writer = _FREE, True, None
                slot.wake()
            elif slot.state in (_READY, _READING):
                slot.state = _READING if slot.leases else _READY
            elif slot.state is _FREE:
                slot.over = True
                slot.wake()
            self._memory[slot.header + STATE_OFFSET] = slot.state
        free = dict.fromkeys(slot for slot in (*self.free, *self.slots) if slot.state is _FREE)
        taken = sorted((slot for slot in self.slots if slot not in free), key=lambda slot: slot.sequence)
        self.free = deque(free)
        self.live = OrderedDict((slot.sequence, slot) for slot in taken)
        self.ready = sum(slot.state is _READY for slot in taken)
        self.leases = sum(slot.leases for slot in taken)
        if self._newest is not None and self._newest.over:
            self._newest = None
        self._claimed = max(self._claimed, 1 + max(slot.sequence for slot in self.slots))
        self._aborted = self._claimed - self._committed - sum(slot.state is _WRITING for slot in taken)
        self.changing = False

    def lease(self, index: int, sequence: int, reader: int) -> Slot:
        """READY or READING → READING, with one lease more.

        Raises:
            StaleSlotError: nothing to read there under that sequence for that reader.
        """
        slot = self.slots[index]
        if slot.sequence != sequence or slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
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
        """What readers may read, without leases; an error for what there is not, or has more than `most` bytes."""
        memory, slots, readers = self._memory, self.slots, self._all_readers
        found: list[Copied | PayloadError | SlotError] = []
        for index, sequence, reader in wanted:
            if index >= len(slots) or not readers >> reader & 1:
                found.append(SlotError(f"the ring has no slot {index}, or no reader {reader}", slot=index))
                continue
            slot = slots[index]
            if slot.sequence != sequence or slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
                self._stale_reads += 1
                found.append(self.stale_error(slot, sequence, reader))
            elif slot.nbytes > most:
                found.append(
                    PayloadTooLargeError(
                        f"a payload of {slot.nbytes} bytes needs a lease; at most {most} are copied",
                        slot=index,
                        sequence=sequence,
                    )
                )
            else:
                slot.delivered = True
                self._copied += 1
                found.append((memory[slot.offset : slot.offset + slot.nbytes].tobytes(), slot.checksum))
        return found

    def finish(self, slot: Slot, reader: int, consumed: bool) -> None:
        """End one lease on `slot`; `consumed` says that `reader` does not need the payload any more."""
        slot.leases -= 1
        self.leases -= 1
        if consumed and not slot.over and not self._newest_only:
            self._consume(slot, reader)
        if slot.leases == 0 and slot.state is _READING:
            if slot.over:
                self._set_free(slot, _END)
            else:
                slot.state = after(slot.state, _RETURN)
                self._memory[slot.header + STATE_OFFSET] = _READY
                self.ready += 1

    def consume(self, index: int, sequence: int, reader: int) -> bool:
        """Mark a payload consumed by `reader`, leased or not; false when it is stale for that reader."""
        slot = self.slots[index]
        if slot.sequence != sequence or slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
            self._stale_consumes += 1
            return False
        if not self._newest_only:
            self._consume(slot, reader)
        return True

    def drop_oldest(self) -> bool:
        """Free the oldest READY payload; false when there is none. Walks past older ones that are in use."""
        if not self.ready:
            return False
        slot = next(slot for slot in self.live.values() if slot.state is _READY)
        if slot.delivered:
            self._dropped_delivered += 1
        else:
            self._dropped_unread += 1
        self._end(slot)
        return True

    def committed(self, index: int, sequence: int) -> Slot:
        """The slot of a committed payload whose bytes still stand, consumed or not.

        Raises:
            StaleSlotError: there is none.
        """
        slot = self.slots[index]
        if slot.sequence != sequence or slot.state is _FREE or slot.state is _WRITING:
            raise self.stale_error(slot, sequence, 0)
        return slot

    def keep_checksum(self, slot: Slot, checksum: int) -> None:
        """Note the checksum of the payload in `slot`."""
        slot.checksum = checksum
        self._memory[slot.header + FLAGS_OFFSET] = HAS_CHECKSUM
        _write_u64(self._memory, slot.header + CHECKSUM_OFFSET, checksum)

    def waiting(self, *, leased: bool) -> list[ReadySlot]:
        """The READY payloads in the order of their claims; with `leased`, also READING ones that are not over."""
        states = (_READY, _READING) if leased else (_READY,)
        return [
            ReadySlot(slot.index, sequence, slot.nbytes)
            for sequence, slot in self.live.items()
            if slot.state in states and not slot.over
        ]

    def count(self) -> dict[SlotState, int]:
        """How many slots are in each state."""
        writing = self._claimed - self._committed - self._aborted
        return {
            _FREE: len(self.free),
            _WRITING: writing,
            _READY: self.ready,
            _READING: len(self.live) - writing - self.ready,
        }

    def statistics(self) -> RingStatistics:
        """All counters; the ages cost a walk past the live payloads older than those they are about."""
        now = self._now()
        count = self.count()
        ready = (now - slot.committed_at for slot in self.live.values() if slot.state is _READY)
        reading = (now - slot.leased_at for slot in self.live.values() if slot.state is _READING)
        return RingStatistics(
            slots=len(self.slots),
            slot_bytes=self._slot_bytes,
            free=count[_FREE],
            writing=count[_WRITING],
            ready=count[_READY],
            reading=count[_READING],
            leases=self.leases,
            claimed=self._claimed,
            committed=self._committed,
            committed_bytes=self._committed_bytes,
            aborted=self._aborted,
            leased=self._leased,
            copied=self._copied,
            consumed=self._consumed,
            dropped_unread=self._dropped_unread,
            dropped_delivered=self._dropped_delivered,
            retired=self._retired,
            stale_reads=self._stale_reads,
            stale_consumes=self._stale_consumes,
            late_finalises=self.late_finalises,
            claim_waits=self.claim_waits,
            claim_wait_seconds=self.claim_wait_seconds,
            full_errors=self.full_errors,
            oldest_ready_age=next(ready, None) if count[_READY] else None,
            oldest_lease_age=max(itertools.islice(reading, count[_READING]), default=None),
        )

    def forget_memory(self) -> None:
        """Let go of the segment; no operation may follow."""
        self._memory = memoryview(b"")

    def stale_error(self, slot: Slot, sequence: int, reader: int) -> StaleSlotError:
        """Why `sequence` cannot be read in `slot` by `reader`."""
        if slot.sequence < sequence:
            why = "the slot never held that payload"
        elif slot.sequence > sequence:
            why = f"the payload is gone, the slot has moved on to sequence {slot.sequence}"
        elif slot.over:
            why = "the payload is gone: consumed, overwritten, retired or aborted"
        elif slot.state is _WRITING:
            why = "the payload is not committed"
        else:
            why = f"reader {reader} has consumed the payload"
        return StaleSlotError(why, slot=slot.index, sequence=sequence)

    def _consume(self, slot: Slot, reader: int) -> None:
        slot.consumed_by |= 1 << reader
        if slot.consumed_by == self._all_readers:
            self._consumed += 1
            self._end(slot)
        else:
            _write_u64(self._memory, slot.header + CONSUMED_BY_OFFSET, slot.consumed_by)

    def _end(self, slot: Slot) -> None:
        """The payload's life is over: the slot is free now, or with its last lease."""
        slot.over = True
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
