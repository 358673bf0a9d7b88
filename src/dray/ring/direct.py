"""Direct leases, the owner's side: the words that a ring shares with the consumers of its host.

A consumer on the owner's host leases a payload in shared memory alone, see `dray.ring.attachment`. Its lease word
keeps the slot as it is. The owner reads the words when it needs to know:

| object | written by | content |
|---|---|---|
| control | the owner | a generation for each slot; then the doorbell and the closed word |
| board | every consumer, and the owner | for each (slot, reader id) the payload that this reader consumed last |
| lease page | one consumer | its lease words; then a word that ends the attachment |

A generation is the payload's sequence number + 1 while new leases may begin, the same with `RETIRING` while a drop
is undecided, else 0. Lease words hold slot + 1 or 0, words of the board a sequence number + 1.

`DirectLeases` knows the words, `SlotTable` what they mean for its slots. A slot is used again only after its
generation was 0 (or `RETIRING`), a barrier has passed, and then no lease word of the attachments on the list named
it: in this order. An attachment is on the list before its consumer can write, and leaves it when its process has
ended, or when the consumer has ended it and no lease word is left.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dray.clock import MONOTONIC, Clock
from dray.forking import notices_every_fork
from dray.resources import Closing, needing
from dray.ring import membarrier
from dray.ring.consumer_events import ConsumerEvents, Descriptor
from dray.ring.shared_words import SharedWords

MAX_BOARD_WORDS: Final = 65_536
"""Words of a board: the owner reads all of them to learn what was consumed."""

MAX_ATTACHMENTS: Final = 1024

MAX_SEQUENCE: Final = 1 << 62
RETIRING: Final = 1 << 63
DOORBELL, CLOSED, CONTROL_WORDS = 0, 1, 2
"""Words of the control after the generations: index from `slots` on, and how many there are."""

PAGE_WORDS: Final = 1
"""Words of a lease page after the lease words: the one that ends the attachment."""

RESCAN_SECONDS: Final = 0.1
"""A thread that waits for consumers reads the words this often, in case the doorbell does not come."""


MAX_ATTACHMENTS_OF_PROCESS: Final = 16
"""A consumer that fails to map what it gets leaves an attachment until its process ends."""


@functools.cache
def direct_problem() -> str:
    """Why this process can neither offer nor use direct leases; empty if it can."""
    if sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "only CPython with its interpreter lock is supported"
    if why := membarrier.problem():
        return why
    if not notices_every_fork:
        return "this kernel does not wipe memory on a fork (MADV_WIPEONFORK)"
    try:
        own = Descriptor(os.pidfd_open, os.getpid())
    except OSError as error:
        return f"pidfd_open is refused ({error.strerror})"
    with own:
        if pid_behind(own.fileno()) != os.getpid():
            return "/proc does not describe the descriptors of this process"
    return "" if kernel_digest() else "/proc does not describe this kernel"


@functools.cache
def kernel_digest() -> bytes:
    """32 bytes that are the same in all processes under one running kernel, else different; empty if unknown."""
    digest = hashlib.blake2b(digest_size=32)
    try:
        for path in ("/proc/sys/kernel/random/boot_id", "/proc/version"):
            with Path(path).open("rb") as file:
                digest.update(file.read())
    except OSError:
        return b""
    return digest.digest()


def pid_behind(descriptor: int) -> int | None:
    """The process behind a pidfd: 0 if it is in another namespace, -1 if it has ended; None if it is no pidfd."""
    with suppress(OSError, ValueError), Path(f"/proc/self/fdinfo/{descriptor}").open("rb") as file:
        for line in file:
            if line.startswith(b"Pid:"):
                return int(line[4:])
    return None


class Machine:
    """What a ring gets from its machine. A simulation overrides all methods."""

    def lock(self) -> threading.Lock:
        """A new lock."""
        return threading.Lock()

    def condition(self, lock: threading.Lock) -> threading.Condition:
        """A new condition of what `lock` guards."""
        return threading.Condition(lock)

    def words(self, count: int) -> SharedWords:
        """See `SharedWords.create`."""
        return SharedWords.create(count)

    def events(self) -> ConsumerEvents:
        """See `ConsumerEvents`."""
        return ConsumerEvents()

    def barrier(self) -> None:
        """See `dray.ring.membarrier.barrier`."""
        membarrier.barrier()

    def own_process(self) -> Descriptor:
        """A pidfd of this process."""
        return Descriptor(os.pidfd_open, os.getpid())

    def pid_behind(self, descriptor: int) -> int | None:
        """See `pid_behind`."""
        return pid_behind(descriptor)


MACHINE: Final = Machine()


class LeftWords(NamedTuple):
    """What the owner of a ring has left, as descriptors. The caller may close them once they were used."""

    control: int
    board: int
    bell: int


class WordLease(NamedTuple):
    """A lease word, as the owner has found it."""

    pid: int
    slot: int
    sequence: int
    reader: int
    age: float  # seconds since it was found first


@dataclass(slots=True, eq=False)
class Attached:
    """A consumer that may lease directly.

    Attributes:
        pid: its process.
        reader: its reader id.
        page: its lease words.
        process: a pidfd of its process.
        words: the lease words, as they were read last.
        found: those that name a slot, by index: the word, and when it was found first.
    """

    pid: int
    reader: int
    page: SharedWords
    process: Descriptor
    words: list[int] = field(default_factory=list)
    found: dict[int, tuple[int, float]] = field(default_factory=dict)

    def note(self, words: list[int], slots: int, now: float) -> int:
        """Keep lease words that were read; the number of those without a meaning."""
        previous, self.found, self.words = self.found, {}, words
        ignored = 0
        for index, word in enumerate(words):
            if 0 < word <= slots:
                known = previous.get(index)
                self.found[index] = known if known is not None and known[0] == word else (word, now)
            else:
                ignored += word != 0
        return ignored


class DirectLeases(Closing):
    """The direct consumers of one ring. All but `barriers` needs the lock of the ring's table.

    Args:
        slots, readers: those of the ring.
        clock: measures ages and barriers.
        machine: where memory, barriers and events come from.
        left: the words of the ring's owner, which has died, for its heir; by default new ones are made.

    Attributes:
        attached: the consumers, by the number of their pidfd.
        barriers: what makes the words of consumers visible.
        events: what wakes the owner.
        ignored_words: words that a faulty consumer has written and that mean nothing.
        waiting: threads that wait for consumers.
        suspended: consumers ask for every payload: no server is there for the ring.

    Raises:
        OutOfResources: no descriptor or memory is left.
        ProtocolError: what was `left` does not have the size that it should.
    """

    def __init__(
        self,
        slots: int,
        readers: int,
        clock: Clock = MONOTONIC,
        machine: Machine = MACHINE,
        *,
        left: LeftWords | None = None,
    ) -> None:
        self.attached: dict[int, Attached] = {}
        self.barriers = membarrier.Barriers(clock, machine.barrier)
        self.ignored_words = 0
        self.waiting = 0
        self.suspended = False
        self._now = clock.now
        self._machine = machine
        self._slots, self._readers = slots, readers
        self.events = machine.events() if left is None else ConsumerEvents(left.bell)
        try:
            if left is None:
                self.control = machine.words(slots + CONTROL_WORDS)
                self.board = machine.words(slots * readers)
            else:
                self.control = SharedWords.inherit(left.control, slots + CONTROL_WORDS)
                self.board = SharedWords.inherit(left.board, slots * readers)
            with needing("direct leases"):
                self._control_to_read = Descriptor(os.open, self.control.path, os.O_RDONLY | os.O_CLOEXEC)
                self._owner = machine.own_process()
        except BaseException:
            self.close()
            raise
        self._generations = self.control.words
        self._consumed = self.board.words
        self._generation_array: Any = self.control.array()[:slots]
        self._board_array: Any = self.board.array().reshape(slots, readers)

    # --- what the owner writes --------------------------------------------------------------------------------

    def publish(self, slot: int, sequence: int) -> None:
        """Let leases of a payload begin; its bytes and its header are complete."""
        self._generations[slot] = (sequence + 1) | RETIRING if self.suspended else sequence + 1

    def retire(self, slot: int) -> None:
        """Let no new lease begin."""
        self._generations[slot] = 0

    def suspect(self, slot: int, sequence: int) -> None:
        """Let consumers ask the server until it is decided whether the payload is dropped."""
        self._generations[slot] = (sequence + 1) | RETIRING

    def mark_consumed(self, slot: int, sequence: int, reader: int) -> None:
        """A reader has consumed a payload over a connection: it must not lease it directly any more."""
        self._consumed[slot * self._readers + reader] = sequence + 1

    def begin_wait(self) -> None:
        """A thread is about to wait: consumers ring from now on. A barrier must follow, and then a `Scan`."""
        self.waiting += 1
        self._generations[self._slots + DOORBELL] = 1

    def end_wait(self) -> None:
        """A thread waits no longer."""
        self.waiting -= 1
        if not self.waiting:
            self._generations[self._slots + DOORBELL] = 0

    # --- what consumers write ---------------------------------------------------------------------------------

    def take_events(self) -> None:
        """Take processes that have ended off the list, and silence the doorbell; the words are read after it."""
        for number in self.events.collect():
            attached = self.attached.get(number)
            if attached is not None:
                self._remove(attached)

    def has_consumed(self, slot: int, sequence: int, reader: int) -> bool:
        """A reader has consumed a payload, according to its word of the board."""
        return bool(self._consumed[slot * self._readers + reader] == sequence + 1)

    def consumed(self) -> Iterator[tuple[int, int]]:
        """(slot, reader id) of all payloads with a generation that a reader has consumed."""
        generations = self._generation_array & np.uint64(RETIRING - 1)
        match: Any = (self._board_array == generations[:, None]) & (generations != 0)[:, None]
        slots, readers = match.nonzero()
        return zip(slots.tolist(), readers.tolist(), strict=True)

    def named(self) -> dict[int, int]:
        """The slots that lease words name, with the number of these words.

        Attachments that have ended are taken off the list. After a barrier, a slot that is not among them and had
        no generation before the barrier has no direct lease, and gets none.
        """
        named: dict[int, int] = {}
        now = self._now()
        for attached in tuple(self.attached.values()):
            ended = attached.page.words[-1]  # first: no lease word is written after this one
            words = attached.page.words[:-1].tolist()
            if words != attached.words:
                self.ignored_words += attached.note(words, self._slots, now)
            for word, _ in attached.found.values():
                named[word - 1] = named.get(word - 1, 0) + 1
            if ended and not any(words):
                self._remove(attached)
        return named

    def leases(self, sequences: Sequence[int]) -> list[WordLease]:
        """The lease words that `named` has found last; `sequences` are those of the slots."""
        now = self._now()
        return [
            WordLease(attached.pid, word - 1, sequences[word - 1], attached.reader, now - since)
            for attached in self.attached.values()
            for word, since in attached.found.values()
        ]

    def statistics(self) -> dict[str, Any]:
        """The fields of `RingStatistics` that are known here."""
        barriers = self.barriers
        return {
            "attachments": len(self.attached), "ignored_words": self.ignored_words, "barriers": barriers.count,
            "barrier_failures": barriers.failures, "barrier_p99": barriers.p99,
        }  # fmt: skip

    # --- attachments ------------------------------------------------------------------------------------------

    def attach(self, process: Descriptor, pid: int, reader: int, leases: int) -> Attached | None:
        """Put a consumer on the list; None if there are too many.

        Args:
            process: a pidfd of its process.
            pid: its process.
            reader: its reader id.
            leases: how many lease words it gets.

        Raises:
            OutOfResources: no descriptor or memory is left.
        """
        if self._is_full(pid):
            self.take_events()
            self.named()
            if self._is_full(pid):
                return None
        page = self._machine.words(leases + PAGE_WORDS)
        attached = Attached(pid, reader, page, process)
        try:
            self.events.watch(process.fileno())
            self.attached[process.fileno()] = attached
        except BaseException:
            self._remove(attached)
            raise
        return attached

    def descriptors(self, attached: Attached) -> list[int]:
        """What a consumer gets: control, board, its page, the doorbell, and a pidfd of this process."""
        return [
            self._control_to_read.fileno(), self.board.fileno(), attached.page.fileno(), self.events.bell,
            self._owner.fileno(),
        ]  # fmt: skip

    def for_heir(self) -> list[int]:
        """What an heir of the ring gets: control, board, the doorbell, and a pidfd of this process."""
        return [self.control.fileno(), self.board.fileno(), self.events.bell, self._owner.fileno()]

    def close(self) -> None:
        """Let no lease begin any more, and keep nothing. Consumers keep their mappings. Twice is fine."""
        if hasattr(self, "_owner"):
            words = self.control.words
            if words:
                words[self._slots + CLOSED] = 1  # first: a consumer that finds 0 then knows why
                for slot in range(self._slots):
                    words[slot] = 0
            self.control.close()
            self.board.close()
            self._control_to_read.close()
            self._owner.close()
            self._generations = self._consumed = memoryview(b"")
            self._generation_array = self._board_array = np.empty(0, np.uint64)
        for attached in tuple(self.attached.values()):
            self._remove(attached)
        self.events.close()

    def _is_full(self, pid: int) -> bool:
        own = sum(each.pid == pid for each in self.attached.values())
        return len(self.attached) >= MAX_ATTACHMENTS or own >= MAX_ATTACHMENTS_OF_PROCESS

    def _remove(self, attached: Attached) -> None:
        """Take an attachment off the list. It stays there until its words do not count any more."""
        number = attached.process.fileno()
        attached.page.close_descriptor()
        if self.attached.get(number) is attached:
            self.events.forget(number)
            del self.attached[number]
        attached.process.close()
        attached.page.close()
