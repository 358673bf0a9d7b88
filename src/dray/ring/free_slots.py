"""The free slots of a ring in the order in which they are used again, and the bytes of the payloads in the others.

A slot keeps the memory that was ever written in it. A ring uses the slot that has been free longest
(`OldestFirst`). One that keeps the newest payload uses slots in the order of their memory (`LowestFirst`), so that
what is not needed is never taken. One with a capacity in bytes may have far more slots than payloads, and payloads
of many sizes: it uses slots whose memory is there already and not much larger than it needs (`WarmestFirst`), so
that its memory is about that of the payloads that were in it at one time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from dray.ring.records import Retain, Slot

MIN_SCAN_BYTES: Final = 16 << 20
"""After that many bytes, a ring with a capacity finds out what consumers have freed before it takes new memory."""


class OldestFirst(deque[Slot]):
    """The slot that has been free longest comes first.

    Args:
        slots: those that are free.
        parts: the part of a slot is its index modulo this number.
    """

    def __init__(self, slots: Iterable[Slot], parts: int) -> None:
        super().__init__(slots)
        self._parts = parts

    def has(self, part: int) -> bool:
        """A slot of a part is free."""
        return any(self._of(part))

    def pop_for(self, nbytes: int, part: int) -> Slot:
        """Take a slot of `part` for a payload of `nbytes` bytes; there must be one."""
        slot = next(self._of(part))
        self.remove(slot)
        return slot

    def is_warm(self, nbytes: int) -> bool:
        """There is a slot whose memory would do, and which is not much too large."""
        return True

    def _of(self, part: int) -> Iterator[Slot]:
        return iter(self) if self._parts == 1 else (each for each in self if each.index % self._parts == part)


class LowestFirst(OldestFirst):
    """The slot whose memory comes first in the ring comes first."""

    def __init__(self, slots: Iterable[Slot], parts: int) -> None:
        super().__init__(sorted(slots, key=lambda slot: slot.index), parts)

    def append(self, slot: Slot) -> None:
        """A slot has become free."""
        self.insert(sum(each.index < slot.index for each in self), slot)


class WarmestFirst:
    """Free slots by size class: the number of bits of the size of the largest payload that was in them.

    A payload gets the slot of its own class that was freed last, else one that was never used, else a larger one,
    else the largest.

    Args:
        slots: those that are free.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._classes: dict[int, list[Slot]] = {}
        self._count = 0
        # Those of low index are used first, so that headers lie side by side.
        for slot in reversed(tuple(slots)):
            self.append(slot)

    def append(self, slot: Slot) -> None:
        """A slot has become free."""
        size = slot.touched.bit_length()
        found = self._classes.get(size)
        if found is None:
            found = self._classes[size] = []
        found.append(slot)
        self._count += 1

    def has(self, part: int) -> bool:
        """See `OldestFirst.has`."""
        return part == 0 and self._count > 0

    def pop_for(self, nbytes: int, part: int) -> Slot:
        """See `OldestFirst.pop_for`."""
        classes, size = self._classes, nbytes.bit_length()
        found = (classes.get(size) or classes.get(0)) if part == 0 else None
        if not found:
            others = [each for each, slots in classes.items() if slots]
            found = classes[min((each for each in others if each > size), default=max(others))]
        self._count -= 1
        return found.pop()

    def is_warm(self, nbytes: int) -> bool:
        """See `OldestFirst.is_warm`."""
        return bool(self._classes.get(nbytes.bit_length()))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Slot]:
        for slots in self._classes.values():
            yield from reversed(slots)


FreeSlots: TypeAlias = OldestFirst | WarmestFirst


def free_slots(slots: Iterable[Slot], parts: int, capacity: int | None, retain: Retain) -> FreeSlots:
    """The free slots of a ring.

    Args:
        slots: those that are free.
        parts: those of the ring.
        capacity: bytes that all payloads together may have.
        retain: which payloads the ring keeps.
    """
    if capacity is not None:
        return WarmestFirst(slots)
    return (LowestFirst if retain == "newest" else OldestFirst)(slots, parts)


class Room:
    """The bytes of the payloads in a ring, and those that they may have.

    Args:
        capacity: bytes that all payloads together may have; None if only slots limit them.

    Attributes:
        capacity: as given.
        used: bytes of the payloads in slots.
        memory: bytes that slots have written memory for.
    """

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.used = self.memory = 0
        self._unseen, self._limit = 0, MIN_SCAN_BYTES  # claimed since the last scan, and when another one is due

    def is_ready(self, part: int, nbytes: int, free: FreeSlots, direct: bool) -> bool:
        """There is a slot and room for a payload, and no reason to find out first what consumers have freed.

        Args:
            part: the kind of payload.
            nbytes: its size.
            free: the free slots.
            direct: consumers may have freed what is not known yet.
        """
        if self.capacity is None:
            return free.has(part)
        known = not direct or self._unseen < self._limit or free.is_warm(nbytes)
        return known and free.has(part) and self.used + nbytes <= self.capacity

    def note_scan(self, nbytes: int) -> bool:
        """What consumers have freed is known now: whether a payload of `nbytes` bytes fits."""
        self._unseen, self._limit = 0, max(MIN_SCAN_BYTES, self.used // 2)
        return self.capacity is None or self.used + nbytes <= self.capacity

    def claim(self, slot: Slot, nbytes: int) -> None:
        """A payload of `nbytes` bytes will be in a slot."""
        self.used += nbytes
        self._unseen += nbytes
        slot.nbytes = nbytes
        if nbytes > slot.touched:
            self.memory += nbytes - slot.touched
            slot.touched = nbytes

    def __str__(self) -> str:
        """For the message of an error."""
        return "" if self.capacity is None else f", {self.used} of {self.capacity} bytes"
