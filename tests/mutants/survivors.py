"""What mutation changes and no test notices, and why that is so; `docs/testing.md` tells the same."""

from typing import Final, NamedTuple


class Survivor(NamedTuple):
    """A change that no test notices.

    Attributes:
        function: module, class and function, below `dray`.
        old: the lines that are gone.
        new: the lines in their place.
    """

    function: str
    old: str
    new: str


REASONS: Final[dict[str, tuple[Survivor, ...]]] = {
    "A new slot is FREE; `claim`, `commit` or the first lease writes these before anything reads them.": (
        Survivor("ring.slots.Slot.__init__", "self.sequence = -1", "self.sequence = -2"),
        Survivor("ring.slots.Slot.__init__", "self.nbytes = 0", "self.nbytes = None"),
        Survivor("ring.slots.Slot.__init__", "self.nbytes = 0", "self.nbytes = 1"),
        Survivor("ring.slots.Slot.__init__", "self.checksum: int | None = None", 'self.checksum: int | None = ""'),
        Survivor("ring.slots.Slot.__init__", "self.committed_at = 0.0", "self.committed_at = None"),
        Survivor("ring.slots.Slot.__init__", "self.committed_at = 0.0", "self.committed_at = 1.0"),
        Survivor("ring.slots.Slot.__init__", "self.leased_at = 0.0", "self.leased_at = None"),
        Survivor("ring.slots.Slot.__init__", "self.leased_at = 0.0", "self.leased_at = 1.0"),
        Survivor("ring.slots.Slot.__init__", "self.consumed_by = 0", "self.consumed_by = None"),
        Survivor("ring.slots.Slot.__init__", "self.consumed_by = 0", "self.consumed_by = 1"),
        Survivor("ring.slots.Slot.__init__", "self.delivered = False", "self.delivered = None"),
        Survivor("ring.slots.Slot.__init__", "self.delivered = False", "self.delivered = True"),
        Survivor("ring.slots.SlotTable.claim", "slot.nbytes = nbytes", "slot.nbytes = None"),
    ),
    "`None` instead of `False` in attributes and arguments that are only tested for truth.": (
        Survivor(
            "ring.slots.SlotTable.claim",
            "slot.delivered = slot.over = False",
            "slot.delivered = slot.over = None",
        ),
        Survivor("ring.core.RingCore.__init__", "self.disowned = False", "self.disowned = None"),
        Survivor(
            "ring.ring.SharedRingBuffer.release_reading",
            "return self._finish(lease, False)",
            "return self._finish(lease, None)",
        ),
    ),
    "`STATE_OFFSET` is 0.": (
        Survivor(
            "ring.slots.SlotTable.lease",
            "self._memory[slot.header + STATE_OFFSET] = _READING",
            "self._memory[slot.header - STATE_OFFSET] = _READING",
        ),
        Survivor(
            "ring.slots.SlotTable.finish",
            "self._memory[slot.header + STATE_OFFSET] = _READY",
            "self._memory[slot.header - STATE_OFFSET] = _READY",
        ),
        Survivor(
            "ring.slots.SlotTable._set_free",
            "self._memory[slot.header + STATE_OFFSET] = _FREE",
            "self._memory[slot.header - STATE_OFFSET] = _FREE",
        ),
    ),
    "The reader's number is not in these messages: no reader has been asked for.": (
        Survivor(
            "ring.slots.SlotTable.committed",
            "raise self.stale_error(slot, sequence, 0)",
            "raise self.stale_error(slot, sequence, None)",
        ),
        Survivor(
            "ring.slots.SlotTable.committed",
            "raise self.stale_error(slot, sequence, 0)",
            "raise self.stale_error(slot, sequence, 1)",
        ),
        Survivor(
            "ring.ring.SharedRingBuffer.wait_consumed",
            "raise self._table.stale_error(cell, sequence, 0)",
            "raise self._table.stale_error(cell, sequence, None)",
        ),
        Survivor(
            "ring.ring.SharedRingBuffer.wait_consumed",
            "raise self._table.stale_error(cell, sequence, 0)",
            "raise self._table.stale_error(cell, sequence, 1)",
        ),
        Survivor("ring.ring.SharedRingBuffer._find", "self._refuse(slot, 0)", "self._refuse(slot, None)"),
        Survivor("ring.ring.SharedRingBuffer._find", "self._refuse(slot, 0)", "self._refuse(slot, 1)"),
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
    "Nothing reads the memory of a closed ring: every method refuses first.": (
        Survivor("ring.slots.SlotTable.forget_memory", 'self._memory = memoryview(b"")', "self._memory = None"),
        Survivor(
            "ring.slots.SlotTable.forget_memory",
            'self._memory = memoryview(b"")',
            'self._memory = memoryview(b"XXXX")',
        ),
        Survivor("ring.core.RingCore._forget_memory", "self._memory = None", 'self._memory = ""'),
    ),
    "Counts more waiting claims than there are: somebody is notified although nobody waits.": (
        Survivor("ring.core.RingCore.__init__", "self.claimers = 0", "self.claimers = 1"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers += 1", "self.claimers -= 1"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers += 1", "self.claimers += 2"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers -= 1", "self.claimers = 1"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers -= 1", "self.claimers += 1"),
    ),
    "Nobody waits on the condition in a forked child: every method refuses first.": (
        Survivor(
            "ring.core.RingCore._disown",
            "self.claimable = threading.Condition(self.lock)",
            "self.claimable = None",
        ),
        Survivor(
            "ring.core.RingCore._disown",
            "self.claimable = threading.Condition(self.lock)",
            "self.claimable = threading.Condition(None)",
        ),
    ),
    "The text of a message that only a forked child sees; mutmut does not follow children.": (
        Survivor(
            "ring.core.RingCore.closed_error",
            'return BufferClosedError("the ring belongs to the process that this one was forked from")',
            "return BufferClosedError(None)",
        ),
        Survivor(
            "ring.core.RingCore.closed_error",
            'return BufferClosedError("the ring belongs to the process that this one was forked from")',
            'return BufferClosedError("XXthe ring belongs to the process that this one was forked fromXX")',
        ),
        Survivor(
            "ring.core.RingCore.closed_error",
            'return BufferClosedError("the ring belongs to the process that this one was forked from")',
            'return BufferClosedError("THE RING BELONGS TO THE PROCESS THAT THIS ONE WAS FORKED FROM")',
        ),
    ),
    "mutmut does not follow forked children; `tests/process/test_segment_process.py` fails with each.": (
        Survivor("ring.core.RingCore._disown", "self.lock = threading.Lock()", "self.lock = None"),
        Survivor(
            "ring.core.RingCore._disown",
            "self.closed = self.disowned = True",
            "self.closed = self.disowned = None",
        ),
        Survivor(
            "ring.core.RingCore._disown",
            "self.closed = self.disowned = True",
            "self.closed = self.disowned = False",
        ),
    ),
}
EXPLAINED: Final = {survivor: why for why, survivors in REASONS.items() for survivor in survivors}
