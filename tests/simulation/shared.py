"""Memory that simulated processes share: each access to a word is a step, and the stores of consumers are late.

A consumer's stores wait in a buffer of its process, as in a processor's. They leave it in their order: a little
later, at a barrier of an owner, when another thread of the process runs, and when the process ends. The process
itself sees them at once. Owners' stores are seen at once: each is followed by a barrier before it matters.
"""

from __future__ import annotations

import copy
import errno
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dray.ring.attachment import Attachment, DirectLease
from dray.ring.consumer_events import Bell, ConsumerEvents, Descriptor, ProcessDescriptor
from dray.ring.direct import CONTROL_WORDS, Machine
from dray.ring.shared_words import SharedWords
from simulation.faults import Fault
from simulation.scheduler import Actor, Process, Signal
from simulation.threads import SimulatedCondition, SimulatedMutex

if TYPE_CHECKING:
    from simulation.network import SimulatedKernel


class Memory:
    """Words that are shared.

    Attributes:
        words: what all processes see.
        pages: the pages of the ring, if this is its board.
        readers: of the ring, if this is its board.
        process: the consumer that has opened this page.
        stored: called after a consumer's store with the index and the value, when it is made and when it is seen.
    """

    __slots__ = ("pages", "process", "readers", "stored", "words")

    def __init__(self, count: int) -> None:
        self.words = memoryview(bytearray(8 * count)).cast("Q")
        self.pages: list[Memory] | None = None
        self.readers = 1
        self.process: Process | None = None
        self.stored: Callable[[int, int, bool], None] = lambda index, value, seen: None


class ProcessMemory:
    """How one process accesses shared words.

    Args:
        kernel: the machine.
        process: the process.
        late: its stores are seen later.

    Attributes:
        delayed: called with the seconds that an access has taken. They belong to no deadline: an access to
            memory does not wait.
    """

    def __init__(self, kernel: SimulatedKernel, process: Process, *, late: bool) -> None:
        self._kernel = kernel
        self._scheduler = kernel.scheduler
        self.process = process
        self._late = late
        self._pending: deque[tuple[int, Memory, int, int]] = deque()
        self._stores = 0
        self._actor: Actor | None = None
        self.delayed: Callable[[float], None] = lambda seconds: None
        process.ends.append(self.drain)

    def step(self) -> bool:
        """Another thread may run now; False if this one is not of the process, which is an observer."""
        scheduler = self._scheduler
        actor = scheduler.actor
        if actor is None or actor.process is not self.process or scheduler.ending:
            return False
        began = scheduler.now()
        self.process.at_step()
        self.delayed(scheduler.now() - began)
        if scheduler.rng.random() < self._kernel.plan.step_rate:
            began = scheduler.now()
            scheduler.pause()
            self.delayed(scheduler.now() - began)
        if self._pending and actor is not self._actor:
            self.drain()  # the lock of the interpreter has changed hands
        self._actor = actor
        return True

    def load(self, memory: Memory, index: int) -> int:
        """The value of a word, for this process."""
        self.step()
        for _, where, place, value in reversed(self._pending):
            if where is memory and place == index:
                return value
        return memory.words[index]

    def store(self, memory: Memory, index: int, value: int) -> None:
        """Change a word; nothing if the process is dead."""
        runs = self.step()
        if self.process.dead:
            return
        if not self._late:
            memory.words[index] = value
            return
        memory.stored(index, value, False)
        self._stores += 1
        number = self._stores
        self._pending.append((number, memory, index, value))
        delay = self._scheduler.rng.choice(self._kernel.plan.store_delays) if runs else 0.0
        if delay:
            self._scheduler.at(self._scheduler.now() + delay, lambda: self.drain(number))
        else:
            self.drain(number)

    def drain(self, last: int | None = None) -> None:
        """Let all see the stores, up to the one with a number."""
        pending = self._pending
        while pending and (last is None or pending[0][0] <= last):
            _, memory, index, value = pending.popleft()
            if memory.pages is not None:
                self._check_board(memory, index)
            memory.words[index] = value
            memory.stored(index, value, True)

    def _check_board(self, board: Memory, index: int) -> None:
        pages = board.pages
        assert pages is not None
        slot = index // board.readers
        if not any(page.process is self.process and slot + 1 in page.words.tolist()[:-1] for page in pages):
            self._scheduler.violate(
                f"{self.process.name} writes on the board for slot {slot} without a lease word"
            )


class _Values(list[int]):
    """Several words, read one after the other."""

    def tolist(self) -> list[int]:
        return list(self)


