"""The two sides of a slot: `SlotWriter` fills it, `Lease` is a reader's bounded right to it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from dray.buffer.ring import SharedRingBuffer
    from dray.buffer.slot_table import Slot


class SlotWriter:
    """A claimed slot. Fill `buffer`, then `commit`; leaving the ``with`` block without it aborts.

    Attributes:
        slot: index of the slot.
        sequence: the payload's sequence number.
        nbytes: bytes claimed.
        open: true until `commit` or `abort`.
    """

    __slots__ = ("_cell", "_ring", "nbytes", "open", "sequence", "slot")

    def __init__(self, ring: SharedRingBuffer, cell: Slot, nbytes: int) -> None:
        self._ring = ring
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
        return self._ring._writer_view(self)

    def commit(self, nbytes: int | None = None) -> None:
        """Make the payload readable; with `nbytes`, only its first bytes.

        Raises:
            PayloadTooLargeError: `nbytes` is more than was claimed; the slot stays claimed.
            SlotError: committed or aborted already.
            BufferClosedError: the ring is closed, or belongs to the parent of this process.
        """
        self._ring._commit(self, nbytes)

    def abort(self) -> None:
        """Give the slot back. After `commit` or `abort` this is a no-op with a warning."""
        self._ring._abort(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.open and not self._ring.closed:
            self._ring._abort(self)

    def __repr__(self) -> str:
        state = "open" if self.open else "finished"
        return f"<SlotWriter slot {self.slot} sequence {self.sequence}, {self.nbytes} bytes, {state}>"


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

    __slots__ = ("_cell", "_ring", "committed_at", "live", "nbytes", "offset", "reader", "sequence", "slot")

    def __init__(self, ring: SharedRingBuffer, cell: Slot, reader: int) -> None:
        self._ring = ring
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
        return self._ring._lease_view(self)

    def __repr__(self) -> str:
        state = "live" if self.live else "ended"
        about = f"slot {self.slot} sequence {self.sequence} reader {self.reader}"
        return f"<Lease {about}, {self.nbytes} bytes, {state}>"
