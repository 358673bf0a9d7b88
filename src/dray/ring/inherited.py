"""A ring whose owner has died, at its heir: its READY payloads can be read and consumed, and no other is added.

Everything that an heir needs is in shared memory: the segment, and the words of `dray.ring.direct`. It trusts a
slot by its generation alone, which the owner writes after the header and the bytes of a payload, and clears before
it uses the slot again:

- A generation of 0 is a slot without a payload: FREE, WRITING, or given up by the owner.
- Any other one is a payload. With `RETIRING` its owner had not decided whether to drop it: it is kept.
- The board has what each reader has consumed. Checksums in headers are not used: the owner may have been killed
  while it wrote one.

A slot is never used again, so it does not matter which lease words of the dead owner's consumers name it. These
consumers keep their mappings; what they still acknowledge comes by the board and the doorbell, which the heir has.
"""

from __future__ import annotations

import os
from typing import Final, NoReturn

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import BufferClosedError
from dray.ring.direct import CLOSED, CONTROL_WORDS, MACHINE, RETIRING, DirectLeases, LeftWords, Machine
from dray.ring.layout import SLOT_HEADER, SegmentLayout
from dray.ring.ring import SharedRingBuffer
from dray.ring.segment import Segment, identify_segment
from dray.ring.shared_words import WORD_BYTES, SharedWords, check_words
from dray.ring.slot_state import SlotState
from dray.ring.slots import SlotTable

FOR_HEIR: Final = ("segment", "control", "board", "doorbell", "owner")
"""The descriptors of `SharedRingBuffer.for_heir`, in this order; the last one is a pidfd."""

_BLOCK_BYTES: Final = 512


def check_inheritance(segment: int, control: int, board: int, readers: int) -> tuple[SegmentLayout, bytes]:
    """The layout and the producer id of a ring that may be inherited later. Maps nothing.

    Raises:
        ProtocolError: a descriptor is not what it should be.
    """
    layout, producer_id = identify_segment(segment)
    check_words(control, layout.slots + CONTROL_WORDS)
    check_words(board, layout.slots * readers)
    return layout, producer_id


def closed_by_owner(control: int, slots: int) -> bool:
    """The owner has closed its ring in order: it leaves nothing.

    Args:
        control: the descriptor.
        slots: those of the ring.
    """
    return any(os.pread(control, WORD_BYTES, (slots + CLOSED) * WORD_BYTES))


def memory_of(segment: int) -> int:
    """The bytes of memory that a segment has."""
    return os.fstat(segment).st_blocks * _BLOCK_BYTES


class InheritedRing(SharedRingBuffer):
    """The ring of a producer that has died. It is served like any other, and takes no new payload.

    Args:
        segment: the descriptor of its memory. The caller may close all descriptors at once.
        left: those of its words.
        readers: how many readers it has.
        clock, machine: as for `SharedRingBuffer`.

    Attributes:
        inherited: how many payloads there are.
        inherited_bytes: their size.
        ignored: slots whose generation and header contradict each other; their payloads are lost.

    Raises:
        ProtocolError: a descriptor is not what it should be.
        OutOfResources, SlotError: no descriptor or memory is left.
    """

    def __init__(
        self, segment: int, left: LeftWords, readers: int, *, clock: Clock = MONOTONIC, machine: Machine = MACHINE
    ) -> None:
        self.segment = Segment.inherit(segment)
        try:
            layout = self.segment.layout
            self.slots = layout.slots
            self.slot_bytes = layout.slot_bytes
            self.on_full, self.readers, self.retain, self.parts = "error", readers, "unread", 1
            self.capacity_bytes = None
            self.machine = machine
            self.producer_id = self.segment.producer_id
            table = _InheritedTable(
                self.segment, machine, clock, readers=readers, on_full="error", retain="unread", parts=1
            )
            self._table = table
            with table.lock:
                self.ignored = table.inherit(left)
                self.inherited = table.ready
                self.inherited_bytes = sum(slot.nbytes for slot in table.live.values())
        except BaseException:
            self.close()
            raise

    def claim(self, nbytes: int, timeout: float | None = 30.0, *, part: int = 0) -> NoReturn:
        """Raise `BufferClosedError`: the slots of a dead producer are never used again."""
        raise BufferClosedError("the producer of this ring has died: its heir takes no new payload")

    def wait_all_consumed(self, timeout: float | None) -> bool:
        """Wait until every payload is consumed by all readers; False if `timeout` seconds have passed before.

        Raises:
            BufferClosedError: the ring was closed meanwhile.
        """
        deadline = Deadline.after(timeout)
        return all(
            self.wait_consumed(each.slot, each.sequence, deadline.timeout) for each in self.ready(leased=True)
        )

    def drop_all(self) -> int:
        """Give up every payload that is left: it is stale from now on. Returns how many there were."""
        left = self.ready(leased=True)
        readers = range(self.readers)
        self.consume_many((each.slot, each.sequence, reader) for each in left for reader in readers)
        return len(left)

    def close(self) -> None:
        """Wake all waiting threads with `BufferClosedError`, and free the memory. Twice is fine."""
        if hasattr(self, "_table"):
            super().close()
        else:
            self.segment.close()


class _InheritedTable(SlotTable):
    """The slots of a dead owner."""

    def inherit(self, left: LeftWords) -> int:
        """Take over every payload that has a generation; returns how many slots contradict theirs. With `lock`."""
        count, readers = len(self.slots), self._readers
        ignored = 0
        with SharedWords.attach(left.control, count + CONTROL_WORDS, writable=False) as control:
            generations = control.words[:count].tolist()
        self.direct = direct = DirectLeases(count, readers, self.clock, self._machine, left=left)
        for slot, word in zip(self.slots, generations, strict=True):
            generation = word & ~RETIRING
            if not generation:
                continue
            _, _, sequence, nbytes, _, _, _ = SLOT_HEADER.unpack_from(self._memory, slot.header)
            if sequence + 1 != generation or nbytes > self._slot_bytes:
                ignored += 1
                continue
            consumed = sum(1 << each for each in range(readers) if direct.has_consumed(slot.index, sequence, each))
            if consumed == self._all_readers:
                continue
            slot.state, slot.sequence, slot.nbytes = SlotState.READY, sequence, nbytes
            slot.consumed_by, slot.retired, slot.committed_at = consumed, False, self._now()
            self._committed += 1
            self._committed_bytes += nbytes
        self.changing = True
        self.mend()  # everything else follows, generations without `RETIRING` among it
        return ignored
