"""Locks, conditions and threads that the code under test gets in a simulation. They are actors and never block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from simulation.scheduler import Actor, Process, Scheduler, Signal, Violation


class SimulatedLock:
    """A lock that is never waited for: an actor that holds it must not let another actor run."""

    def __init__(self) -> None:
        self.held = False

    def acquire(self) -> None:
        if self.held:
            raise Violation("a lock was held while another actor ran")
        self.held = True

    def release(self) -> None:
        self.held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class SimulatedMutex(SimulatedLock):
    """A lock that an actor may hold while others run, because it accesses shared memory meanwhile.

    Args:
        scheduler: runs the actors.
        delayed: called with the seconds that an actor has waited for it.

    Attributes:
        holder: the actor that holds it.
        awaited: how many actors wait for it.
    """

    def __init__(self, scheduler: Scheduler, delayed: Callable[[float], None] = lambda seconds: None) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._delayed = delayed
        self._signal = Signal(scheduler)
        self.holder: Actor | None = None
        self.awaited = 0

    def acquire(self) -> None:
        scheduler = self._scheduler
        actor = scheduler.actor
        # A dead process does not give back its locks. What observes the run from outside does not wait.
        while self.held and actor is not None and not scheduler.ending and not self._abandoned:
            if self.holder is actor:
                raise Violation(f"{actor.name} waits for a lock that it holds")
            self.awaited += 1
            began = scheduler.now()
            scheduler.block(self._signal)
            self.awaited -= 1
            self._delayed(scheduler.now() - began)
        self.held = True
        self.holder = actor
        if actor is not None:
            actor.locks += 1

    def release(self) -> None:
        self.held = False
        if self.holder is not None:
            self.holder.locks -= 1
            self.holder = None
        self._signal.notify()

    @property
    def _abandoned(self) -> bool:
        return self.holder is None or self.holder.process.dead


class SimulatedCondition:
    """A condition variable over a `SimulatedLock`."""

    def __init__(self, scheduler: Scheduler, lock: SimulatedLock) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._signal = Signal(scheduler)

    def wait(self, timeout: float | None = None) -> bool:
        self._lock.release()
        try:
            until = math.inf if timeout is None else self._scheduler.now() + timeout
            return self._scheduler.wait((self._signal,), until)
        finally:
            self._lock.acquire()

    def notify(self) -> None:
        if self._signal.waiting:
            self._scheduler.wake(self._scheduler.rng.choice(self._signal.waiting), True)

    def notify_all(self) -> None:
        self._signal.notify()


class SimulatedThread:
    """A thread of a simulated process. It may wait without a time limit, as worker threads do."""

    def __init__(self, scheduler: Scheduler, process: Process, target: Callable[[], None], name: str) -> None:
        self._scheduler = scheduler
        self._process = process
        self._target = target
        self._name = name
        self._actor: Actor | None = None

    def start(self) -> None:
        self._actor = self._scheduler.spawn(self._process, self._name, self._target, idles=True)

    def is_alive(self) -> bool:
        return self._actor is not None and self._actor.alive

    def join(self, timeout: float) -> None:
        assert self._actor is not None
        if self._actor.alive:
            self._scheduler.wait((self._actor.ended,), self._scheduler.now() + timeout)


class SimulatedThreading:
    """The part of the module `threading` that `dray.prefetch` uses, for one simulated process."""

    Lock = SimulatedLock

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        self._scheduler = scheduler
        self._process = process

    def Condition(self, lock: SimulatedLock) -> SimulatedCondition:
        return SimulatedCondition(self._scheduler, lock)

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> Any:
        assert daemon
        return SimulatedThread(self._scheduler, self._process, target, name)
