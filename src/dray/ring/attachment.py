"""Direct leases, the consumer's side: payloads of a ring on this host, leased without asking its owner.

A lease begins with a lease word and ends with it, see `dray.ring.direct` for the words:

1. Take a lease word, and store slot + 1 in it.
2. Load the slot's generation. If it is not the payload's, clear the word: the payload is stale. With `RETIRING`,
   only the server knows.
3. Load the board: if this reader has consumed the payload, clear the word: stale.
4. From here on the slot does not change until the word is cleared.
5. End: if the payload was consumed, store its number on the board; clear the word; give the word back; load the
   doorbell and ring if it is set.

No step is a system call, waits, or needs the owner to run. The owner's barrier makes the order of these loads and
stores visible to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dray.errors import ProtocolError, SlotError, StaleSlotError
from dray.forking import here
from dray.resources import Closing
from dray.ring.consumer_events import Bell, Descriptor, ProcessDescriptor
from dray.ring.direct import CLOSED, CONTROL_WORDS, DOORBELL, MAX_SEQUENCE, PAGE_WORDS, RETIRING
from dray.ring.layout import NBYTES_OFFSET, SLOT_HEADER
from dray.ring.segment import Segment
from dray.ring.shared_words import WORD_BYTES, SharedWords

OWNER_CHECK_SECONDS: Final = 0.05
"""Whether the owner's process has ended is looked up this often, at most, when a lease begins."""

SENT: Final = ("segment", "control", "board", "lease page", "doorbell", "owner")
"""The descriptors that come with WELCOME, in this order; the last one is a pidfd."""

_HEADER_WORDS: Final = SLOT_HEADER.size // WORD_BYTES


class Attachment(Closing):
    """The direct access of one reader in one process to one ring. Thread-safe.

    Args:
        segment, control, board, page: the memory that the owner has shared; the attachment owns it.
        bell: the owner's doorbell.
        owner: a pidfd of the owner's process.
        reader: the reader id.
        newest: the ring keeps only the newest payload; nothing is consumed there.
        now: the source of time.

    Attributes:
        segment: the memory of the ring.
        memory, array: its bytes, read-only, as a view and as uint8 of shape (nbytes,).
        closed: no new lease can begin: `close` was called, or the owner has ended.
    """

    closed, mark = True, -1  # until it is complete

    def __init__(
        self,
        segment: Segment,
        *,
        control: SharedWords,
        board: SharedWords,
        page: SharedWords,
        bell: Bell,
        owner: ProcessDescriptor,
        reader: int,
        newest: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.segment = segment
        self.memory = segment.view
        self.array: npt.NDArray[np.uint8] = np.frombuffer(segment.view, np.uint8)
        layout = segment.layout
        self._slots = layout.slots
        self._headers = segment.view.cast("Q")
        self._first_size = (layout.header_offset(0) + NBYTES_OFFSET) // WORD_BYTES
        self._first, self._stride = layout.slot_offset(0), layout.stride
        self._shared = control, board, page
        self._control, self._board, self._page = control.words, board.words, page.words
        self._doorbell = layout.slots + DOORBELL
        self._readers = len(self._board) // layout.slots
        self._bell = bell
        self._owner = owner
        self._reader = reader
        self._consumes = not newest
        self._free = list(range(len(self._page) - 1))
        self._lock = threading.Lock()  # guards `_free`
        # By lease word, so that threads count without a lock. The last is for leases that have ended.
        self._reads = [0] * len(self._page)
        self._read_bytes = [0] * len(self._page)
        self.mark = here[0]
        self._now = now
        self._checked = now()
        self.closed = False

    @classmethod
    def open(
        cls, descriptors: list[int], *, slots: int, readers: int, leases: int, reader: int, newest: bool
    ) -> Attachment:
        """Map what the owner has sent, and take the descriptors out of their list.

        Args:
            descriptors: that of the segment, and those of `DirectLeases.descriptors`.
            slots, readers: those of the ring.
            leases: lease words of the page.
            reader, newest: as for `Attachment`.

        Raises:
            ProtocolError: a descriptor is not what it should be.
            OutOfResources, SlotError: the memory cannot be mapped.
        """
        if len(descriptors) != len(SENT):
            raise ProtocolError(f"{len(descriptors)} descriptors came with the handshake instead of {len(SENT)}")
        segment, control, board, page = (Descriptor(descriptors.pop, 0) for _ in SENT[:-2])
        bell, owner = Bell(descriptors.pop, 0), ProcessDescriptor(descriptors.pop, 0)
        with segment, control, board, page:
            return cls(
                Segment.attach(segment.fileno()),
                control=SharedWords.attach(control.fileno(), slots + CONTROL_WORDS, writable=False),
                board=SharedWords.attach(board.fileno(), slots * readers, writable=True),
                page=SharedWords.attach(page.fileno(), leases + PAGE_WORDS, writable=True),
                bell=bell,
                owner=owner,
                reader=reader,
                newest=newest,
            )

    @property
    def usable(self) -> bool:
        """False once the owner is gone or has closed its ring; then leases find nothing."""
        if not self.closed:
            self._checked = self._now()
            if self._control[self._slots + CLOSED] or self._owner.has_ended():
                self.close()
        return not self.closed

    def lease(self, slot: int, sequence: int, nbytes: int) -> DirectLease | None:
        """Lease a payload; None if only the server knows whether that is possible, or if all words are in use.

        Raises:
            StaleSlotError: the payload is gone, or this reader has consumed it.
            SlotError: it has another size.
        """
        if self.closed or here[0] != self.mark:
            return None
        if self._now() - self._checked > OWNER_CHECK_SECONDS and not self.usable:
            return None
        if not (0 <= slot < self._slots and sequence < MAX_SEQUENCE):
            raise StaleSlotError("the ring never held that payload", slot=slot, sequence=sequence)
        lease = DirectLease(self, slot, sequence, nbytes)
        generation = sequence + 1
        try:
            with self._lock:
                # No call between these two, after which an exception of a signal handler could come.
                if not self._free:
                    return None
                lease.word = self._free[-1]
                del self._free[-1]
            self._page[lease.word] = slot + 1
            found = self._control[slot]
            consumed = self._board[slot * self._readers + self._reader] == generation
            # `closed` is read last: who closes sets it before it ends the attachment.
            if found == generation and not consumed and not self.closed:
                size = self._headers[self._first_size + slot * _HEADER_WORDS]
                if size == nbytes:
                    lease.offset = self._first + slot * self._stride
                    return lease
                why = f"the payload has {size} bytes, {nbytes} according to its reference"
                raise SlotError(why, slot=slot, sequence=sequence)
            lease.end(consumed=False)
        except BaseException:
            lease.end(consumed=False)
            raise
        if found == generation | RETIRING or not self.usable:
            return None
        raise StaleSlotError("the payload was consumed or overwritten", slot=slot, sequence=sequence)

    def count_read(self, lease: DirectLease) -> None:
        """The payload of a lease, which has not ended, was handed out."""
        word = lease.word
        self._reads[word] += 1
        self._read_bytes[word] += lease.nbytes

    def acknowledge(self, lease: DirectLease) -> bool:
        """This reader has consumed the payload of a lease, which lasts on; False if it has ended.

        An owner that waits learns it when the lease ends, or by `ring_if_awaited`.
        """
        word = lease.word
        if word < 0 or here[0] != self.mark:
            return False
        if self._consumes and self._page[word]:
            self._board[lease.slot * self._readers + self._reader] = lease.sequence + 1
        return True

    def ring_if_awaited(self) -> None:
        """Wake the owner if it waits for consumers."""
        if self._control[self._doorbell] and here[0] == self.mark:
            self.ring()

    @property
    def free_leases(self) -> int:
        """Lease words that are not in use."""
        return len(self._free)

    def ring(self) -> None:
        """Wake the owner."""
        self._bell.ring()

    @property
    def reads(self) -> int:
        """Payloads that were handed out."""
        return sum(self._reads)

    @property
    def read_bytes(self) -> int:
        """Their size."""
        return sum(self._read_bytes)

    def close(self) -> None:
        """Begin no more leases. Those that have begun last, with the memory, until they end.

        Twice is fine: it does what an exception of a signal handler has left.
        """
        if here[0] == self.mark:
            self.closed = True
            self._page[-1] = 1  # last: the owner forgets this attachment once no lease word is left
            if self._control[self._doorbell]:
                self._bell.ring()
            self._close_descriptors()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._page) - 1 - len(self._free)} leases"
        return f"<Attachment to {self.segment.producer_id.hex()[:8]}, {state}>"

    # --- for `DirectLease` --------------------------------------------------------------------------------------

    def clear(self, lease: DirectLease, consumed: bool) -> None:
        """End a lease in shared memory. May be repeated after an exception of a signal handler."""
        word = lease.word
        if word >= 0:
            if consumed and self._consumes and self._page[word]:  # once it is 0, the slot may have another payload
                self._board[lease.slot * self._readers + self._reader] = lease.sequence + 1
            self._page[word] = 0
            if self._control[self._doorbell]:
                self._bell.ring()
            lease.word = -1
            self._free.append(word)  # last: from then on, another thread may close the doorbell
        if self.closed:
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        """With the last lease: its thread has rung."""
        with self._lock:
            if len(self._free) == len(self._page) - 1:
                self._bell.close()
                self._owner.close()


