"""The two rights to a slot: a `SlotWriter` fills it, and a `Lease` reads the payload in it."""

from __future__ import annotations

import logging
from typing import Self

from dray.errors import ConfigError, PayloadTooLargeError, SlotError, StaleSlotError
from dray.ring.records import Slot
from dray.ring.slots import SlotTable

logger = logging.getLogger("dray.ring")


class SlotWriter:
    """A claimed slot. Fill `buffer`, then call `commit`.

    A context manager: a block that ends without a commit aborts. Deleting the object aborts as well.

    Attributes:
        slot: index of the slot.
        sequence: sequence number of the payload.
        nbytes: bytes claimed.
        open: true until `commit` or `abort`.
    """

    __slots__ = ("__weakref__", "_slot", "_table", "nbytes", "open", "sequence", "slot")

    def __init__(self, table: SlotTable, slot: Slot, nbytes: int) -> None:
        self._table = table
        self._slot = slot
        self.slot = slot.index
        self.sequence = slot.sequence
        self.nbytes = nbytes
        self.open = True

    @property
    def buffer(self) -> memoryview:
        """The memory of the slot: writable, exactly `nbytes` bytes. Do not use it after `commit` or `abort`.

        Raises:
            SlotError: committed or aborted.
        """
        table = self._table
        with table.lock:
            self._check_open_locked()
            return table.view(self._slot.offset, self.nbytes)

    def commit(self, nbytes: int | None = None) -> None:
        """Make the payload readable; with `nbytes`, only its first bytes.

        Raises:
            PayloadTooLargeError: `nbytes` is more than was claimed; the slot stays claimed.
            SlotError: committed or aborted already.
        """
        table = self._table
        with table.lock:
            self._check_open_locked()
            if nbytes is None:
                nbytes = self.nbytes
            elif nbytes.__class__ is not int or nbytes < 0:
                raise ConfigError("nbytes", nbytes, f"an integer from 0 to {self.nbytes}")
            elif nbytes > self.nbytes:
                why = f"a payload of {nbytes} bytes does not fit into the {self.nbytes} bytes claimed"
                raise PayloadTooLargeError(why, slot=self.slot, sequence=self.sequence)
            table.begin_change()
            table.commit(self._slot, nbytes)
            self.open = False

    def abort(self) -> None:
        """Free the slot without a payload. After `commit` or `abort`, only log a warning and count it."""
        table = self._table
        with table.lock:
            table.check_owned()
            if table.closed:
                return
            if self.open:
                self._give_back_locked()
                return
            table.double_releases += 1
        logger.warning("abort of %r ignored: it has been committed or aborted already", self)

    def withdraw(self) -> None:
        """`abort`, or retire a committed payload whose reference has not been given out."""
        table = self._table
        with table.lock:
            table.check_owned()
            if not table.closed:
                self._give_back_locked()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.open:  # mostly false, so that the lock is not taken; `_end_locked` tests again
            table = self._table
            with table.lock:
                if self.open and not table.closed:
                    self._give_back_locked()

    def __repr__(self) -> str:
        state = "open" if self.open else "ended"
        return f"<SlotWriter slot {self.slot} sequence {self.sequence}, {self.nbytes} bytes, {state}>"

    def _check_open_locked(self) -> None:
        self._table.check_open()
        if not self.open:
            raise SlotError("the slot is committed or aborted already", slot=self.slot, sequence=self.sequence)

    def _give_back_locked(self) -> None:
        table, slot = self._table, self._slot
        table.begin_change()
        self.open = False
        # An exception may have come in the middle of `commit`: then a reader may have retired the payload already.
        if slot.sequence == self.sequence and not slot.retired:
            table.give_back(slot)
        table.changing = False


class Lease:
    """The right of one reader to one payload, whose bytes do not change until the lease has ended.

    `acknowledge` or `release` ends it. A context manager: a block that ends normally acknowledges, an exception
    releases. A lease ends once: another call changes nothing, is logged and counted (`double_releases`).

    Attributes:
        slot: index of the slot.
        sequence: sequence number of the payload.
        reader: id of the reader.
        nbytes: size of the payload.
        offset: byte offset of the payload in the segment.
        live: true until the lease has ended.
    """

    __slots__ = ("_slot", "_table", "live", "nbytes", "offset", "reader", "sequence", "slot")

    def __init__(self, table: SlotTable, slot: Slot, reader: int) -> None:
        self._table = table
        self._slot = slot
        self.slot = slot.index
        self.sequence = slot.sequence
        self.reader = reader
        self.nbytes = slot.nbytes
        self.offset = slot.offset
        self.live = True

    @property
    def buffer(self) -> memoryview:
        """The payload in its slot, read-only. Do not use it after the lease has ended.

        Raises:
            StaleSlotError: the lease has ended.
        """
        table = self._table
        with table.lock:
            table.check_open()
            if not self.live:
                raise StaleSlotError("the lease has ended", slot=self.slot, sequence=self.sequence)
            return table.view(self.offset, self.nbytes).toreadonly()

    def acknowledge(self) -> bool:
        """End the lease: the reader has consumed the payload. With ``retain="newest"``, the payload stays.

        Returns whether this call ended the lease. Once the ring is closed it returns false without a warning.
        """
        return self._end(True)

    def release(self) -> bool:
        """End the lease without consuming: the payload can be read again. Returns the same as `acknowledge`."""
        return self._end(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.live and not self._table.closed:
            self._end(kind is None)

    def __repr__(self) -> str:
        state = "live" if self.live else "ended"
        about = f"slot {self.slot} sequence {self.sequence} reader {self.reader}"
        return f"<Lease {about}, {self.nbytes} bytes, {state}>"

    def _end(self, consumed: bool) -> bool:
        table = self._table
        with table.lock:
            if self.live and not table.closed:
                table.begin_change()
                self.live = False
                table.end_lease(self._slot, self.reader, consumed)
                return True
            if table.closed:
                table.check_owned()
                return False
            table.double_releases += 1
        logger.warning("end of %r ignored: it has ended already", self)
        return False
