"""`SharedRingBuffer`: payloads of one producer in shared memory, written once and leased to readers."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import ConfigError, PayloadError, PayloadTooLargeError, SlotError
from dray.ring.core import RingCore
from dray.ring.layout import PRODUCER_ID_BYTES, SegmentLayout, checked_int
from dray.ring.lease import Lease, SlotWriter
from dray.ring.policy import OnFull, Retain, check_policy
from dray.ring.segment import Segment
from dray.ring.slot_state import SlotState
from dray.ring.slots import Copied, Slot, SlotTable, Wanted
from dray.ring.statistics import ReadySlot, RingStatistics

logger = logging.getLogger("dray.ring")


class SharedRingBuffer:
    """A ring of fixed-capacity slots in shared memory. Thread-safe; a context manager.

    Args:
        slots: number of slots, 1 … 1,048,576.
        slot_bytes: capacity of a slot in bytes.
        on_full: what `claim` does when no slot is free. ``"block"`` waits; ``"error"`` raises at once;
            ``"overwrite"`` drops the oldest payload that nobody is reading, and waits if there is none.
        readers: how many readers, with ids 0 … readers - 1, each payload is meant for (at most 64). It is consumed
            when all of them have consumed it.
        retain: ``"unread"`` keeps each payload until it is consumed. ``"newest"`` keeps the payload committed
            last: leases do not consume, and a commit retires the one before it, at once or with its last lease.
            That needs as many slots as there are concurrent readers, plus two; at least two. It excludes
            ``"overwrite"``.
        clock: where deadlines and ages come from.
        prefault: reserve all of the memory now instead of at the first write to each page.

    Attributes:
        producer_id: 16 random bytes that name this ring.
        segment: its memory.
        slots, slot_bytes, on_full, readers, retain: as given.

    Raises:
        ConfigError: an argument is not allowed, or the system cannot give that memory.
        OutOfResources: no descriptor is left for the memory.
    """

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        *,
        on_full: OnFull = "block",
        readers: int = 1,
        retain: Retain = "unread",
        clock: Clock = MONOTONIC,
        prefault: bool = False,
    ) -> None:
        layout = SegmentLayout(slots, slot_bytes)
        check_policy(slots, on_full, readers, retain)
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.on_full = on_full
        self.readers = readers
        self.retain = retain
        self.producer_id = os.urandom(PRODUCER_ID_BYTES)
        self.segment = Segment.create(layout, self.producer_id, prefault=prefault)
        self._table = SlotTable(
            layout, self.segment.view, readers=readers, newest_only=retain == "newest", clock=clock
        )
        self._core = RingCore(self.segment, self._table, on_full, clock)

    # --- writing ----------------------------------------------------------------------------------------------

    def claim(self, nbytes: int, timeout: float | None = None) -> SlotWriter:
        """Take a free slot for a payload of `nbytes` bytes.

        Args:
            nbytes: 0 … `slot_bytes`.
            timeout: seconds to wait for a free slot; ``None`` waits until there is one or the ring is closed.

        Raises:
            PayloadTooLargeError: a slot is smaller; nothing is claimed.
            BufferFullError: no slot became free in time, or at once with ``on_full="error"``.
            BufferClosedError: the ring is closed, was closed while waiting, or belongs to the parent process.
        """
        if nbytes.__class__ is not int or nbytes < 0:
            raise ConfigError("nbytes", nbytes, f"an integer from 0 to {self.slot_bytes}")
        if nbytes > self.slot_bytes:
            raise PayloadTooLargeError(
                f"a payload of {nbytes} bytes does not fit into {self.slot_bytes}-byte slots"
            )
        core = self._core
        with core.lock:
            if core.closed:
                raise core.closed_error()
            core.mend()
            if not self._table.free:
                core.wait_for_slot(timeout)
            core.begin_change()
            cell = self._table.claim(nbytes)
            writer = SlotWriter(core, cell, nbytes)
            cell.writer = weakref.ref(writer, core.lost.append)
            self._table.changing = False
            return writer

    # --- reading ----------------------------------------------------------------------------------------------

    def read_raw(self, slot: int, sequence: int, reader: int = 0) -> Lease:
        """Lease a committed payload; others may be reading it already. End the lease in ``finally``.

        Raises:
            StaleSlotError: the payload is gone, or `reader` has consumed it.
            SlotError: there is no such slot or reader.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        core = self._core
        with core.lock:
            if core.closed or not (0 <= slot < self.slots and 0 <= reader < self.readers):
                self._refuse(slot, reader)
            return Lease(core, self._table.lease(slot, sequence, reader), reader)

    def copy_many(self, wanted: Sequence[Wanted], most: int) -> list[Copied | PayloadError | SlotError]:
        """Committed payloads' bytes, without leases: for small ones, as the ring is locked meanwhile.

        Each (slot, sequence, reader) is answered by (bytes, checksum or None), or by the error that `read_raw`
        would raise; a payload of more than `most` bytes by `PayloadTooLargeError`. What was copied stays as it is
        until `consume`.

        Raises:
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        core = self._core
        with core.lock:
            core.check_open()
            return self._table.copy_many(wanted, most)

    def mark_consumed(self, lease: Lease) -> bool:
        """End `lease`; its reader has what it needs (with ``retain="newest"``, only end it).

        Returns whether this ended the lease. One that has ended, or belongs to another ring, changes nothing: that
        is logged and counted. After `close` it is a silent no-op.

        Raises:
            BufferClosedError: the ring belongs to the parent of this process.
        """
        return self._finish(lease, True)

    def release_reading(self, lease: Lease) -> bool:
        """End `lease` without consuming: the payload can be read again. Otherwise like `mark_consumed`."""
        return self._finish(lease, False)

    def consume(self, slot: int, sequence: int, reader: int = 0) -> bool:
        """Mark a payload consumed by `reader` without reading it; leases on it stay valid until they end.

        Returns false, and counts it, when the payload is gone or `reader` has consumed it. With
        ``retain="newest"`` nothing is consumed: the result only says whether the payload can still be read.

        Raises:
            SlotError: there is no such slot or reader.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        return self.consume_many(((slot, sequence, reader),)) == 1

    def consume_many(self, wanted: Iterable[Wanted]) -> int:
        """`consume` for each (slot, sequence, reader); how many payloads were still there for their reader.

        Raises:
            As `consume`; what stands before the culprit is consumed.
        """
        core = self._core
        with core.lock:
            consumed = 0
            for slot, sequence, reader in wanted:
                if core.closed or not (0 <= slot < self.slots and 0 <= reader < self.readers):
                    self._refuse(slot, reader)
                core.begin_change()
                consumed += self._table.consume(slot, sequence, reader)
                self._table.changing = False
                if core.claimers:
                    core.claimable.notify()
            return consumed

    def checksum(self, slot: int, sequence: int, compute: Callable[[memoryview], int]) -> int:
        """The checksum of a committed payload: `compute` of its bytes, kept from the first call on.

        `compute` returns an unsigned 64-bit integer. It runs outside the ring's lock; calls that meet may each run
        it.

        Raises:
            StaleSlotError: the payload is gone, perhaps while `compute` ran.
            SlotError: there is no such slot.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        core = self._core
        with core.lock:
            cell = self._committed(slot, sequence)
            if cell.checksum is not None:
                return cell.checksum
            view = core.view(cell.offset, cell.nbytes).toreadonly()
        value = checked_int("checksum", compute(view), 0, (1 << 64) - 1)
        with core.lock:
            self._table.keep_checksum(self._committed(slot, sequence), value)
        return value

    # --- looking ----------------------------------------------------------------------------------------------

    def is_live(self, slot: int, sequence: int) -> bool:
        """Whether `slot` is WRITING, READY or READING under `sequence`: its bytes stand, even if consumed.

        Raises:
            SlotError: there is no such slot.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        with self._core.lock:
            cell = self._find(slot)
            return cell.sequence == sequence and cell.state is not SlotState.FREE

    def wait_consumed(self, slot: int, sequence: int, timeout: float | None = None) -> bool:
        """Wait until the payload's life is over: consumed by all its readers, overwritten, retired or aborted.

        Returns false when `timeout` seconds pass before that; ``None`` waits without a bound.

        Raises:
            StaleSlotError: the slot never held that sequence.
            SlotError: there is no such slot.
            BufferClosedError: the ring is closed, was closed while waiting, or belongs to the parent process.
        """
        core = self._core
        deadline = Deadline.after(timeout, core.clock)
        with core.lock:
            while True:
                cell = self._find(slot)
                if cell.sequence < sequence:
                    raise self._table.stale_error(cell, sequence, 0)
                if cell.sequence > sequence or cell.over:
                    return True
                if not deadline.remaining > 0:
                    return False
                if cell.ended is None:
                    cell.ended = threading.Condition(core.lock)
                cell.ended.wait(min(deadline.remaining, threading.TIMEOUT_MAX))

    def get_ready_count(self) -> int:
        """How many slots are READY."""
        with self._core.lock:
            self._core.check_open()
            self._core.mend()
            return self._table.ready

    def ready(self, *, leased: bool = False) -> list[ReadySlot]:
        """The READY payloads, oldest first; with `leased`, also those being read that are not consumed yet."""
        with self._core.lock:
            self._core.check_open()
            self._core.mend()
            return self._table.waiting(leased=leased)

    def statistics(self) -> RingStatistics:
        """The ring at this moment."""
        with self._core.lock:
            self._core.check_open()
            self._core.mend()
            return self._table.statistics()

    # --- life -------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """True after `close`, and in a child forked from the creator."""
        return self._core.closed

    def close(self) -> None:
        """Give the memory back and wake everybody who waits, with `BufferClosedError`. May be called twice.

        Views that are still in use stay valid; the memory goes with the last of them.
        """
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._core.closed else f"{self._table.ready} ready, {len(self._table.free)} free"
        return f"<SharedRingBuffer {self.producer_id.hex()[:8]} {self.slots} x {self.slot_bytes} bytes, {state}>"

    # --- with the lock held, if not said otherwise ---------------------------------------------------------------

    def _finish(self, lease: Lease, consumed: bool) -> bool:
        """End `lease`. Takes the lock itself."""
        core = self._core
        with core.lock:
            if lease.live and lease._core is core and not core.closed:
                core.begin_change()
                lease.live = False
                self._table.finish(lease._cell, lease.reader, consumed)
                self._table.changing = False
                if core.claimers:
                    core.claimable.notify()
                return True
            if core.disowned:
                raise core.closed_error()
            if core.closed:
                return False
            self._table.late_finalises += 1
        why = "it has ended already" if lease._core is core else "it belongs to another ring"
        logger.warning("end of %r ignored: %s", lease, why)
        return False

    def _find(self, slot: int) -> Slot:
        if self._core.closed or not 0 <= slot < self.slots:
            self._refuse(slot, 0)
        return self._table.slots[slot]

    def _committed(self, slot: int, sequence: int) -> Slot:
        self._find(slot)
        return self._table.committed(slot, sequence)

    def _refuse(self, slot: int, reader: int) -> None:
        self._core.check_open()
        if not 0 <= slot < self.slots:
            raise SlotError(f"the ring has slots 0 to {self.slots - 1}", slot=slot)
        raise SlotError(f"reader {reader} is not one of 0 to {self.readers - 1}", slot=slot)
