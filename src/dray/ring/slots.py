"""The slots of a ring, the payloads in them, and the lock that guards both.

`SlotTable` is all the state of a ring. Its `Slot` objects are authoritative; the slot headers in the segment are
copies for debuggers. The cost of an operation does not depend on the number of slots: free slots wait in a queue,
the others are kept in the order of their sequence numbers. A refused operation changes only counters.

A signal handler may raise an exception between any two bytecodes. Therefore every operation that moves a slot runs
between `begin_change` and ``changing = False``. An operation that finds `changing` set calls `mend`, which
completes the interrupted one: everything follows from the states of the slots.

With direct consumers (`dray.ring.direct`) the table learns late what they hold and have consumed: `begin_scan` and
`end_scan`, with a barrier in between, bring it up to date. Until then a retired slot is `due`, and stays READING.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from dray.clock import Clock, Deadline
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    PayloadError,
    PayloadTooLargeError,
    SlotError,
)
from dray.identifiers import Wanted
from dray.ring.direct import RESCAN_SECONDS, DirectLeases, Machine
from dray.ring.free_slots import Room, free_slots
from dray.ring.layout import (
    CHECKSUM_OFFSET,
    CONSUMED_BY_OFFSET,
    FLAGS_OFFSET,
    HAS_CHECKSUM,
    STATE_OFFSET,
    U64,
    write_slot_header,
)
from dray.ring.records import OnFull, Retain, RingStatistics, Scan, Slot
from dray.ring.segment import Segment
from dray.ring.slot_state import SlotEvent, SlotState, after

Copied: TypeAlias = tuple[bytes, int | None]
"""The bytes of a payload, and its checksum if one is known."""

_FREE, _WRITING, _READY, _READING = SlotState
_CLAIM, _COMMIT, _ABORT, _LEASE, _RETURN, _END = SlotEvent
_write_u64: Final = U64.pack_into


class SlotTable:
    """The slots of one ring. `SharedRingBuffer` explains the arguments.

    The caller holds `lock` for everything below, with these exceptions: `close` takes the lock, `closed` and
    `disowned` may be read without it, and the garbage collector adds to `lost` in any thread.
    """

    def __init__(
        self, segment: Segment, machine: Machine, clock: Clock,
        *, readers: int, on_full: OnFull, retain: Retain, parts: int, capacity_bytes: int | None = None,
    ) -> None:  # fmt: skip
        layout = segment.layout
        self._machine = machine
        self.lock = machine.lock()
        self.slots = [Slot(i, layout.header_offset(i), layout.slot_offset(i)) for i in range(layout.slots)]
        self._on_full, self._retain, self._newest_only = on_full, retain, retain == "newest"
        self.room, self.free = Room(capacity_bytes), free_slots(self.slots, parts, capacity_bytes, retain)
        self.live: OrderedDict[int, Slot] = OrderedDict()  # the other slots, by sequence number
        self.ready = self.leases = self.double_releases = 0
        self.direct: DirectLeases | None = None  # from the first direct consumer on
        self.due: dict[Slot, int] = {}  # retired; direct leases on these payloads are not ruled out
        self.changing = False  # an operation that moves a slot has begun and has not ended
        self.lost: deque[object] = deque()  # of writers that were deleted while their slots were WRITING
        self.closed = self.disowned = False  # both are true in a forked child, the first also after `close`
        self.clock, self._now = clock, clock.now
        self._claimable = machine.condition(self.lock)
        self._claimers = self.notified = 0  # threads that wait on `_claimable`; how often it was notified
        self._slot_bytes, self._memory = layout.slot_bytes, segment.view
        self._newest: list[Slot | None] = [None] * parts
        self._readers = readers
        self._all_readers = (1 << readers) - 1
        self._short = self._enough = max(1, layout.slots // 4)  # with fewer free slots, those due are checked
        self._worded: set[Slot] = set()  # those with `words`
        self._claimed = self._committed = self._committed_bytes = self._aborted = self._servers = 0
        self._leased = self._copied = self._consumed = self._stale_reads = self._stale_consumes = 0
        self._dropped_unread = self._dropped_delivered = self._replaced = 0
        self._claim_waits = self._full_errors = self._late_looks = 0
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
            elif slot.consumed_by == self._all_readers or (self._newest_only and slot not in self._newest):
                slot.retired = True
            if slot.state is _FREE or (slot.retired and not slot.leases and not self._attached):
                slot.state, slot.retired, slot.writer = _FREE, True, None
            elif slot.state is not _WRITING:
                if slot.retired and not slot.leases:
                    self.due[slot] = slot.sequence
                slot.state = _READING if slot.leases or slot.words or slot in self.due else _READY
            if slot.retired:
                slot.wake()
            if slot.sequence >= 0:
                slot.mend_header(self._memory)
            self._publish(slot)
        self.due = {slot: slot.sequence for slot in self.due if slot.state is _READING}
        free = dict.fromkeys(slot for slot in (*self.free, *self.slots) if slot.state is _FREE)
        live = sorted((slot for slot in self.slots if slot not in free), key=lambda slot: slot.sequence)
        self.free = free_slots(free, len(self._newest), self.room.capacity, self._retain)
        self.room.used = sum(slot.nbytes for slot in live)
        self.live = OrderedDict((slot.sequence, slot) for slot in live)
        self.ready = sum(slot.state is _READY for slot in live)
        self.leases = sum(slot.leases for slot in live)
        self._newest = [None if slot is None or slot.retired else slot for slot in self._newest]
        self._claimed = max(self._claimed, 1 + max(slot.sequence for slot in self.slots))
        self._aborted = self._claimed - self._committed - sum(slot.state is _WRITING for slot in live)
        # What the interrupted change retired and did not count, counts as dropped.
        kept = sum(slot.state is not _WRITING and not slot.retired for slot in live)
        self._dropped_unread = self._committed - self._consumed - self._dropped_delivered - self._replaced - kept
        self._claimable.notify_all()
        self.changing = False

    def can_claim(self, part: int, nbytes: int) -> bool:
        """A slot is free, and there is no reason to search for more first."""
        enough = len(self.free) >= (1 if self.direct is None else self._enough)
        return enough and self.room.is_ready(part, nbytes, self.free, self.direct is not None)

    def find_free(self, part: int, nbytes: int) -> bool:
        """A slot is free, perhaps because the oldest payload was dropped."""
        self._enough = min(self._short, max(1, len(self.free) // 2))
        if not self.free and self._on_full == "overwrite" and not self._attached:
            self._drop_oldest()
        return self.room.note_scan(nbytes) and self.free.has(part)

    def check_time(self, deadline: Deadline) -> None:
        """Return if a claim may wait for a slot.

        Raises:
            BufferFullError: the deadline has passed, or claims do not wait.
        """
        if self._on_full != "error" and deadline.remaining > 0:
            return
        self._full_errors += 1
        count = ", ".join(f"{number} {state.name}" for state, number in self._count().items())
        failed = "" if self.direct is None else self.direct.barriers.error
        why = f"; membarrier has failed: {failed}" if failed else ""
        raise BufferFullError(
            f"no slot became free: {count} of {len(self.slots)} slots{self.room}{why}", elapsed=deadline.elapsed
        )

    def wait_for_slot(self, deadline: Deadline) -> None:
        """Wait until a slot may be free. Another thread may get it first, and then there is more to wait."""
        self._claimers += 1
        try:
            self._wait(self._claimable, deadline.remaining)
        finally:
            self._claimers -= 1

    def count_wait(self, seconds: float) -> None:
        """Count a claim that has waited."""
        self._claim_waits, self._claim_wait_seconds = self._claim_waits + 1, self._claim_wait_seconds + seconds

    def notify_claims(self) -> None:
        """What a claim waits for may have happened: one that waits, or is about to wait, checks again."""
        self.notified += 1
        if self._claimers:
            self._claimable.notify_all()

    def wait_retired(self, slot: Slot, deadline: Deadline) -> None:
        """Wait until the payload in a slot may have retired."""
        slot.retirement = slot.retirement or self._machine.condition(self.lock)
        self._wait(slot.retirement, deadline.remaining)

    def _wait(self, condition: threading.Condition, seconds: float) -> None:
        if not self._attached:
            condition.wait(min(seconds, threading.TIMEOUT_MAX))
        elif not condition.wait(min(seconds, RESCAN_SECONDS)):
            # What the doorbell should have reported is found now.
            before = self.notified, self._consumed
            self.begin_scan()
            self._late_looks += (self.notified, self._consumed) != before

    def claim(self, nbytes: int, part: int) -> Slot:
        """FREE → WRITING for a free slot of `part`; there must be one.

        The caller sets `changing` before, and clears it when the slot refers to its writer.
        """
        slot = self.free.pop_for(nbytes, part)
        self.room.claim(slot, nbytes)
        slot.state = after(slot.state, _CLAIM)
        slot.sequence = sequence = self._claimed
        self._claimed = sequence + 1
        slot.checksum = None
        slot.consumed_by = 0
        slot.delivered = slot.retired = False
        slot.scan = None
        self.live[sequence] = slot
        write_slot_header(self._memory, slot.header, _WRITING, 0, sequence, nbytes, 0, 0.0, 0)
        return slot

    def commit(self, slot: Slot, nbytes: int) -> None:
        """WRITING → READY with `nbytes` bytes; with ``retain="newest"``, the one of its part before it retires."""
        slot.committed_at = now = self._now()
        slot.state = after(slot.state, _COMMIT)
        self.room.used += nbytes - slot.nbytes
        slot.nbytes = nbytes
        slot.writer = None
        self.ready += 1
        self._committed += 1
        self._committed_bytes += nbytes
        write_slot_header(self._memory, slot.header, _READY, 0, slot.sequence, nbytes, 0, now, 0)
        if self.direct is not None:
            self.direct.publish(slot.index, slot.sequence)
        if self._newest_only:
            part = slot.index % len(self._newest)
            if (before := self._newest[part]) is not None:
                self._retire(before)
                self._replaced += 1
            self._newest[part] = slot
        self.changing = False
        self.notify_claims()

    def give_back(self, slot: Slot) -> None:
        """End a claim, or a committed payload whose reference has not been given out."""
        slot.writer = None
        if slot.state is _WRITING:
            self._set_free(slot, _ABORT)
            self._aborted += 1
            slot.retired = True
            slot.wake()
        else:
            self._newest = [None if each is slot else each for each in self._newest]
            self._retire(slot)
            self._dropped_unread += 1
        self.changing = False
        self.notify_claims()

    def end_lease(self, slot: Slot, reader: int, consumed: bool) -> None:
        """End one lease of `reader`, which has `consumed` the payload or not."""
        slot.leases -= 1
        self.leases -= 1
        if consumed and not slot.retired and not self._newest_only:
            self._consume(slot, reader)
        if slot.leases == 0 and slot.state is _READING:
            if slot.retired:
                self._vacate(slot)
            else:
                self._refresh(slot)
        self.changing = False
        self.notify_claims()

    def consume(self, index: int, sequence: int, reader: int) -> bool:
        """Mark a payload consumed by `reader`, leased or not; false when it is stale for that reader."""
        slot = self.slots[index]
        stale = self.is_stale(slot, sequence, reader)
        if stale:
            self._stale_consumes += 1
        elif not self._newest_only:
            self._consume(slot, reader)
        self.changing = False
        self.notify_claims()
        return not stale

    def close(self) -> None:
        """Wake all waiting threads, and release the memory. Takes the lock. Again, it does what was left."""
        with self.lock:
            if self.disowned:
                return
            self.closed = True
            self._claimable.notify_all()
            for slot in self.live.values():
                slot.wake()
            if self.direct is not None:
                self.direct.close()
                self.direct = None
            self._memory = memoryview(b"")

    def lease(self, index: int, sequence: int, reader: int) -> Slot:
        """READY or READING → READING, with one lease more. Raises `StaleSlotError`."""
        slot = self.slots[index]
        if self.is_stale(slot, sequence, reader):
            self._stale_reads += 1
            raise slot.stale_error(sequence, reader)
        slot.leases += 1
        slot.delivered = True
        if slot.state is _READY:
            self._refresh(slot)
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
            if self.is_stale(slot, sequence, reader):
                self._stale_reads += 1
                found.append(slot.stale_error(sequence, reader))
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
            raise slot.stale_error(sequence, 0)
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
            slots=len(self.slots), slot_bytes=self._slot_bytes, claimed=self._claimed, aborted=self._aborted,
            free=count[_FREE], writing=count[_WRITING], ready=count[_READY], reading=count[_READING],
            leases=self.leases + sum(slot.words for slot in self._worded),
            committed=self._committed, committed_bytes=self._committed_bytes,
            leased=self._leased, copied=self._copied, consumed=self._consumed, retired=self._replaced,
            dropped_unread=self._dropped_unread, dropped_delivered=self._dropped_delivered,
            stale_reads=self._stale_reads, stale_consumes=self._stale_consumes,
            double_releases=self.double_releases, full_errors=self._full_errors, late_looks=self._late_looks,
            claim_waits=self._claim_waits, claim_wait_seconds=self._claim_wait_seconds,
            oldest_ready_age=next(ready, None) if count[_READY] else None,
            oldest_lease_age=max(itertools.islice(reading, count[_READING]), default=None),
            **({} if self.direct is None else self.direct.statistics()),
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

    def _count(self) -> dict[SlotState, int]:
        writing = self._claimed - self._committed - self._aborted
        reading = len(self.live) - writing - self.ready
        return {_FREE: len(self.free), _WRITING: writing, _READY: self.ready, _READING: reading}

    def _drop_oldest(self) -> None:
        """Free the oldest READY payload, if there is one. Walks past older ones that are in use."""
        if self.ready:
            slot = next(slot for slot in self.live.values() if slot.state is _READY)
            self._learn(slot, range(self._readers))  # from consumers that ended after the board was read
            if not slot.retired:
                self._drop(slot)

    def _drop(self, slot: Slot) -> None:
        self.changing = True
        self._retire(slot)
        self._dropped_delivered += slot.delivered
        self._dropped_unread += not slot.delivered
        self.changing = False

    def _consume(self, slot: Slot, reader: int) -> None:
        slot.consumed_by |= 1 << reader
        if self.direct is not None:
            self.direct.mark_consumed(slot.index, slot.sequence, reader)
        if slot.consumed_by == self._all_readers:
            self._consumed += 1
            self._retire(slot)
        else:
            _write_u64(self._memory, slot.header + CONSUMED_BY_OFFSET, slot.consumed_by)

    def _retire(self, slot: Slot) -> None:
        """Refuse new leases; the slot is free now, or with its last lease."""
        slot.retired = True
        if self.direct is not None:
            self.direct.retire(slot.index)
        slot.wake()
        if slot.leases == 0:
            self._vacate(slot)

    def _vacate(self, slot: Slot) -> None:
        """Free a retired slot without leases over connections, or keep it until direct leases are ruled out."""
        if self._attached:
            self.due[slot] = slot.sequence
            self._refresh(slot)
        else:
            if slot.state is _READY:
                self.ready -= 1
            self._set_free(slot, _END)

    def _refresh(self, slot: Slot) -> None:
        """Bring the state of a READY or READING slot in line with its leases."""
        used = slot.leases or slot.words or slot in self.due
        if used and slot.state is _READY:
            slot.state = after(slot.state, _LEASE)
            self.ready -= 1
            slot.leased_at = self._now()
        elif not used and slot.state is _READING:
            slot.state = after(slot.state, _RETURN)
            self.ready += 1
            self.notify_claims()
        self._memory[slot.header + STATE_OFFSET] = slot.state

    def is_stale(self, slot: Slot, sequence: int, reader: int) -> bool:
        """A reader cannot read or consume a payload (any more)."""
        if slot.sequence != sequence or slot.retired or slot.state is _WRITING:
            return True
        if self.direct is not None and not slot.consumed_by >> reader & 1:
            self._learn(slot, (reader,))
        return slot.retired or bool(slot.consumed_by >> reader & 1)

    def _set_free(self, slot: Slot, event: SlotEvent) -> None:
        slot.state = after(slot.state, event)
        self._memory[slot.header + STATE_OFFSET] = _FREE
        del self.live[slot.sequence]
        self.room.used -= slot.nbytes
        self.free.append(slot)

    # --- direct consumers -------------------------------------------------------------------------------------

    @property
    def _attached(self) -> bool:
        return self.direct is not None and bool(self.direct.attached)

    def serve_directly(self) -> DirectLeases:
        """Share the words that direct leases need, from now on."""
        if self.direct is None:
            direct = DirectLeases(len(self.slots), self._readers, self.clock, self._machine)
            for slot in self.live.values():
                slot.wake()  # waiters wait for the doorbell from now on
                if slot.state is not _WRITING and not slot.retired:
                    direct.publish(slot.index, slot.sequence)
                for reader in range(self._readers):
                    if slot.consumed_by >> reader & 1:
                        direct.mark_consumed(slot.index, slot.sequence, reader)
            self.direct = direct
            self._claimable.notify_all()
        return self.direct

    def count_servers(self, change: int) -> None:
        """A server begins or ends; without one, direct consumers lease nothing any more."""
        self._servers += change
        if self.direct is not None and self.direct.suspended is (self._servers > 0):
            self.direct.suspended = not self._servers
            for slot in self.live.values():
                self._publish(slot)

    def begin_scan(self, *, drop: bool = False) -> Scan:
        """Learn what direct consumers have consumed and hold, and which slots only a barrier can free.

        With `drop`, if no slot is free, the oldest payload on which no lease was found is among them.
        """
        direct, before = self.direct, (self._attached, len(self.free))
        victim = None
        if direct is not None:
            direct.take_events()
            if not self._newest_only:
                for index, reader in direct.consumed():
                    self._learn(self.slots[index], (reader,))
            self._note_words(direct.named())
            if not direct.attached:
                self._free_due(self.due.items(), {})
            elif drop and not self.free:
                ready = (each for each in self.live.values() if each.state is _READY and not each.undecided)
                victim = next(ready, None) if self.ready else None
        if (self._attached, len(self.free)) != before:
            self.notify_claims()
        scan = Scan(tuple(self.due.items()), victim, -1 if victim is None else victim.sequence)
        if direct is not None and victim is not None:
            victim.scan = weakref.ref(scan)
            direct.suspect(victim.index, victim.sequence)
        return scan

    def end_scan(self, scan: Scan, passed: bool) -> None:
        """Free what `begin_scan` has returned and no lease word names, if a barrier has `passed` since then."""
        direct, victim = self.direct, scan.victim
        if direct is None:
            return
        named = direct.named()
        if passed:
            self._free_due(scan.due, named)
        if victim is not None and victim.sequence == scan.sequence:
            victim.scan = None
            self._learn(victim, range(self._readers))
            if not victim.retired:
                if passed and not self.free and victim.state is _READY and victim.index not in named:
                    self._drop(victim)
                    self._free_due(((victim, victim.sequence),), named)
                else:
                    direct.publish(victim.index, victim.sequence)
                    self.notified += passed  # another payload may have no lease
        self._note_words(named)
        if self.free or not self._attached:
            self.notify_claims()

    def _free_due(self, payloads: Iterable[tuple[Slot, int]], named: Mapping[int, int]) -> None:
        # A slot may be due again, with another payload that was retired after the barrier: that needs its own.
        for slot, sequence in tuple(payloads):
            if self.due.get(slot) == sequence and slot.index not in named:
                self.changing = True
                del self.due[slot]
                slot.words = 0
                self._set_free(slot, _END)
                self.changing = False

    def _note_words(self, named: Mapping[int, int]) -> None:
        found = {self.slots[index] for index in named}
        for slot in found | self._worded:
            used = slot.state is _READY or slot.state is _READING  # else the consumer will find it to be stale
            words = named.get(slot.index, 0) if used else 0
            if words != slot.words:
                slot.words = words
                slot.delivered = slot.delivered or words > 0
                if used:
                    self._refresh(slot)
        self._worded = found

    def _learn(self, slot: Slot, readers: Iterable[int]) -> None:
        """Count what readers have consumed according to the board."""
        direct = self.direct
        if direct is None or self._newest_only:
            return
        for reader in readers:
            if slot.retired or slot.state is _WRITING:
                return
            if not slot.consumed_by >> reader & 1 and direct.has_consumed(slot.index, slot.sequence, reader):
                self.changing = True
                slot.delivered = True
                self._consume(slot, reader)
                self.changing = False

    def _publish(self, slot: Slot) -> None:
        """Write the generation that follows from the state of a slot, unless it is undecided."""
        if self.direct is None or slot.undecided:
            return
        if slot.retired or slot.state is _FREE or slot.state is _WRITING:
            self.direct.retire(slot.index)
        else:
            self.direct.publish(slot.index, slot.sequence)

    def disown(self) -> None:
        """In a forked child: the memory is not mapped, and a thread that does not exist may hold the lock."""
        self.lock = threading.Lock()
        self._claimable = threading.Condition(self.lock)
        self.closed = self.disowned = True
        self.direct = None
        self._memory = memoryview(b"")


_tables: weakref.WeakSet[SlotTable] = weakref.WeakSet()


def _disown_in_child() -> None:
    for table in _tables:
        table.disown()
    _tables.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_in_child)
