"""What mutation changes and no test notices, and the reason; `docs/testing.md` has the same table."""

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
    "These messages do not contain the reader id: the caller gave none.": (
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
    "Nothing reads the memory of a closed ring: every method raises first.": (
        Survivor("ring.slots.SlotTable.forget_memory", 'self._memory = memoryview(b"")', "self._memory = None"),
        Survivor(
            "ring.slots.SlotTable.forget_memory",
            'self._memory = memoryview(b"")',
            'self._memory = memoryview(b"XXXX")',
        ),
        Survivor("ring.core.RingCore._forget_memory", "self._memory = None", 'self._memory = ""'),
    ),
    "Counts more waiting claims than there are: a notification without a waiting claim has no effect.": (
        Survivor("ring.core.RingCore.__init__", "self.claimers = 0", "self.claimers = 1"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers += 1", "self.claimers -= 1"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers += 1", "self.claimers += 2"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers -= 1", "self.claimers = 1"),
        Survivor("ring.core.RingCore.wait_for_slot", "self.claimers -= 1", "self.claimers += 1"),
    ),
    "In a forked child no thread waits on the condition: every method raises first.": (
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
    "Declarations of a protocol: nothing runs them.": (
        Survivor(
            "protocol.server_session.LeaseSource.read_raw",
            "def read_raw(self, slot: int, sequence: int, reader: int = 0) -> LeaseLike: ...",
            "def read_raw(self, slot: int, sequence: int, reader: int = 1) -> LeaseLike: ...",
        ),
        Survivor(
            "protocol.server_session.LeaseSource.consume",
            "def consume(self, slot: int, sequence: int, reader: int = 0) -> bool: ...",
            "def consume(self, slot: int, sequence: int, reader: int = 1) -> bool: ...",
        ),
    ),
    "On the shm lane the view is made and not used.": (
        Survivor(
            "protocol.server_session.ServerSession._read",
            "view = lease.buffer if in_band else NO_BYTES",
            "view = lease.buffer if (in_band) or True else NO_BYTES",
        ),
    ),
    "The ring returns one result for each request, so both sequences have the same length.": (
        Survivor(
            "protocol.server_session.ServerSession._copy",
            "for frame, copy in zip(due, found, strict=True):",
            "for frame, copy in zip(due, found, ):",
        ),
        Survivor(
            "protocol.server_session.ServerSession._copy",
            "for frame, copy in zip(due, found, strict=True):",
            "for frame, copy in zip(due, found, strict=False):",
        ),
        Survivor(
            "protocol.server_session.ServerSession._copy",
            "for frame, copy in zip(due, found, strict=True):",
            "for frame, copy in zip(due, found, strict=None):",
        ),
    ),
    "One byte of a batch's budget.": (
        Survivor("protocol.server_session.ServerSession._copy", "nbytes = 0", "nbytes = 1"),
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
