"""`SharedRingBuffer`: payloads of one producer in shared memory, written once and leased to readers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import get_args

import numpy as np
import numpy.typing as npt

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import ConfigError, PayloadError, PayloadTooLargeError, SlotError
from dray.identifiers import MAX_READERS, PRODUCER_ID_BYTES, Wanted
from dray.resources import Closing
from dray.ring.consumer_events import Descriptor
from dray.ring.direct import MACHINE, MAX_BOARD_WORDS, Attached, DirectLeases, Machine, WordLease, direct_problem
from dray.ring.layout import SegmentLayout, checked_int
from dray.ring.lease import Lease, SlotWriter
from dray.ring.records import OnFull, Retain, RingStatistics, Scan, SlotInfo
from dray.ring.segment import Segment
from dray.ring.slot_state import SlotState
from dray.ring.slots import Copied, SlotTable


class SharedRingBuffer(Closing):
    """A ring of slots of one capacity in shared memory. Thread-safe; a context manager.

    Once the ring is closed, and in a child forked from its creator, all methods except `close` raise
    `BufferClosedError`, also those that were waiting.

    Args:
        slots: number of slots, 1 … 1,048,576.
        slot_bytes: capacity of a slot in bytes.
        on_full: what `claim` does without a free slot. ``"block"`` waits; ``"error"`` raises at once;
            ``"overwrite"`` drops the oldest payload that is not leased, and waits if there is none.
        readers: number of readers, at most 64. Their ids are 0 … `readers` - 1. A payload is consumed when all
            readers have consumed it.
        retain: ``"unread"`` keeps each payload until it is consumed. ``"newest"`` keeps only the payload committed
            last: leases do not consume, and a commit retires the payload before it. That needs as many slots as
            there are concurrent leases, plus two, and excludes ``"overwrite"``.
        parts: with ``retain="newest"``, kinds of payload that are kept side by side, such as a value and what has
            changed in it: each has the slots whose index modulo `parts` is its number, and a newest payload.
        clock: the source of deadlines and ages.
        prefault: reserve all of the memory now instead of at the first write to each page.
        capacity_bytes: bytes that all payloads together may have; a claim above it waits. With it, slots that had
            payloads of a similar size before are used first, so that there can be far more slots than payloads.
            It excludes ``"overwrite"`` and ``retain="newest"``.
        machine: where locks, and what is shared with direct consumers, come from.

    Attributes:
        producer_id: 16 random bytes that name this ring.
        segment: its memory.
        slots, slot_bytes, on_full, readers, retain, parts, capacity_bytes, machine: as given.

    Raises:
        ConfigError: an argument is not allowed, or the system cannot provide that much memory.
        OutOfResources: the process has no file descriptor left.
    """

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        *,
        on_full: OnFull = "block",
        readers: int = 1,
        retain: Retain = "unread",
        parts: int = 1,
        clock: Clock = MONOTONIC,
        prefault: bool = False,
        capacity_bytes: int | None = None,
        machine: Machine = MACHINE,
    ) -> None:
        layout = SegmentLayout(slots, slot_bytes)
        _check_policy(slots=slots, on_full=on_full, readers=readers, retain=retain, parts=parts)
        if capacity_bytes is not None:
            checked_int("capacity_bytes", capacity_bytes, slot_bytes, slots * slot_bytes)
            if on_full == "overwrite" or retain == "newest":
                raise ConfigError("capacity_bytes", capacity_bytes, 'None with "overwrite" or retain = "newest"')
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.on_full = on_full
        self.readers = readers
        self.retain = retain
        self.parts = parts
        self.capacity_bytes = capacity_bytes
        self.machine = machine
        self.producer_id = os.urandom(PRODUCER_ID_BYTES)
        self.segment = Segment.create(layout, self.producer_id, prefault=prefault)
        self._table = SlotTable(
            self.segment, machine, clock, readers=readers, on_full=on_full, retain=retain, parts=parts,
            capacity_bytes=capacity_bytes,
        )  # fmt: skip

    def claim(self, nbytes: int, timeout: float | None = 30.0, *, part: int = 0) -> SlotWriter:
        """Take a free slot for a payload of `nbytes` bytes.

        Args:
            nbytes: 0 … `slot_bytes`.
            timeout: seconds to wait for a free slot; ``None`` for no limit.
            part: the kind of payload.

        Raises:
            PayloadTooLargeError: a slot is smaller; nothing is claimed.
            BufferFullError: no slot became free in time, or at once with ``on_full="error"``.
        """
        if nbytes.__class__ is not int or nbytes < 0:
            raise ConfigError("nbytes", nbytes, f"an integer from 0 to {self.slot_bytes}")
        if nbytes > self.slot_bytes:
            raise PayloadTooLargeError(
                f"a payload of {nbytes} bytes does not fit into {self.slot_bytes}-byte slots"
            )
        if part.__class__ is not int or not 0 <= part < self.parts:
            raise ConfigError("part", part, f"an integer from 0 to {self.parts - 1}")
        table = self._table
        with table.lock:
            if table.closed:
                table.check_open()
            if table.lost or table.changing:
                table.mend()
            if table.can_claim(part, nbytes):
                return self._take_locked(nbytes, part)
        return self._claim_later(nbytes, part, timeout)

    def _take_locked(self, nbytes: int, part: int) -> SlotWriter:
        table = self._table
        table.changing = True
        slot = table.claim(nbytes, part)
        writer = SlotWriter(table, slot, nbytes)
        slot.writer = weakref.ref(writer, table.lost.append)
        table.changing = False
        return writer

    def _claim_later(self, nbytes: int, part: int, timeout: float | None) -> SlotWriter:
        """`claim` a slot that is free once the words of consumers were read, or once one becomes free."""
        table = self._table
        deadline = Deadline.after(timeout, table.clock)
        waits = new = False
        bell = _Doorbell(table)
        try:
            while True:
                notified = table.notified
                self.observe(drop=self.on_full == "overwrite", new_bell=new)
                with table.lock:
                    self._open_table_locked()
                    if table.find_free(part, nbytes):
                        return self._take_locked(nbytes, part)
                    table.check_time(deadline)
                    new = bell.set_locked()
                    if not new and table.notified == notified:
                        waits = True
                        table.wait_for_slot(deadline)
        except BaseException:
            with table.lock:
                table.notify_claims()  # if it was woken for a slot, another one must take that
            raise
        finally:
            with table.lock:
                bell.clear_locked()
                if waits:
                    table.count_wait(deadline.elapsed)

    def memory_of(self, writers: Sequence[SlotWriter]) -> Iterator[npt.NDArray[np.uint8]]:
        """The memory of claimed slots in their order: the first bytes of each, as many as all of them have.

        Slots that follow each other in the ring are the rows of one array, so that one copy writes to all of them.
        Do not use it after a `commit` or `abort`.

        Raises:
            SlotError: one of them is committed or aborted.
        """
        table = self._table
        for _, found in groupby(enumerate(writers), lambda each: each[1].slot - each[0]):
            run = [writer for _, writer in found]
            begin, end = (table.slots[each.slot].offset for each in (run[0], run[-1]))
            nbytes = min(each.nbytes for each in run)
            with table.lock:
                self._open_table_locked()
                for each in run:
                    claimed = table.slots[each.slot].writer
                    if claimed is None or claimed() is not each:
                        why = "the slot is committed or aborted already"
                        raise SlotError(why, slot=each.slot, sequence=each.sequence)
                memory = table.view(begin, end - begin + nbytes)
            apart = (end - begin) // max(1, len(run) - 1)
            yield np.ndarray((len(run), nbytes), np.uint8, memory, strides=(apart, 1))

    def read_raw(self, slot: int, sequence: int, reader: int = 0) -> Lease:
        """Lease a committed payload, which other readers may have leased already.

        Raises:
            StaleSlotError: the payload is gone, or `reader` has consumed it.
            SlotError: there is no such slot or reader.
        """
        table = self._table
        with table.lock:
            if table.closed or not (0 <= slot < self.slots and 0 <= reader < self.readers):
                self._refuse_locked(slot, reader)
            return Lease(table, table.lease(slot, sequence, reader), reader)

    def copy_many(self, wanted: Sequence[Wanted], most: int) -> list[Copied | PayloadError | SlotError]:
        """Copy small committed payloads without leases. The ring is locked meanwhile.

        The result for a (slot, sequence, reader) is (bytes, checksum or None), or the error that `read_raw` would
        raise, or `PayloadTooLargeError` for a payload of more than `most` bytes. A copy does not consume.
        """
        table = self._table
        with table.lock:
            table.check_open()
            return table.copy_many(wanted, most)

    def consume(self, slot: int, sequence: int, reader: int = 0) -> bool:
        """Mark a payload consumed by `reader`; leases on it stay valid until they end.

        Returns false, and counts it, when the payload is gone or `reader` has consumed it. With
        ``retain="newest"`` nothing is consumed: the result only states whether the payload can still be read.

        Raises:
            SlotError: there is no such slot or reader.
        """
        return self.consume_many(((slot, sequence, reader),)) == 1

    def consume_many(self, wanted: Iterable[Wanted]) -> int:
        """Call `consume` for each (slot, sequence, reader); returns how many of the calls returned true.

        Raises:
            SlotError: there is no such slot or reader; the payloads named before it are consumed.
        """
        table = self._table
        with table.lock:
            consumed = 0
            for slot, sequence, reader in wanted:
                if table.closed or not (0 <= slot < self.slots and 0 <= reader < self.readers):
                    self._refuse_locked(slot, reader)
                table.begin_change()
                consumed += table.consume(slot, sequence, reader)
            return consumed

    def checksum(self, slot: int, sequence: int, compute: Callable[[memoryview], int]) -> int:
        """The checksum of a committed payload: the result of `compute`, kept from the first call on.

        `compute` takes the bytes and returns an unsigned 64-bit integer. It runs without the ring's lock, so
        concurrent first calls may each run it.

        Raises:
            StaleSlotError: the payload is gone, perhaps since `compute` began.
            SlotError: there is no such slot.
        """
        table = self._table
        with table.lock:
            self._check_locked(slot)
            found = table.committed(slot, sequence)
            if found.checksum is not None:
                return found.checksum
            view = table.view(found.offset, found.nbytes).toreadonly()
        value = checked_int("checksum", compute(view), 0, (1 << 64) - 1)
        with table.lock:
            self._check_locked(slot)
            table.keep_checksum(table.committed(slot, sequence), value)
        return value

    def wait_consumed(self, slot: int, sequence: int, timeout: float | None = 30.0) -> bool:
        """Wait until a payload retires: consumed by all its readers, dropped, replaced or aborted.

        Returns false when it has not done so within `timeout` seconds; ``None`` for no limit.

        Raises:
            StaleSlotError: the slot never held that sequence number.
            SlotError: there is no such slot.
        """
        table = self._table
        deadline = Deadline.after(timeout, table.clock)
        bell = _Doorbell(table)
        new = False
        try:
            while True:
                self.observe(new_bell=new)
                with table.lock:
                    self._check_locked(slot)
                    found = table.slots[slot]
                    if found.sequence < sequence:
                        raise found.stale_error(sequence, 0)
                    if found.sequence > sequence or found.retired:
                        return True
                    if not deadline.remaining > 0:
                        return False
                    new = bell.set_locked()
                    if not new:
                        table.wait_retired(found, deadline)
        finally:
            with table.lock:
                bell.clear_locked()

    def is_stale(self, slot: int, sequence: int, reader: int = 0) -> bool:
        """`reader` cannot read a committed payload (any more): it is consumed, dropped or replaced."""
        table = self._table
        with table.lock:
            return table.closed or table.is_stale(table.slots[slot], sequence, reader)

    def get_ready_count(self) -> int:
        """The number of READY slots."""
        self.observe()
        with self._table.lock:
            self._open_table_locked().mend()
            return self._table.ready

    def ready(self, *, leased: bool = False) -> list[SlotInfo]:
        """The READY payloads, oldest first; with `leased`, also those being read that are not consumed yet."""
        self.observe()
        with self._table.lock:
            states = (SlotState.READY, SlotState.READING) if leased else (SlotState.READY,)
            live = self._open_table_locked().live.values()
            return [slot.info() for slot in live if slot.state in states and not slot.retired]

    def inspect(self) -> tuple[SlotInfo, ...]:
        """All slots, by index, for observers and tests. It takes time in proportion to the number of slots."""
        self.observe()
        with self._table.lock:
            return tuple([slot.info() for slot in self._open_table_locked().slots])

    def statistics(self) -> RingStatistics:
        """The counters of the ring."""
        self.observe()
        with self._table.lock:
            return self._open_table_locked().statistics()

    @property
    def used_bytes(self) -> int:
        """The bytes of the payloads in the slots, as `statistics` counts them."""
        self.observe()
        with self._table.lock:
            self._open_table_locked()
            return self._table.room.used

    @property
    def memory_bytes(self) -> int:
        """The bytes of memory that slots have: of each, those of the largest payload that was in it."""
        return self._table.room.memory

    # --- direct consumers -------------------------------------------------------------------------------------

    def count_servers(self, change: int) -> None:
        """A server of the ring begins (1) or ends (-1). Without one, direct consumers lease nothing any more."""
        with self._table.lock:
            if not self._table.closed:
                self._table.count_servers(change)

    def attach(self, process: Descriptor, *, pid: int, reader: int, leases: int) -> Attached | None:
        """Let a consumer on this host lease directly, see `dray.ring.attachment`; None if it cannot.

        Args:
            process: a pidfd of the consumer's process, whose end ends its leases.
            pid: its process, for the statistics.
            reader: its reader id.
            leases: how many payloads it may lease at a time.

        Raises:
            OutOfResources: no descriptor or memory is left.
        """
        table = self._table
        with table.lock:
            self._open_table_locked()
            if self.slots * self.readers > MAX_BOARD_WORDS or not 0 <= reader < self.readers:
                return None
            direct = table.serve_directly()
            return direct.attach(process, pid, reader, leases) if direct.barriers.usable else None

    def direct(self) -> DirectLeases:
        """What is shared with direct consumers, once there was one.

        Raises:
            BufferClosedError: the ring is closed.
        """
        with self._table.lock:
            return self._open_table_locked().serve_directly()

    def for_heir(self) -> list[int]:
        """The descriptors that an heir needs, see `dray.ring.inherited`; the ring keeps them.

        Raises:
            BufferClosedError: the ring is closed.
            ConfigError: direct leases are not possible here, or not with this ring.
            OutOfResources: no descriptor or memory is left.
        """
        if why := direct_problem():
            raise ConfigError("heir", "wanted", f"a machine that can have direct leases ({why})")
        if self.retain == "newest":
            raise ConfigError("retain", self.retain, '"unread": an heir keeps what was not consumed')
        if self.slots * self.readers > MAX_BOARD_WORDS:
            allowed = f"slots x readers of at most {MAX_BOARD_WORDS}"
            raise ConfigError("slots", self.slots, allowed)
        return [self.segment.fileno(), *self.direct().for_heir()]

    @property
    def has_direct_consumers(self) -> bool:
        """A consumer leases directly, or has done so."""
        return self._table.direct is not None

    def observe(self, *, drop: bool = False, new_bell: bool = False) -> None:
        """Learn what direct consumers hold and have consumed, and free what they do not hold any more.

        Every method that answers from the slots does so first. A server does when `DirectLeases.events` has one.

        Args:
            drop: if no slot is free, drop the oldest payload that has no lease.
            new_bell: the doorbell was set since the last `observe`.
        """
        table = self._table
        direct = table.direct
        if direct is None:
            return
        if new_bell:  # a consumer sees the doorbell, or this scan sees what the consumer has written before
            direct.barriers.pass_one()
        scans: list[Scan] = []
        passed = False
        try:
            with table.lock:
                if table.closed:
                    return
                table.mend()
                scans.append(table.begin_scan(drop=drop))
            if scans[0].needs_barrier:
                passed = direct.barriers.pass_one()
        finally:
            if scans and scans[0].needs_barrier:
                with table.lock:
                    table.end_scan(scans[0], passed)

    def direct_leases(self) -> list[WordLease]:
        """The direct leases, as they were found last."""
        with self._table.lock:
            table = self._open_table_locked()
            sequences = [slot.sequence for slot in table.slots] if table.direct is not None else []
            return [] if table.direct is None else table.direct.leases(sequences)

    @property
    def closed(self) -> bool:
        """True after `close`, and in a child forked from the creator."""
        return self._table.closed

    def close(self) -> None:
        """Wake all waiting threads with `BufferClosedError`, and free the memory. Twice is fine.

        Views stay valid: the memory is unmapped with the last of them.
        """
        self._table.close()
        self.segment.close()

    def __repr__(self) -> str:
        # Without the lock: a debugger may have stopped the thread that holds it.
        table = self._table
        state = "closed" if table.closed else f"{table.ready} ready, {len(table.free)} free"
        return f"<SharedRingBuffer {self.producer_id.hex()[:8]} {self.slots} x {self.slot_bytes} bytes, {state}>"

    def _open_table_locked(self) -> SlotTable:
        self._table.check_open()
        self._table.mend()
        return self._table

    def _check_locked(self, slot: int) -> None:
        if self._table.closed or not 0 <= slot < self.slots:
            self._refuse_locked(slot, 0)

    def _refuse_locked(self, slot: int, reader: int) -> None:
        self._table.check_open()
        if not 0 <= slot < self.slots:
            raise SlotError(f"the ring has slots 0 to {self.slots - 1}", slot=slot)
        raise SlotError(f"reader {reader} is not one of 0 to {self.readers - 1}", slot=slot)


class _Doorbell:
    """Consumers ring the doorbell while a thread waits. Both methods need the lock of the ring's table."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._set: DirectLeases | None = None

    def set_locked(self) -> bool:
        """Have it rung from now on; True if it was not so far: then `observe` comes before the wait."""
        direct = self._table.direct
        if direct is None or self._set is direct:
            return False
        direct.begin_wait()
        self._set = direct
        return True

    def clear_locked(self) -> None:
        """This thread does not wait any more."""
        if self._set is not None and self._set is self._table.direct:
            self._set.end_wait()
        self._set = None


def _check_policy(*, slots: int, on_full: str, readers: int, retain: str, parts: int) -> None:
    """Raise `ConfigError` unless the arguments of a ring go together."""
    checked_int("readers", readers, 1, MAX_READERS)
    for key, value, allowed in (("on_full", on_full, get_args(OnFull)), ("retain", retain, get_args(Retain))):
        if value not in allowed:
            raise ConfigError(key, value, f"one of {', '.join(allowed)}")
    checked_int("parts", parts, 1, slots if retain == "newest" else 1)
    if retain == "newest" and slots < 2 * parts:
        raise ConfigError("slots", slots, f'at least {2 * parts} with retain = "newest"')
    if retain == "newest" and on_full == "overwrite":
        raise ConfigError("on_full", on_full, 'block or error with retain = "newest", which drops by itself')
