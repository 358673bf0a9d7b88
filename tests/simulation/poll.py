"""The poller of a simulated server loop: epoll over simulated descriptors."""

from __future__ import annotations

import math
import select
from collections.abc import Callable

from dray.transport.lanes.base import Worker
from simulation.network import SimulatedKernel, SimulatedListener
from simulation.scheduler import Signal
from simulation.shared import SimulatedEvents, SimulatedStreamBell
from simulation.tagged import SimulatedWorker


class SimulatedPoller:
    """Reports descriptors as long as they are ready, as epoll does by default.

    Args:
        kernel: knows the descriptors.
        check: called before each wait.

    Attributes:
        signal: notified when something may have become ready.
    """

    def __init__(self, kernel: SimulatedKernel, check: Callable[[], None]) -> None:
        self._kernel = kernel
        self._check = check
        self._watched: dict[int, int] = {}
        self.signal = Signal(kernel.scheduler)

    def register(self, descriptor: int, events: int) -> None:
        assert descriptor not in self._watched
        self._watched[descriptor] = events
        if isinstance(found := self._kernel.sockets[descriptor], SimulatedEvents | SimulatedStreamBell):
            found.signals.append(self.signal)

    def modify(self, descriptor: int, events: int) -> None:
        assert descriptor in self._watched
        self._watched[descriptor] = events

    def unregister(self, descriptor: int) -> None:
        del self._watched[descriptor]

    def drive(self, worker: Worker) -> None:
        self.register(worker.fileno(), select.EPOLLIN)

    def stop_driving(self, worker: Worker) -> None:
        self.unregister(worker.fileno())

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        self._check()
        scheduler = self._kernel.scheduler
        if timeout == 0.0 or self._ready():
            scheduler.pause()
        else:
            scheduler.wait((self.signal,), math.inf if timeout is None else scheduler.now() + timeout)
        return self._ready()

    def reset(self, descriptor: int) -> None:
        held = self._kernel.sockets[descriptor]
        assert isinstance(held, SimulatedStreamBell)
        held.reset()

    def wake(self) -> None:
        self.signal.notify()

    def close(self) -> None:
        self._watched.clear()

    def _ready(self) -> list[tuple[int, int]]:
        sockets = self._kernel.sockets
        ready = []
        for descriptor, events in self._watched.items():
            held = sockets[descriptor]
            if isinstance(held, SimulatedWorker):
                found = held.signalled
            elif isinstance(held, SimulatedListener):
                found = held.waiting > 0
            elif isinstance(held, SimulatedEvents | SimulatedStreamBell):
                found = held.readable
            else:
                found = held.writable() if events == select.EPOLLOUT else held.readable()
            if found:
                ready.append((descriptor, events))
        return ready
