"""What a ring shares with its writers and leases: lock, slots, the claims that wait, and how all of it ends."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

from dray.clock import Clock, Deadline
from dray.errors import BufferClosedError, BufferFullError
from dray.ring.policy import OnFull
from dray.ring.segment import Segment
from dray.ring.slots import SlotTable


class RingCore:
    """The inside of one ring. What it has is used with its lock held; only `close` takes that itself.

    Whoever may have freed a slot calls ``claimable.notify()`` if there are `claimers`: the test is for speed.

    Attributes:
        lock: the ring's lock.
        segment: its memory.
        table: its slots.
        clock: where deadlines come from.
        claimable: the condition on which claims wait for a slot.
        claimers: how many threads wait there.
        closed: true after `close`, and in a child forked from the creator.
        disowned: true in such a child.
    """

    def __init__(self, segment: Segment, table: SlotTable, on_full: OnFull, clock: Clock) -> None:
        self.lock = threading.Lock()
        self.segment = segment
        self.table = table
        self.clock = clock
        self.claimable = threading.Condition(self.lock)
        self.claimers = 0
        self.closed = False
        self.disowned = False
        self.lost: deque[object] = deque()  # writers that are gone and have neither committed nor aborted
        self._on_full = on_full
        self._memory: memoryview | None = segment.view
        _cores.add(self)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of the segment, writable; the ring must be open."""
        assert self._memory is not None
        return self._memory[offset : offset + nbytes]

    def wait_for_slot(self, timeout: float | None) -> None:
        """Return when a slot is free. A thread that comes later may be served first.

        Raises:
            BufferFullError: no slot became free in time, or at once with ``on_full="error"``.
            BufferClosedError: the ring was closed meanwhile.
        """
        table = self.table
        overwrite = self._on_full == "overwrite"
        if overwrite and table.drop_oldest():
            return
        deadline = Deadline.after(0 if self._on_full == "error" else timeout, self.clock)
        waited = False
        self.claimers += 1
        try:
            while deadline.remaining > 0:
                waited = True
                self.claimable.wait(min(deadline.remaining, threading.TIMEOUT_MAX))
                self.check_open()
                self.mend()
                if table.free or (overwrite and table.drop_oldest()):
                    return
            table.full_errors += 1
            count = ", ".join(f"{number} {state.name}" for state, number in table.count().items())
            raise BufferFullError(
                f"no slot became free: {count} of {len(table.slots)} slots", elapsed=deadline.elapsed
            )
        except BaseException:
            # If this thread was woken for a slot, another takes it.
            self.claimable.notify()
            raise
        finally:
            self.claimers -= 1
            table.claim_waits += waited
            table.claim_wait_seconds += deadline.elapsed

    def begin_change(self) -> None:
        """Before the slots are changed; ``table.changing = False`` ends it.

        An exception of a signal handler may come in between; the next change finishes what it left.
        """
        if self.lost or self.table.changing:
            self.mend()
        self.table.changing = True

    def mend(self) -> None:
        """Finish changes that an exception of a signal handler ended, and free what lost writers have claimed."""
        if self.lost or self.table.changing:
            self.lost.clear()
            self.table.mend()

    def check_open(self) -> None:
        """Raise `BufferClosedError` unless the ring can be used."""
        if self.closed:
            raise self.closed_error()

    def closed_error(self) -> BufferClosedError:
        """Why the ring cannot be used."""
        if self.disowned:
            return BufferClosedError("the ring belongs to the process that this one was forked from")
        return BufferClosedError("the ring is closed")

    def close(self) -> None:
        """Wake everybody who waits, and give the memory back. May be called twice; takes the lock itself."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self.claimable.notify_all()
                for cell in self.table.live.values():
                    cell.wake()
                self._forget_memory()
        self.segment.close()

    def _disown(self) -> None:
        """In a forked child: the memory is not there, and the lock may be held by a thread that is not either."""
        self.lock = threading.Lock()
        self.claimable = threading.Condition(self.lock)
        self.closed = self.disowned = True
        self._forget_memory()

    def _forget_memory(self) -> None:
        self._memory = None
        self.table.forget_memory()


_cores: weakref.WeakSet[RingCore] = weakref.WeakSet()


def _disown_in_child() -> None:
    for core in _cores:
        core._disown()
    _cores.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_in_child)