class SimulatedWords:
    """Words as one process accesses them, with the methods of a `memoryview` that dray uses."""

    __slots__ = ("_access", "_memory")

    def __init__(self, memory: Memory, access: ProcessMemory) -> None:
        self._memory = memory
        self._access = access

    def __len__(self) -> int:
        return len(self._memory.words)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _Values([self[each] for each in range(*index.indices(len(self)))])
        return self._access.load(self._memory, range(len(self))[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._access.store(self._memory, range(len(self))[index], value)


class SimulatedSharedWords(SharedWords):
    """`SharedWords` of a process; its descriptor only identifies them."""

    def __init__(self, memory: Memory, access: ProcessMemory, numbers: list[int]) -> None:
        super().__init__(cast(Any, SimulatedWords(memory, access)), numbers)
        self.memory = memory

    def array(self) -> Any:
        return np.frombuffer(self.memory.words, np.uint64)


class SimulatedEvents(ConsumerEvents):
    """The doorbell of an owner and the ends of its consumers' processes.

    Attributes:
        process: the owner.
        signals: notified when there is something to take.
        closed: after `close`.
    """

    def __init__(self, kernel: SimulatedKernel, process: Process) -> None:
        self._kernel = kernel
        self.process = process
        self.signals: list[Signal] = []
        self.closed = False
        self._rings = 0
        self._watched: dict[int, Process] = {}
        self._number = kernel.number(self)
        self._named = kernel.describe(self)

    def fileno(self) -> int:
        return self._number

    @property
    def bell(self) -> int:
        return self._named.fileno()

    @property
    def readable(self) -> bool:
        """`take` has something to do."""
        return not self.closed and (self._rings > 0 or any(each.dead for each in self._watched.values()))

    def ring(self) -> None:
        """A consumer writes to the doorbell."""
        if not self.closed:
            self._rings += 1
            self.notify()

    def notify(self) -> None:
        """Wake the loops that wait."""
        for signal in self.signals:
            signal.notify()

    def watch(self, pidfd: int) -> None:
        process = self._kernel.behind(pidfd)
        assert isinstance(process, Process)
        self._watched[pidfd] = process
        process.ends.append(self.notify)

    def forget(self, pidfd: int) -> None:
        del self._watched[pidfd]

    def collect(self) -> list[int]:
        self._kernel.memory_of(self.process).step()
        self._rings = 0
        return [number for number, process in self._watched.items() if process.dead]

    def close(self) -> None:
        self.closed = True
        self._named.close()


class SimulatedStreamBell(Descriptor):
    """The bell of a stream, at its producer.

    Attributes:
        process: the producer.
        signals: notified when a consumer has rung.
        closed: after `close`.
    """

    def __init__(self, kernel: SimulatedKernel, process: Process) -> None:
        self._kernel = kernel
        self.process = process
        self.signals: list[Signal] = []
        self.closed = False
        self.readable = False
        self._named = kernel.describe(self)
        kernel.sockets[self.fileno()] = self

    def fileno(self) -> int:
        return self._named.fileno()

    def ring(self) -> None:
        """A consumer, or a thread of the producer, writes to it."""
        if not self.closed:
            self.readable = True
            for signal in self.signals:
                signal.notify()

    def reset(self) -> None:
        """As a read of an eventfd does."""
        self._kernel.memory_of(self.process).step()
        self.readable = False

    def close(self) -> None:
        if not self.closed:
            self.closed, self.readable = True, False
            del self._kernel.sockets[self.fileno()]
            self._named.close()

    def __del__(self) -> None:
        """Its descriptor closes itself."""


class SimulatedBell(Bell):
    """The doorbell, at a consumer."""

    def __init__(self, events: SimulatedEvents | SimulatedStreamBell, access: ProcessMemory) -> None:
        self._events: SimulatedEvents | SimulatedStreamBell | None = events
        self._access = access

    def fileno(self) -> int:
        return -1

    def ring(self) -> None:
        self._access.step()
        if self._events is not None and not self._access.process.dead:
            self._access.drain()  # a system call takes long enough
            self._events.ring()

    def close(self) -> None:
        self._events = None


class SimulatedProcessDescriptor(ProcessDescriptor):
    """A pidfd of an owner, at a consumer."""

    def __init__(self, owner: Process, access: ProcessMemory) -> None:
        self._owner: Process | None = owner
        self._access = access

    def fileno(self) -> int:
        return -1

    def has_ended(self) -> bool:
        self._access.step()
        return self._owner is None or self._owner.dead

    def close(self) -> None:
        self._owner = None


class SimulatedMachine(Machine):
    """What a simulated owner gets for its ring.

    Attributes:
        board: the ring's board, once there is one.
        pages: its lease pages so far.
        readers: of the ring.
        stored: called for each store of a consumer on the board.
    """

    def __init__(self, kernel: SimulatedKernel, process: Process, slots: int, readers: int) -> None:
        self._kernel = kernel
        self._process = process
        self._slots, self._readers = slots, readers
        self._made = 0
        self.pages: list[Memory] = []
        self.stored: Callable[[int, int, int, bool], None] = lambda slot, reader, value, seen: None

    def lock(self) -> Any:
        return SimulatedMutex(self._kernel.scheduler)

    def condition(self, lock: Any) -> Any:
        return SimulatedCondition(self._kernel.scheduler, lock)

    def stream_words(self, count: int) -> SharedWords:
        """The words that the producer of a stream shares with one consumer."""
        return self._shared(Memory(count))

    def words(self, count: int) -> SharedWords:
        memory = Memory(count)
        self._made += 1
        if self._made == 1:
            assert count == self._slots + CONTROL_WORDS
        elif self._made == 2:
            assert count == self._slots * self._readers
            memory.pages = self.pages
            memory.readers = self._readers
            memory.stored = lambda index, value, seen: self.stored(*divmod(index, self._readers), value, seen)
        else:
            self.pages.append(memory)
        return self._shared(memory)

    def _shared(self, memory: Memory) -> SharedWords:
        fd = os.memfd_create("simulated words")
        self._kernel.shared[os.fstat(fd).st_ino] = memory
        return SimulatedSharedWords(memory, self._kernel.memory_of(self._process), [fd])

    def events(self) -> ConsumerEvents:
        return SimulatedEvents(self._kernel, self._process)

    def barrier(self) -> None:
        kernel = self._kernel
        access, plan, rng = kernel.memory_of(self._process), kernel.plan, kernel.scheduler.rng
        access.step()
        if plan.strikes(Fault.BARRIER_FAILS):
            raise OSError(errno.ENOMEM, "simulated")
        buffers = list(kernel.registered)
        rng.shuffle(buffers)
        for each in buffers:
            access.step()
            each.drain()

    def own_process(self) -> Descriptor:
        return self._kernel.describe(self._process)

    def pid_behind(self, descriptor: int) -> int | None:
        process = self._kernel.behind(descriptor)
        return (-1 if process.dead else process.pid) if isinstance(process, Process) else None


class SimulatedAttachment(Attachment):
    """An attachment whose leases are watched.

    Args:
        kernel: the machine.
        process: the consumer.
        owner: the process of the ring.
        options: as for `Attachment`.
    """

    def __init__(
        self,
        kernel: SimulatedKernel,
        process: Process,
        *,
        board: SimulatedSharedWords,
        page: SimulatedSharedWords,
        **options: Any,
    ) -> None:
        self._kernel = kernel
        self._process = process
        self._holders: dict[int, int | Actor | None] = {}  # of each word: the id of a lease, or who begins one
        self._ending: set[int] = set()  # ids of leases whose end has begun
        self._live: weakref.WeakSet[DirectLease] = weakref.WeakSet()
        self._memories = page.memory, board.memory
        page.memory.process = process
        check = weakref.WeakMethod(self._check_page)  # a lease may be dropped without its `close`

        def stored(index: int, value: int, seen: bool) -> None:
            method = check()
            if method is not None:
                method(index, value, seen)

        page.memory.stored = stored
        super().__init__(now=kernel.scheduler.now, board=board, page=page, **options)

    def lease(self, slot: int, sequence: int, nbytes: int) -> DirectLease | None:
        lease = super().lease(slot, sequence, nbytes)
        if lease is not None:
            self._holders[lease.word] = id(lease)
            self._ending.discard(id(lease))
            self._live.add(lease)
            self._kernel.watch.begins(self.segment.producer_id, self._process, lease)
        return lease

    def clear(self, lease: DirectLease, consumed: bool) -> None:
        self._live.discard(lease)
        self._kernel.watch.ends(self.segment.producer_id, lease)
        self._ending.add(id(lease))
        super().clear(lease, consumed)

    def end_in_child(self) -> None:
        """Do to copies what a forked child may do to what it has inherited: nothing changes."""
        before = [memory.words.tolist() for memory in self._memories]
        twin = copy.copy(self)
        twin.mark = -1
        for lease in list(self._live):
            inherited = copy.copy(lease)
            inherited.attachment = twin
            inherited.end(consumed=True)
            del inherited
        if twin.lease(0, 0, 0) is not None:
            self._kernel.scheduler.violate(f"{self._process.name}: a forked child has leased a payload")
        twin.close()
        del twin
        if [memory.words.tolist() for memory in self._memories] != before:
            self._kernel.scheduler.violate(f"{self._process.name}: a forked child has changed its parent's words")

    def _check_page(self, index: int, value: int, seen: bool) -> None:
        actor = self._kernel.scheduler.actor
        if seen:
            self._kernel.watch.changed(self.segment.producer_id)
        elif value:
            self._holders[index] = actor
        elif (holder := self._holders.pop(index, None)) not in (None, actor) and holder not in self._ending:
            self._kernel.scheduler.violate(f"{self._process.name}: an end clears the word of another lease")