class DirectLease:
    """The right of a consumer to one payload. It ends once, by `end` or with this object.

    Attributes:
        attachment: what it was leased with.
        slot, sequence, nbytes: the payload.
        offset: where it lies in the segment.
        word: index of its lease word; -1 without one.
    """

    __slots__ = ("__weakref__", "_ender", "attachment", "nbytes", "offset", "sequence", "slot", "word")
    offset: int  # once the lease is granted

    def __init__(self, attachment: Attachment, slot: int, sequence: int, nbytes: int) -> None:
        self.attachment = attachment
        self._ender: dict[int, Any] = {}
        self.slot = slot
        self.sequence = sequence
        self.nbytes = nbytes
        self.word = -1

    @property
    def buffer(self) -> memoryview:
        """The payload in its slot, read-only. It must not be used after the end of the lease."""
        return self.attachment.memory[self.offset : self.offset + self.nbytes]

    def end(self, consumed: bool) -> bool:
        """End the lease; False if it has ended before. In a forked child this changes nothing."""
        attachment, ender = self.attachment, self._ender
        if here[0] != attachment.mark:
            return False
        mine = object()
        try:
            if ender.setdefault(0, mine) is not mine:
                return False
            attachment.clear(self, consumed)
        except BaseException:
            if ender.get(0) is mine:  # an exception of a signal handler must not leave the word
                attachment.clear(self, consumed)
            raise
        return True

    def __del__(self) -> None:
        try:
            if self.word >= 0 and not self.end(consumed=False) and here[0] == self.attachment.mark:
                self.attachment.clear(self, consumed=False)  # exceptions of signal handlers came twice
        except AttributeError:  # `__init__` did not end
            return

    def __repr__(self) -> str:
        state = "ended" if self._ender else "live"
        return f"<DirectLease slot {self.slot} sequence {self.sequence}, {self.nbytes} bytes, {state}>"
