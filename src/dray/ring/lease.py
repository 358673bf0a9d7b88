"""The two sides of a slot: `SlotWriter` fills it, `Lease` is a reader's bounded right to it."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from dray.errors import ConfigError, PayloadTooLargeError, SlotError, StaleSlotError
from dray.ring.core import RingCore
from dray.ring.slot_state import SlotState
from dray.ring.slots import Slot

logger = logging.getLogger("dray.ring")


class SlotWriter:
    """A claimed slot. Fill `buffer`, then `commit`; leaving the ``with`` block, or losing this object, aborts.

    Attributes:
        slot: index of the slot.
        sequence: the payload's sequence number.
        nbytes: bytes claimed.
        open: true until `commit` or `abort`.
    """

    __slots__ = ("__weakref__", "_cell", "_core", "nbytes", "open", "sequence", "slot")

    def __init__(self, core: RingCore, cell: Slot, nbytes: int) -> None:
        self._core = core
        self._cell = cell
        self.slot = cell.index
        self.sequence = cell.sequence
        self.nbytes = nbytes
        self.open = True

    @property
    def buffer(self) -> memoryview:
        """The slot's memory, writable, exactly `nbytes` bytes; not to be touched after `commit` or `abort`.

        Raises:
            SlotError: committed or aborted.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        core = self._core
        with core.lock:
            self._check_open()
            return core.view(self._cell.offset, self.nbytes)

    def commit(self, nbytes: int | None = None) -> None:
        """Make the payload readable; with `nbytes`, only its first bytes.

        Raises:
            PayloadTooLargeError: `nbytes` is more than was claimed; the slot stays claimed.
            SlotError: committed or aborted already.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        core = self._core
        with core.lock:
            self._check_open()
            if nbytes is None:
                nbytes = self.nbytes
            elif nbytes.__class__ is not int or nbytes < 0:
                raise ConfigError("nbytes", nbytes, f"an integer from 0 to {self.nbytes}")
            elif nbytes > self.nbytes:
                raise PayloadTooLargeError(
                    f"a payload of {nbytes} bytes does not fit into the {self.nbytes} bytes claimed",
                    slot=self.slot,
                    sequence=self.sequence,
                )
            core.begin_change()
            core.table.commit(self._cell, nbytes)
            self._cell.writer = None
            self.open = False
            core.table.changing = False
            if core.claimers:
                core.claimable.notify()

    def abort(self) -> None:
        """Give the slot back. After `commit` or `abort` this is a no-op with a warning."""
        core = self._core
        with core.lock:
            if core.disowned:
                raise core.closed_error()
            if core.closed:
                return
            if self.open:
                core.begin_change()
                self.open = False
                self._cell.writer = None
                if self._cell.state is SlotState.WRITING:
                    core.table.abort(self._cell)
                else:  # an exception came in the middle of the commit
                    core.table.withdraw(self._cell)
                core.table.changing = False
                if core.claimers:
                    core.claimable.notify()
                return
            core.table.late_finalises += 1
        logger.warning("abort of %r ignored: it is finished already", self)

    def withdraw(self) -> None:
        """`abort`, or the end of a payload that was committed and whose reference nobody was given."""
        if self.open:
            self.abort()
            return
        core, cell = self._core, self._cell
        with core.lock:
            if not core.closed and cell.sequence == self.sequence and not cell.over:
                core.begin_change()
                core.table.withdraw(cell)
                core.table.changing = False
                if core.claimers:
                    core.claimable.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.open and not self._core.closed:
            self.abort()

    def __repr__(self) -> str:
        state = "open" if self.open else "finished"
        return f"<SlotWriter slot {self.slot} sequence {self.sequence}, {self.nbytes} bytes, {state}>"

    def _check_open(self) -> None:
        self._core.check_open()
        if not self.open:
            raise SlotError("the slot is committed or aborted already", slot=self.slot, sequence=self.sequence)


class Lease:
    """A reader's right to one payload. `SharedRingBuffer.mark_consumed` or `release_reading` ends it, once.

    Attributes:
        slot: index of the slot.
        sequence: the payload's sequence number.
        reader: id of the reader.
        nbytes: size of the payload.
        offset: byte offset of the payload in the segment.
        committed_at: when it was committed, on the ring's clock.
        live: true until the lease has ended.
    """

    __slots__ = ("_cell", "_core", "committed_at", "live", "nbytes", "offset", "reader", "sequence", "slot")

    def __init__(self, core: RingCore, cell: Slot, reader: int) -> None:
        self._core = core
        self._cell = cell
        self.slot = cell.index
        self.sequence = cell.sequence
        self.reader = reader
        self.nbytes = cell.nbytes
        self.offset = cell.offset
        self.committed_at = cell.committed_at
        self.live = True

    @property
    def buffer(self) -> memoryview:
        """The payload, read-only, as it lies in the slot; not to be touched after the lease has ended.

        Raises:
            StaleSlotError: the lease has ended.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        core = self._core
        with core.lock:
            core.check_open()
            if not self.live:
                raise StaleSlotError("the lease has ended", slot=self.slot, sequence=self.sequence)
            return core.view(self.offset, self.nbytes).toreadonly()

    def acknowledge(self) -> bool:
        """End the lease; its reader has consumed the payload. Returns whether this ended the lease."""
        return self._end(True)

    def release(self) -> bool:
        """End the lease; the payload can be read again. Returns whether this ended the lease."""
        return self._end(False)

    def _end(self, consumed: bool) -> bool:
        core = self._core
        with core.lock:
            if self.live and not core.closed:
                core.begin_change()
                self.live = False
                core.table.finish(self._cell, self.reader, consumed)
                core.table.changing = False
                if core.claimers:
                    core.claimable.notify()
                return True
            if core.disowned:
                raise core.closed_error()
            if core.closed:
                return False
            core.table.late_finalises += 1
        logger.warning("end of %r ignored: %s", self, "it has ended already")
        return False

    def __repr__(self) -> str:
        state = "live" if self.live else "ended"
        about = f"slot {self.slot} sequence {self.sequence} reader {self.reader}"
        return f"<Lease {about}, {self.nbytes} bytes, {state}>"
