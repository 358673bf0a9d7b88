"""Invariants of rings and payloads, checked against what was written, requested and delivered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping

import numpy as np

from dray.protocol import PayloadRef
from dray.ring import RingStatistics, SharedRingBuffer, SlotState
from dray.ring.attachment import DirectLease
from dray.ring.layout import STATE_OFFSET
from dray.transport.server_statistics import LeaseInfo
from simulation.scheduler import Process, Scheduler, Violation


class Payload:
    """One payload that is being committed, or is committed.

    Attributes:
        image: its bytes.
        delivered: how often it was handed out, by reader.
        given_up: readers that asked for it to be consumed, or may have without knowing: they died, or were
            interrupted.
        kept: readers that got it, and whose client has ended in order: they must be known to have consumed it.
        acknowledged: readers that have written on the board that they have consumed it.
        consumed_since: when others could see that.
        since: when its commit had ended; infinite before that.
    """

    __slots__ = (
        "acknowledged",
        "consumed_since",
        "delivered",
        "given_up",
        "image",
        "kept",
        "sequence",
        "since",
        "slot",
    )

    def __init__(self, slot: int, sequence: int, image: bytes) -> None:
        self.since = math.inf
        self.slot = slot
        self.sequence = sequence
        self.image = image
        self.delivered: Counter[int] = Counter()
        self.given_up: set[int] = set()
        self.kept: set[int] = set()
        self.acknowledged: set[int] = set()
        self.consumed_since: dict[int, float] = {}


class Books:
    """What the simulation has written to one ring and read from it.

    Attributes:
        direct: the direct leases: slot, sequence number and process, by the id of the lease.
        changed_at: when a direct consumer has changed a word last.
    """

    def __init__(self, ring: SharedRingBuffer, name: str, readers: int) -> None:
        self.ring = ring
        self.name = name
        self.readers = readers
        self.lost = False
        self.direct: dict[int, tuple[int, int, Process]] = {}
        self.changed_at = 0.0
        self._late_looks = 0
        self.payloads: dict[int, Payload] = {}
        self._claims = 0
        self._last = ring.inspect()
        layout = ring.segment.layout
        self._offsets = [
            (layout.header_offset(slot) + STATE_OFFSET, layout.slot_offset(slot)) for slot in range(ring.slots)
        ]

    def claimed(self, slot: int, sequence: int) -> None:
        """A writer got a slot."""
        if sequence != self._claims:
            raise Violation(
                f"{self.name}: sequence {sequence} was claimed in slot {slot} after {self._claims - 1}"
            )
        self._claims += 1

    def committing(self, slot: int, sequence: int, image: bytes) -> None:
        """A commit begins: the payload can be read before the commit ends."""
        self.payloads[sequence] = Payload(slot, sequence, image)

    def committed(self, sequence: int, now: float = 0.0) -> None:
        """The commit has ended."""
        self.payloads[sequence].since = now

    def refused(self, sequence: int) -> None:
        """The ring refused the commit: there is no such payload."""
        payload = self.payloads.pop(sequence)
        if payload.delivered:
            self._fail(f"sequence {sequence} was delivered, and its commit was refused")

    def check(
        self,
        live: Iterable[LeaseInfo],
        words: Mapping[int, int] | None = None,
        due: Container[int] = (),
    ) -> None:
        """Slots, leases and bytes agree with each other, with the reports of servers and with what was written.

        Args:
            live: the leases that servers report.
            words: how many lease words the ring has found last, by slot.
            due: retired slots whose direct leases are not ruled out.
        """
        words = words or {}
        slots, view = self.ring.inspect(), self.ring.segment.view
        leases = Counter((lease.slot, lease.sequence) for lease in live)
        counted = [0] * len(SlotState)
        unconsumed = 0
        for info, (header, offset), before in zip(slots, self._offsets, self._last, strict=True):
            slot, state, sequence, nbytes, leased, _, retired, _ = info
            expected = words.get(slot, 0) + (leases.pop((slot, sequence), 0) if leases else 0)
            counted[state] += 1
            if leased != expected:
                self._fail(f"slot {slot} counts {leased} leases, its readers hold {expected}")
            if (leased > 0 or slot in due) is not (state is SlotState.READING):
                self._fail(f"slot {slot} is {state.name} with {leased} leases")
            if sequence < before.sequence:
                self._fail(f"slot {slot} went from sequence {before.sequence} back to {sequence}")
            revived = before.state is SlotState.FREE and state is not SlotState.FREE
            rewritten = state is SlotState.WRITING and before.state is not SlotState.WRITING
            if sequence == before.sequence and (revived or rewritten):
                self._fail(f"slot {slot} went from {before.state.name} to {state.name} with one payload")
            if view[header] != state:
                self._fail(f"the header of slot {slot} has another state than {state.name}")
            if state is SlotState.READY or state is SlotState.READING:
                unconsumed += not retired
                payload = self.payloads.get(sequence)
                if payload is not None and view[offset : offset + nbytes].tobytes() != payload.image:
                    self._fail(f"the bytes of slot {slot} changed while it was {state.name}")
                if retired and state is SlotState.READY:
                    self._fail(f"slot {slot} is READY although its payload is retired")
        for slot, sequence, process in self.direct.values():
            if not process.dead:
                self.check_direct(slot, sequence)
        if leases:
            self._fail(f"readers hold leases on slots that hold other payloads now: {dict(leases)}")
        if slots == self._last:
            return  # the counters need no check until a slot changes
        self._last, statistics = slots, self.ring.statistics()
        if counted != [statistics.free, statistics.writing, statistics.ready, statistics.reading]:
            self._fail(f"the ring reports {statistics}, the slots in each state are {counted}")
        gone = statistics.consumed + _dropped(statistics)
        if statistics.committed != gone + unconsumed:
            self._fail(f"{statistics.committed} payloads were committed, {gone} are gone and {unconsumed} there")

    def check_direct(self, slot: int, sequence: int) -> None:
        """A payload is in its slot, where it is leased directly."""
        info = self.ring.inspect()[slot]
        if info.sequence != sequence or info.state not in (SlotState.READY, SlotState.READING):
            self._fail(
                f"sequence {sequence} is leased directly in slot {slot}, which is {info.state.name} with sequence "
                f"{info.sequence}"
            )

    def check_late_looks(self, now: float, deaf: bool) -> None:
        """A thread has not waited for what consumers had done long before, unless no server was there."""
        late = self.ring.statistics().late_looks
        if late > self._late_looks and not deaf and now - self.changed_at > WORK_ITEM_SECONDS:
            self._fail(f"a wait ended {now - self.changed_at:.3f} s after a consumer had changed a word")
        self._late_looks = late

    def stored(self, slot: int, reader: int, value: int, now: float | None) -> None:
        """A consumer has written on the board; with `now`, others can see it from then on."""
        payload = self.payloads.get(value - 1)
        if payload is None or payload.slot != slot:
            self._fail(f"reader {reader} has written {value} on the board for slot {slot}")
        elif now is None:
            payload.acknowledged.add(reader)
        else:
            self.changed_at = now
            payload.consumed_since.setdefault(reader, now)

    def check_read(self, memories: Iterable[memoryview]) -> None:
        """What a transport still reads from is leased."""
        layout = self.ring.segment.layout
        for memory in memories:
            slot, within = divmod(
                _address(memory) - _address(self.ring.segment.view) - layout.slots_offset, layout.stride
            )
            if 0 <= slot < layout.slots and within == 0 and not self.ring.inspect()[slot].leases:
                self._fail(f"a transport still reads slot {slot}, which has no lease")

    def check_end(self) -> None:
        """At the end, with every client gone: nothing is in use, nothing was lost."""
        slots, statistics = self.ring.inspect(), self.ring.statistics()
        for info in slots:
            if info.state in (SlotState.WRITING, SlotState.READING):
                self._fail(f"slot {info.slot} stays {info.state.name}")
        committed = sum(payload.since < math.inf for payload in self.payloads.values())
        if statistics.committed != committed:
            self._fail(f"{committed} payloads were committed, the ring counts {statistics.committed}")
        dropped = _dropped(statistics)
        vanished = []
        for payload in self.payloads.values():
            info = slots[payload.slot]
            alive = info.sequence == payload.sequence and not info.retired
            consumed = {reader for reader in range(self.readers) if alive and info.consumed_by >> reader & 1}
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


def _dropped(statistics: RingStatistics) -> int:
    return statistics.dropped_unread + statistics.dropped_delivered + statistics.retired


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


WORK_ITEM_SECONDS = 0.02
"""A doorbell wakes its owner within that time, unless something is stopped."""


class Ledger:
    """All rings of a run."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._books: dict[bytes, Books] = {}

    @property
    def all(self) -> list[Books]:
        return list(self._books.values())

    def open(self, ring: SharedRingBuffer, name: str, readers: int) -> Books:
        """Begin the ledger of a new ring."""
        books = Books(ring, name, readers)
        self._books[ring.producer_id] = books
        return books

    def of(self, ref: PayloadRef) -> Books:
        """The `Books` of the ring that a reference names."""
        return self._books[ref.producer]

    def find(self, ref: PayloadRef) -> Payload | None:
        """The payload that a reference names, if there ever was one."""
        payload = self.of(ref).payloads.get(ref.sequence)
        return payload if payload is not None and payload.slot == ref.slot else None

    def begins(self, producer: bytes, process: Process, lease: DirectLease) -> None:
        """A direct lease has begun."""
        books = self._books[producer]
        books.direct[id(lease)] = lease.slot, lease.sequence, process
        if not books.lost:
            books.check_direct(lease.slot, lease.sequence)

    def ends(self, producer: bytes, lease: DirectLease) -> None:
        """A direct lease is about to end, if it has begun and has not ended before."""
        books = self._books[producer]
        found = books.direct.pop(id(lease), None)
        if found is not None and not books.lost and not found[2].dead:
            books.check_direct(lease.slot, lease.sequence)

    def changed(self, producer: bytes) -> None:
        """A consumer has changed a lease word."""
        self._books[producer].changed_at = self._scheduler.now()

    def deliver(self, ref: PayloadRef, reader: int, data: bytes, asked_at: float) -> None:
        """A reader received these bytes for a reference that it had asked for at a time."""
        payload = self.find(ref)
        if payload is None:
            raise Violation(f"{self.name(ref)} was delivered, and never committed")
        if data != payload.image:
            raise Violation(f"{self.name(ref)} was requested, and other bytes were delivered")
        if payload.consumed_since.get(reader, asked_at) < asked_at:
            raise Violation(f"{self.name(ref)} was delivered to reader {reader}, which had consumed it before")
        payload.delivered[reader] += 1

    def give_up(self, ref: PayloadRef, reader: int) -> None:
        """A reader has asked for a payload to be consumed, or may have."""
        payload = self.find(ref)
        if payload is not None:
            payload.given_up.add(reader)

    def keep(self, ref: PayloadRef, reader: int) -> None:
        """A reader's client closed in order after it had consumed a payload."""
        payload = self.find(ref)
        if payload is not None:
            payload.kept.add(reader)

    def name(self, ref: PayloadRef) -> str:
        """A reference, without what differs from run to run."""
        return f"{self.of(ref).name} slot {ref.slot} sequence {ref.sequence}"
