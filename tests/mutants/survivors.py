"""The mutations that no test detects, with the reason for each; `docs/reference/testing.md` has the same table."""

from typing import Final, NamedTuple


class Survivor(NamedTuple):
    """A mutation that no test detects.

    Attributes:
        function: module, class and function, below `dray`.
        old: the lines that are gone.
        new: the lines in their place.
    """

    function: str
    old: str
    new: str


REASONS: Final[dict[str, tuple[Survivor, ...]]] = {
    "`None` instead of `False` in attributes and arguments that are only tested for truth.": (
        Survivor("ring.slots.SlotTable.__init__", "self.disowned = False", "self.disowned = None"),
        Survivor("ring.lease.Lease.release", "return self._end(False)", "return self._end(None)"),
    ),
    "`STATE_OFFSET` is 0.": (
        Survivor(
            "ring.slots.SlotTable.lease",
            "self._memory[slot.header + STATE_OFFSET] = _READING",
            "self._memory[slot.header - STATE_OFFSET] = _READING",
        ),
        Survivor(
            "ring.slots.SlotTable.end_lease",
            "self._memory[slot.header + STATE_OFFSET] = _READY",
            "self._memory[slot.header - STATE_OFFSET] = _READY",
        ),
        Survivor(
            "ring.slots.SlotTable._set_free",
            "self._memory[slot.header + STATE_OFFSET] = _FREE",
            "self._memory[slot.header - STATE_OFFSET] = _FREE",
        ),
    ),
    "These messages do not contain the reader id: the caller gave none.": (
        Survivor(
            "ring.slots.SlotTable.committed",
            "raise slot.stale_error(sequence, 0)",
            "raise slot.stale_error(sequence, None)",
        ),
        Survivor(
            "ring.slots.SlotTable.committed",
            "raise slot.stale_error(sequence, 0)",
            "raise slot.stale_error(sequence, 1)",
        ),
        Survivor(
            "ring.ring.SharedRingBuffer.wait_consumed",
            "raise found.stale_error(sequence, 0)",
            "raise found.stale_error(sequence, None)",
        ),
        Survivor(
            "ring.ring.SharedRingBuffer.wait_consumed",
            "raise found.stale_error(sequence, 0)",
            "raise found.stale_error(sequence, 1)",
        ),
        Survivor(
            "ring.ring.SharedRingBuffer._check_locked",
            "self._refuse_locked(slot, 0)",
            "self._refuse_locked(slot, None)",
        ),
        Survivor(
            "ring.ring.SharedRingBuffer._check_locked",
            "self._refuse_locked(slot, 0)",
            "self._refuse_locked(slot, 1)",
        ),
    ),
    "The same value, with a longer walk or without a default that is never used.": (
        Survivor(
            "ring.slots.SlotTable.statistics",
            "oldest_ready_age=next(ready, None) if count[_READY] else None,",
            "oldest_ready_age=next(ready, None) if (count[_READY]) or True else None,",
        ),
        Survivor(
            "ring.slots.SlotTable.statistics",
            "oldest_ready_age=next(ready, None) if count[_READY] else None,",
            "oldest_ready_age=next(ready, ) if count[_READY] else None,",
        ),
        Survivor(
            "ring.slots.SlotTable.statistics",
            "oldest_lease_age=max(itertools.islice(reading, count[_READING]), default=None),",
            "oldest_lease_age=max(itertools.islice(reading, None), default=None),",
        ),
    ),
    "No method reads the memory of a closed ring.": (
        Survivor("ring.slots.SlotTable.close", 'self._memory = memoryview(b"")', "self._memory = None"),
        Survivor(
            "ring.slots.SlotTable.close", 'self._memory = memoryview(b"")', 'self._memory = memoryview(b"XXXX")'
        ),
        Survivor("ring.slots.SlotTable.disown", 'self._memory = memoryview(b"")', "self._memory = None"),
        Survivor(
            "ring.slots.SlotTable.disown", 'self._memory = memoryview(b"")', 'self._memory = memoryview(b"XXXX")'
        ),
    ),
    "Counts more waiting claims than there are: a notification without a waiting thread has no effect.": (
        Survivor("ring.slots.SlotTable.__init__", "self._claimers = 0", "self._claimers = 1"),
        Survivor("ring.slots.SlotTable.wait_for_slot", "self._claimers += 1", "self._claimers -= 1"),
        Survivor("ring.slots.SlotTable.wait_for_slot", "self._claimers += 1", "self._claimers += 2"),
        Survivor("ring.slots.SlotTable.wait_for_slot", "self._claimers -= 1", "self._claimers = 1"),
        Survivor("ring.slots.SlotTable.wait_for_slot", "self._claimers -= 1", "self._claimers += 1"),
    ),
    "No thread waits on the condition in a forked child.": (
        Survivor(
            "ring.slots.SlotTable.disown",
            "self._claimable = threading.Condition(self.lock)",
            "self._claimable = None",
        ),
        Survivor(
            "ring.slots.SlotTable.disown",
            "self._claimable = threading.Condition(self.lock)",
            "self._claimable = threading.Condition(None)",
        ),
    ),
    "The text of a message that only a forked child shows; mutmut does not follow children.": (
        Survivor(
            "ring.slots.SlotTable.check_owned",
            'raise BufferClosedError("the ring belongs to the process that this one was forked from")',
            "raise BufferClosedError(None)",
        ),
        Survivor(
            "ring.slots.SlotTable.check_owned",
            'raise BufferClosedError("the ring belongs to the process that this one was forked from")',
            'raise BufferClosedError("XXthe ring belongs to the process that this one was forked fromXX")',
        ),
        Survivor(
            "ring.slots.SlotTable.check_owned",
            'raise BufferClosedError("the ring belongs to the process that this one was forked from")',
            'raise BufferClosedError("THE RING BELONGS TO THE PROCESS THAT THIS ONE WAS FORKED FROM")',
        ),
    ),
    "mutmut does not follow forked children; `tests/process/test_segment_process.py` fails with each.": (
        Survivor("ring.slots.SlotTable.disown", "self.lock = threading.Lock()", "self.lock = None"),
        Survivor(
            "ring.slots.SlotTable.disown",
            "self.closed = self.disowned = True",
            "self.closed = self.disowned = None",
        ),
        Survivor(
            "ring.slots.SlotTable.disown",
            "self.closed = self.disowned = True",
            "self.closed = self.disowned = False",
        ),
    ),
}
EXPLAINED: Final = {survivor: why for why, survivors in REASONS.items() for survivor in survivors}
