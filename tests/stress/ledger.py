"""What the processes of a stress run share: the payloads by sequence number, and a ledger of what each has done.

The ledger consists of files in a folder, mapped by all. A process that is killed loses none of its counts. Every
item has one writer, except for `gone`, in which all writers store the same value.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import signal
from pathlib import Path
from typing import Final

import numpy as np

MIN_BYTES, MAX_BYTES = 8, 1024
_SEQUENCE_BYTES: Final = 8
_PR_SET_PDEATHSIG: Final = 1
_BLOCK: Final = np.random.default_rng(29).bytes((1 << 16) + MAX_BYTES)

STOP, END, PRODUCED, NEWEST, CHOSEN, HEAD_WORDS = range(6)
"""Words of the head: no more payloads are wanted; the consumers end when they have them all; payloads committed;
the newest of them, sequence number and slot; the one that a close build is about to drop, sequence number + 1."""


class Count(enum.IntEnum):
    """What a consumer counts."""

    CURSOR = 0  # the payload that it wants next, where it has to consume each
    LEASES = enum.auto()  # payloads that it could read, in place or copied
    DIRECT = enum.auto()  # those of them that the server was not asked for
    CONSUMED = enum.auto()
    STALE = enum.auto()  # payloads that were gone
    GUESSED = enum.auto()  # payloads that it asked for before they were announced, and got
    WRONG_BYTES = enum.auto()  # when the lease had begun
    CHANGED_BYTES = enum.auto()  # right at first, then wrong under the lease
    GIVEN_AGAIN = enum.auto()  # leased although this reader had consumed it, or had been notified that it is stale
    LOST = enum.auto()  # stale although this reader has not consumed it and nothing may be dropped
    OTHER_ERRORS = enum.auto()
    FORKS = enum.auto()
    FAULTY_CHILDREN = enum.auto()  # forked children that could lease, or ended with an error


def end_with_parent() -> None:
    """Have the kernel end this process when the supervisor ends, however that does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def nbytes_of(sequence: int) -> int:
    """The size of a payload."""
    return MIN_BYTES + sequence * 2_654_435_761 % (MAX_BYTES - MIN_BYTES + 1)


def payload_of(sequence: int) -> bytes:
    """The bytes of a payload: its sequence number, and then bytes that differ with it."""
    first = sequence * 40_503 & 0xFFFF
    return (
        sequence.to_bytes(_SEQUENCE_BYTES, "little")
        + _BLOCK[first : first + nbytes_of(sequence) - _SEQUENCE_BYTES]
    )


class Ledger:
    """The ledger in `folder`.

    Args:
        payloads: the most payloads that are committed.
        slots: of the ring.
        consumers, readers: how many there are; several consumers may share a reader id.

    Attributes:
        head: `STOP`, `PRODUCED` and so on.
        current: for each slot, the sequence number + 1 of the payload that was committed there last.
        slots: the slot of each payload.
        checked: for each consumer and payload, 1 before it is consumed, after its bytes were compared.
        done: for each consumer and payload, 1 after it was consumed.
        gone: for each reader and payload, 1 when a consumer knows that the reader cannot lease it any more.
        counts: for each consumer, a `Count`.
    """

    def __init__(self, folder: Path, *, payloads: int, slots: int, consumers: int, readers: int) -> None:
        self._folder = folder
        self.payloads = payloads
        self.head = self._map("head", HEAD_WORDS * 8).cast("Q")
        self.current = self._map("current", slots * 8).cast("Q")
        self.slots = self._map("slots", payloads * 4).cast("I")
        self.checked = [self._map(f"checked-{each}", payloads) for each in range(consumers)]
        self.done = [self._map(f"done-{each}", payloads) for each in range(consumers)]
        self.gone = [self._map(f"gone-{each}", payloads) for each in range(readers)]
        self.counts = [self._map(f"counts-{each}", len(Count) * 8).cast("Q") for each in range(consumers)]

    def announce(self, slot: int, sequence: int) -> None:
        """Let consumers know of a payload that is committed."""
        self.slots[sequence] = slot
        self.current[slot] = sequence + 1
        self.head[NEWEST] = sequence << 16 | slot
        self.head[PRODUCED] = sequence + 1

    def total(self, count: Count) -> int:
        """A count, over all consumers."""
        return sum(counts[count] for counts in self.counts)

    def numbers(self, marks: memoryview, payloads: int) -> int:
        """How many of the first `payloads` are marked."""
        return int(np.count_nonzero(np.frombuffer(marks, np.uint8, payloads)))

    def marked_by_any(self, marks: list[memoryview], payloads: int) -> int:
        """How many of the first `payloads` are marked by at least one consumer."""
        found = np.zeros(payloads, bool)
        for each in marks:
            found |= np.frombuffer(each, np.uint8, payloads) != 0
        return int(np.count_nonzero(found))

    def _map(self, name: str, nbytes: int) -> memoryview:
        with (self._folder / name).open("a+b") as file:
            file.truncate(nbytes)
            return memoryview(mmap.mmap(file.fileno(), nbytes))
