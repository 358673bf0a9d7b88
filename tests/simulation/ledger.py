"""What must hold of rings and payloads, checked from outside: by what was written, asked for and handed out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from dray.protocol import PayloadRef
from dray.ring import SharedRingBuffer, SlotState
from dray.ring.layout import STATE_OFFSET
from dray.transport.server_statistics import LeaseInfo
from simulation.scheduler import Scheduler, Violation


class Payload:
    """One committed payload.

    Attributes:
        image: its bytes.
        delivered: how often it was handed out, by reader.
        given_up: readers that asked for it to be consumed, or may have without knowing: they died, or were
            interrupted.
        kept: readers that got it, and whose client has ended in order: they must be known to have consumed it.
    """

    __slots__ = ("delivered", "given_up", "image", "kept", "sequence", "slot")

    def __init__(self, slot: int, sequence: int, image: bytes) -> None:
        self.slot = slot
        self.sequence = sequence
        self.image = image
        self.delivered: Counter[int] = Counter()
        self.given_up: set[int] = set()
        self.kept: set[int] = set()


class Books:
    """What is known of one ring."""

    def __init__(self, ring: SharedRingBuffer, name: str, readers: int) -> None:
        self.ring = ring
        self.name = name
        self.readers = readers
        self.lost = False
        self.payloads: dict[int, Payload] = {}
        self._claims = 0
        self._last: list[tuple[SlotState, int]] = [(SlotState.FREE, -1)] * ring.slots

    def claimed(self, slot: int, sequence: int) -> None:
        """A writer got a slot."""
        if sequence != self._claims:
            raise Violation(
                f"{self.name}: sequence {sequence} was claimed in slot {slot} after {self._claims - 1}"
            )
        self._claims += 1

    def committed(self, slot: int, sequence: int, image: bytes) -> None:
        """A payload is there."""
        self.payloads[sequence] = Payload(slot, sequence, image)

    def check(self, live: Iterable[LeaseInfo]) -> None:
        """Slots, leases and bytes agree with each other, with the servers' reports and with what was written."""
        ring = self.ring
        table, view = ring._table, ring.segment.view
        leases = Counter((lease.slot, lease.sequence) for lease in live)
        counted = [0] * len(SlotState)
        waiting = 0
        for cell, (state, sequence) in zip(table.slots, self._last, strict=True):
            expected = leases.pop((cell.index, cell.sequence), 0) if leases else 0
            counted[cell.state] += 1
            if cell.leases != expected:
                self._fail(f"slot {cell.index} counts {cell.leases} leases, its readers hold {expected}")
            if (cell.leases > 0) is not (cell.state is SlotState.READING):
                self._fail(f"slot {cell.index} is {cell.state.name} with {cell.leases} leases")
            if cell.sequence < sequence:
                self._fail(f"slot {cell.index} went from sequence {sequence} back to {cell.sequence}")
            revived = state is SlotState.FREE and cell.state is not SlotState.FREE
            if cell.sequence == sequence and (
                revived or (cell.state is SlotState.WRITING) > (state is SlotState.WRITING)
            ):
                self._fail(f"slot {cell.index} went from {state.name} to {cell.state.name} in one life")
            if view[cell.header + STATE_OFFSET] != cell.state:
                self._fail(f"the header of slot {cell.index} does not say {cell.state.name}")
            if cell.state is SlotState.READY or cell.state is SlotState.READING:
                waiting += not cell.over
                payload = self.payloads.get(cell.sequence)
                if (
                    payload is not None
                    and view[cell.offset : cell.offset + cell.nbytes].tobytes() != payload.image
                ):
                    self._fail(f"the bytes of slot {cell.index} changed while it was {cell.state.name}")
                if cell.over and cell.state is SlotState.READY:
                    self._fail(f"slot {cell.index} is READY although its payload's life is over")
        if leases:
            self._fail(f"readers hold leases on slots that have moved on: {dict(leases)}")
        self._last = [(cell.state, cell.sequence) for cell in table.slots]
        if counted != list(table.count().values()):
            self._fail(f"the ring counts {table.count()}, there are {counted}")
        gone = table._consumed + table._dropped_unread + table._dropped_delivered + table._retired
        if table._committed != gone + waiting:
            self._fail(f"{table._committed} payloads were committed, {gone} are gone and {waiting} there")

    def check_read(self, memories: Iterable[memoryview]) -> None:
        """What a transport still reads from is leased."""
        layout = self.ring.segment.layout
        for memory in memories:
            slot, within = divmod(
                _address(memory) - _address(self.ring.segment.view) - layout.slots_offset, layout.stride
            )
            if 0 <= slot < layout.slots and within == 0 and not self.ring._table.slots[slot].leases:
                self._fail(f"a transport still reads slot {slot}, and nobody leases it")

    def settle(self) -> None:
        """At the end, with every client gone: nothing is in use, nothing was lost."""
        table = self.ring._table
        for cell in table.slots:
            if cell.state in (SlotState.WRITING, SlotState.READING):
                self._fail(f"slot {cell.index} is {cell.state.name} for ever")
        if table._committed != len(self.payloads):
            self._fail(f"{len(self.payloads)} payloads were committed, the ring counts {table._committed}")
        dropped = table._dropped_unread + table._dropped_delivered + table._retired
        vanished = []
        for payload in self.payloads.values():
            cell = table.slots[payload.slot]
            alive = cell.sequence == payload.sequence and not cell.over
            consumed = {reader for reader in range(self.readers) if alive and cell.consumed_by >> reader & 1}
            for reader in consumed:
                if not payload.delivered[reader] and reader not in payload.given_up:
                    self._fail(f"reader {reader} consumed sequence {payload.sequence} without getting it")
            if not alive and any(
                not payload.delivered[reader] and reader not in payload.given_up for reader in range(self.readers)
            ):
                vanished.append(payload.sequence)
            if alive and payload.kept - consumed and self.ring.retain == "unread":
                self._fail(f"sequence {payload.sequence} is still there for readers {payload.kept - consumed}")
        if len(vanished) > dropped:
            self._fail(f"sequences {vanished} are gone, {dropped} were dropped by policy")

    def _fail(self, what: str) -> None:
        raise Violation(f"{self.name}: {what}")


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


