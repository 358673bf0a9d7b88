"""The faults of a simulated run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum

from dray.transport.lanes.base import Lane


class Fault(Enum):
    """A kind of fault. Those of connections happen when something is sent; the others at times of their own."""

    RESET = "reset"
    HALF_CLOSE = "half-close"
    TRUNCATION = "truncation"
    SILENCE = "silence"
    DELAY = "delay"
    DUPLICATE = "duplicate connection"
    UNREACHABLE = "unreachable"
    CONNECT_HANGS = "connect hangs"
    LOOP_WEDGED = "wedged loop"
    SERVER_STOPPED = "stopped server"
    SERVER_RESTARTED = "restarted server"
    SERVER_REPLACED = "replaced server"
    SERVER_KILLED = "killed server"
    CLIENT_STOPPED = "stopped client"
    CLIENT_KILLED = "killed client"
    CLIENT_CLOSED = "closed client"
    INTERRUPT = "interrupted client"
    CLOCK_JUMP = "clock jump"
    BARRIER_FAILS = "failed barrier"
    CLIENT_FORKED = "forked client"
    SERVER_CLOSED = "closed server"


ON_SEND = (Fault.RESET, Fault.HALF_CLOSE, Fault.TRUNCATION, Fault.SILENCE, Fault.DELAY)
ON_SEND_UCX = (Fault.RESET, Fault.TRUNCATION, Fault.SILENCE, Fault.DELAY)
"""UCX has no half-closed connections."""
ON_CONNECT = (Fault.DUPLICATE, Fault.UNREACHABLE, Fault.CONNECT_HANGS)
HARMLESS = frozenset({Fault.CLIENT_CLOSED, Fault.CLIENT_KILLED, Fault.CLIENT_FORKED, Fault.DUPLICATE})
"""With these faults alone, a client that closes can still reach the producers."""
TIMED = tuple(
    fault for fault in Fault if fault is Fault.RESET or fault not in (*ON_SEND, *ON_CONNECT, Fault.BARRIER_FAILS)
)
AT_STEPS = (Fault.CLIENT_KILLED, Fault.CLIENT_STOPPED, Fault.INTERRUPT, Fault.SERVER_KILLED, Fault.SERVER_STOPPED)
"""Timed faults that may also come between two accesses to shared memory."""
WORK_ITEM = frozenset(
    {*ON_SEND, *ON_CONNECT, Fault.CLIENT_CLOSED, Fault.CLIENT_KILLED, Fault.CLIENT_FORKED, Fault.SERVER_RESTARTED}
)
"""With these faults alone, every wait for consumers ends when it can, and not only with a late scan."""


_STEP_FAULTS = 0.003
_STORE_DELAYS = ((0.0, 0.0, 30e-6, 200e-6, 2e-3), (1e-4, 1e-3, 5e-3))
"""Seconds until a store of a consumer is seen by others."""


class FaultPlan:
    """Decides when each fault happens. After `calm` is set, none happens.

    Args:
        rng: decides.
        seen: counts the faults, over all runs.
        kinds: the faults that may happen; by default random.
        among: the faults of which these are chosen.
    """

    def __init__(
        self,
        rng: random.Random,
        seen: Counter[str],
        kinds: Iterable[Fault] | None = None,
        among: Sequence[Fault] = tuple(Fault),
    ) -> None:
        self._rng = rng
        self._seen = seen
        some = rng.sample(list(among), rng.choice((0, 1, 1, 2, 3, 4, 6)))
        self.kinds = frozenset(some if kinds is None else kinds)
        self._on_send = tuple(fault for fault in ON_SEND if fault in self.kinds)
        self._on_send_ucx = tuple(fault for fault in ON_SEND_UCX if fault in self.kinds)
        self.timed = tuple(fault for fault in TIMED if fault in self.kinds)
        self._rate = rng.choice((0.01, 0.03, 0.1))
        self._connect_rate = rng.choice((0.05, 0.2, 0.5))
        self._split_rate = rng.choice((0.0, 0.0, 0.1, 0.4))
        self._slowest = rng.choice((0.0, 0.0, 0.0005, 0.02))
        self._capacity = rng.choice((2048, 2048, 4096, 1 << 16, 1 << 16)) if kinds is None else 1 << 16
        self.stalls = rng.random() < 0.4
        self.step_rate = rng.choice((0.1, 0.5, 1.0))
        self.store_delays = rng.choice(_STORE_DELAYS)
        self._at_steps = tuple(fault for fault in AT_STEPS if fault in self.kinds)
        self.calm = False

    def __repr__(self) -> str:
        return ", ".join(sorted(fault.value for fault in self.kinds)) or "none"

    def count(self, what: str) -> None:
        """Count an event."""
        self._seen[what] += 1

    def strike(self, lane: Lane) -> Fault | None:
        """The fault of something that is being sent, if any."""
        kinds = self._on_send_ucx if lane.tagged else self._on_send
        if not kinds or self.calm or self._rng.random() >= self._rate:
            return None
        fault = self._rng.choice(kinds)
        self.count(fault.value)
        return fault

    def strikes(self, fault: Fault) -> bool:
        """Whether a fault of connecting happens now."""
        if fault not in self.kinds or self.calm or self._rng.random() >= self._connect_rate:
            return False
        self.count(fault.value)
        return True

    def strike_at_step(self) -> Fault | None:
        """The fault that comes before an access to shared memory, if any."""
        if not self._at_steps or self.calm or self._rng.random() >= _STEP_FAULTS:
            return None
        return self._rng.choice(self._at_steps)

    def splits(self) -> bool:
        """Whether fewer bytes are sent or received than possible."""
        return self._split_rate > 0 and self._rng.random() < self._split_rate

    def capacity(self) -> int:
        """Size of the buffer of one direction of a connection, in bytes."""
        return self._capacity

    def delay(self) -> float:
        """The delay of bytes, in seconds."""
        return self._rng.random() * self._slowest

    def long_delay(self) -> float:
        """The delay of bytes after a fault, in seconds."""
        return self._rng.choice((0.05, 0.4, 3.0, 20.0))

    def soon(self) -> float:
        """Seconds until UCX or the kernel does something."""
        return self._rng.choice((0.0, 0.0, 0.0, 0.0002, 0.003, 0.2))

    def stall(self) -> float:
        """Seconds for which a thread does not run."""
        return self._rng.choice((0.0, 0.0, 0.0, 0.002, 0.2, 3.0)) if self.stalls else 0.0
