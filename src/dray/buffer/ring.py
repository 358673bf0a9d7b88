"""`SharedRingBuffer`: payloads of one producer in shared memory, written once and leased to readers."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from dray.buffer.layout import PRODUCER_ID_BYTES, SegmentLayout, checked_int
from dray.buffer.lease import Lease, SlotWriter
from dray.buffer.policy import OnFull, Retain, check_policy
from dray.buffer.segment import Segment
from dray.buffer.slot_state import SlotState
from dray.buffer.slot_table import Copied, Slot, SlotTable, Wanted
from dray.buffer.statistics import ReadySlot, RingStatistics
from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    ConfigError,
    PayloadError,
    PayloadTooLargeError,
    SlotError,
    StaleSlotError,
)

logger = logging.getLogger("dray.buffer")


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
        self._memory: memoryview | None = self.segment.view
        self._table = SlotTable(
            layout, self.segment.view, readers=readers, newest_only=retain == "newest", clock=clock
        )
        self._clock = clock
        self._lock = threading.Lock()
        self._claimable = threading.Condition(self._lock)
        self._claimers = 0  # threads that wait on _claimable
        self._closed = False
        self._disowned = False
        _rings.add(self)

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
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if not self._table.free:
                self._wait_for_slot(timeout)
            slot = self._table.claim(nbytes)
            return SlotWriter(self, slot, nbytes)

    # --- reading ----------------------------------------------------------------------------------------------

    def read_raw(self, slot: int, sequence: int, reader: int = 0) -> Lease:
        """Lease a committed payload; others may be reading it already. End the lease in ``finally``.

        Raises:
            StaleSlotError: the payload is gone, or `reader` has consumed it.
            SlotError: there is no such slot or reader.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        with self._lock:
            if self._closed or not (0 <= slot < self.slots and 0 <= reader < self.readers):
                self._refuse(slot, reader)
            return Lease(self, self._table.lease(slot, sequence, reader), reader)

    def copy_many(self, wanted: Sequence[Wanted], most: int) -> list[Copied | PayloadError | SlotError]:
        """Committed payloads' bytes, without leases: for small ones, as the ring is locked meanwhile.

        Each (slot, sequence, reader) is answered by (bytes, checksum or None), or by the error that `read_raw`
        would raise; a payload of more than `most` bytes by `PayloadTooLargeError`. What was copied stays as it is
        until `consume`.

        Raises:
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        with self._lock:
            self._check_open()
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
        with self._lock:
            consumed = 0
            for slot, sequence, reader in wanted:
                if self._closed or not (0 <= slot < self.slots and 0 <= reader < self.readers):
                    self._refuse(slot, reader)
                consumed += self._table.consume(slot, sequence, reader)
                if self._claimers:
                    self._claimable.notify()
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
        with self._lock:
            cell = self._committed(slot, sequence)
            if cell.checksum is not None:
                return cell.checksum
            view = self._view(cell.offset, cell.nbytes).toreadonly()
        value = checked_int("checksum", compute(view), 0, (1 << 64) - 1)
        with self._lock:
            self._table.keep_checksum(self._committed(slot, sequence), value)
        return value

    # --- looking ----------------------------------------------------------------------------------------------

    def is_live(self, slot: int, sequence: int) -> bool:
        """Whether `slot` is WRITING, READY or READING under `sequence`: its bytes stand, even if consumed.

        Raises:
            SlotError: there is no such slot.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        with self._lock:
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
        deadline = Deadline.after(timeout, self._clock)
        with self._lock:
            while True:
                cell = self._find(slot)
                if cell.sequence < sequence:
                    raise self._table.stale_error(cell, sequence, 0)
                if cell.sequence > sequence or cell.over:
                    return True
                if not deadline.remaining > 0:
                    return False
                if cell.ended is None:
                    cell.ended = threading.Condition(self._lock)
                cell.ended.wait(min(deadline.remaining, threading.TIMEOUT_MAX))

    def get_ready_count(self) -> int:
        """How many slots are READY."""
        with self._lock:
            self._check_open()
            return self._table.ready

    def ready(self, *, leased: bool = False) -> list[ReadySlot]:
        """The READY payloads, oldest first; with `leased`, also those being read that are not consumed yet."""
        with self._lock:
            self._check_open()
            return self._table.waiting(leased=leased)

    def statistics(self) -> RingStatistics:
        """The ring at this moment."""
        with self._lock:
            self._check_open()
            return self._table.statistics()

    # --- life -------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """True after `close`, and in a child forked from the creator."""
        return self._closed

    def close(self) -> None:
        """Give the memory back and wake everybody who waits, with `BufferClosedError`. May be called twice.

        Views that are still in use stay valid; the memory goes with the last of them.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._claimable.notify_all()
                for cell in self._table.live.values():
                    cell.wake()
                self._forget_memory()
        self.segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._table.ready} ready, {len(self._table.free)} free"
        return f"<SharedRingBuffer {self.producer_id.hex()[:8]} {self.slots} x {self.slot_bytes} bytes, {state}>"

    # --- called by SlotWriter and Lease ------------------------------------------------------------------------

    def _commit(self, writer: SlotWriter, nbytes: int | None) -> None:
        with self._lock:
            self._check_writer(writer)
            if nbytes is None:
                nbytes = writer.nbytes
            elif nbytes.__class__ is not int or nbytes < 0:
                raise ConfigError("nbytes", nbytes, f"an integer from 0 to {writer.nbytes}")
            elif nbytes > writer.nbytes:
                raise PayloadTooLargeError(
                    f"a payload of {nbytes} bytes does not fit into the {writer.nbytes} bytes claimed",
                    slot=writer.slot,
                    sequence=writer.sequence,
                )
            self._table.commit(writer._cell, nbytes)
            writer.open = False
            if self._claimers:
                self._claimable.notify()

    def _abort(self, writer: SlotWriter) -> None:
        with self._lock:
            if self._disowned:
                raise self._closed_error()
            if self._closed:
                return
            if writer.open:
                writer.open = False
                self._table.abort(writer._cell)
                if self._claimers:
                    self._claimable.notify()
                return
            self._table.late_finalises += 1
        logger.warning("abort of %r ignored: it is finished already", writer)

    def _writer_view(self, writer: SlotWriter) -> memoryview:
        with self._lock:
            self._check_writer(writer)
            return self._view(writer._cell.offset, writer.nbytes)

    def _lease_view(self, lease: Lease) -> memoryview:
        with self._lock:
            self._check_open()
            if not lease.live:
                raise StaleSlotError("the lease has ended", slot=lease.slot, sequence=lease.sequence)
            return self._view(lease.offset, lease.nbytes).toreadonly()

    # --- with the lock held, if not said otherwise ---------------------------------------------------------------

    def _finish(self, lease: Lease, consumed: bool) -> bool:
        """End `lease`. Takes the lock itself."""
        with self._lock:
            if lease.live and lease._ring is self and not self._closed:
                lease.live = False
                self._table.finish(lease._cell, lease.reader, consumed)
                if self._claimers:
                    self._claimable.notify()
                return True
            if self._disowned:
                raise self._closed_error()
            if self._closed:
                return False
            self._table.late_finalises += 1
        why = "it has ended already" if lease._ring is self else "it belongs to another ring"
        logger.warning("end of %r ignored: %s", lease, why)
        return False

    def _wait_for_slot(self, timeout: float | None) -> None:
        """Return when a slot is free. A thread that comes later may be served first."""
        table = self._table
        overwrite = self.on_full == "overwrite"
        if overwrite and table.drop_oldest():
            return
        deadline = Deadline.after(0 if self.on_full == "error" else timeout, self._clock)
        waited = False
        self._claimers += 1
        try:
            while deadline.remaining > 0:
                waited = True
                self._claimable.wait(min(deadline.remaining, threading.TIMEOUT_MAX))
                if self._closed:
                    raise self._closed_error()
                if table.free or (overwrite and table.drop_oldest()):
                    return
            table.full_errors += 1
            count = ", ".join(f"{number} {state.name}" for state, number in table.count().items())
            raise BufferFullError(f"no slot became free: {count} of {self.slots} slots", elapsed=deadline.elapsed)
        except BaseException:
            # If this thread was woken for a slot, another takes it.
            self._claimable.notify()
            raise
        finally:
            self._claimers -= 1
            table.claim_waits += waited
            table.claim_wait_seconds += deadline.elapsed

    def _find(self, slot: int) -> Slot:
        if self._closed or not 0 <= slot < self.slots:
            self._refuse(slot, 0)
        return self._table.slots[slot]

    def _committed(self, slot: int, sequence: int) -> Slot:
        self._find(slot)
        return self._table.committed(slot, sequence)

    def _view(self, offset: int, nbytes: int) -> memoryview:
        assert self._memory is not None
        return self._memory[offset : offset + nbytes]

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _check_writer(self, writer: SlotWriter) -> None:
        self._check_open()
        if not writer.open:
            raise SlotError("the slot is committed or aborted already", slot=writer.slot, sequence=writer.sequence)

    def _refuse(self, slot: int, reader: int) -> None:
        self._check_open()
        if not 0 <= slot < self.slots:
            raise SlotError(f"the ring has slots 0 to {self.slots - 1}", slot=slot)
        raise SlotError(f"reader {reader} is not one of 0 to {self.readers - 1}", slot=slot)

    def _closed_error(self) -> BufferClosedError:
        if self._disowned:
            return BufferClosedError("the ring belongs to the process that this one was forked from")
        return BufferClosedError("the ring is closed")

    def _forget_memory(self) -> None:
        self._memory = None
        self._table.forget_memory()

    def _disown(self) -> None:
        """In a forked child: the memory is not there, and the lock may be held by a thread that is not either."""
        self._lock = threading.Lock()
        self._claimable = threading.Condition(self._lock)
        self._closed = self._disowned = True
        self._forget_memory()


_rings: weakref.WeakSet[SharedRingBuffer] = weakref.WeakSet()


def _disown_in_child() -> None:
    for ring in _rings:
        ring._disown()
    _rings.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_in_child)