class Ledger:
    """All rings of a run."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._books: dict[bytes, Books] = {}

    @property
    def all(self) -> list[Books]:
        return list(self._books.values())

    def open(self, ring: SharedRingBuffer, name: str, readers: int) -> Books:
        """Keep books of a new ring."""
        books = Books(ring, name, readers)
        self._books[ring.producer_id] = books
        return books

    def check(self, books: Books, live: Iterable[LeaseInfo]) -> None:
        """See `Books.check`."""
        books.check(live)

    def of(self, ref: PayloadRef) -> Books:
        """The books of a reference's ring."""
        return self._books[ref.producer]

    def find(self, ref: PayloadRef) -> Payload | None:
        """What a reference names, if there ever was such a payload."""
        payload = self.of(ref).payloads.get(ref.sequence)
        return payload if payload is not None and payload.slot == ref.slot else None

    def deliver(self, ref: PayloadRef, reader: int, data: bytes) -> None:
        """A reader was handed these bytes for a reference."""
        payload = self.find(ref)
        if payload is None:
            raise Violation(f"{self.name(ref)} was handed out, and never committed")
        if data != payload.image:
            raise Violation(f"{self.name(ref)} was asked for, and other bytes were handed out")
        payload.delivered[reader] += 1

    def give_up(self, ref: PayloadRef, reader: int) -> None:
        """A reader has asked for a payload to be consumed, or may have."""
        payload = self.find(ref)
        if payload is not None:
            payload.given_up.add(reader)

    def keep(self, ref: PayloadRef, reader: int) -> None:
        """A reader's client ended in order after it had consumed a payload."""
        payload = self.find(ref)
        if payload is not None:
            payload.kept.add(reader)

    def name(self, ref: PayloadRef) -> str:
        """A reference, without what differs from run to run."""
        return f"{self.of(ref).name} slot {ref.slot} sequence {ref.sequence}"
