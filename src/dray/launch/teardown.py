"""How children are brought to an end: one deadline for all of them, and ever firmer means. No I/O.

Rollout replicas get a part of the deadline (`ROLLOUT_SHARE`): should one of them be what the policy waits for, its
end leaves the policy time to write a checkpoint.

| part of the deadline | in order | interrupted |
|---|---|---|
| at once | they were told by the controller | SIGTERM |
| 40 % | SIGTERM | |
| 70 % | the stacks of all threads into the log | the same |
| 80 % | SIGKILL to the process group | the same |
"""

from __future__ import annotations

import math
from enum import Enum

from dray.clock import MONOTONIC, Clock

ROLLOUT_SHARE = 0.55


class Means(Enum):
    """What is done to a child that is still there; each once, in this order."""

    TERMINATE = 0.4
    DUMP_STACKS = 0.7
    KILL = 0.8


class Teardown:
    """Which means are due, as time goes by.

    Args:
        bound: seconds within which everything must have ended.
        at_once: ask at once, instead of leaving it to the controller first.
    """

    def __init__(self, bound: float, *, at_once: bool, clock: Clock = MONOTONIC) -> None:
        self._clock = clock
        self._began = clock.now()
        self.bound = bound
        self._due = {means: means.value * bound for means in Means}
        if at_once:
            self._due[Means.TERMINATE] = 0.0

    def take_due(self) -> list[Means]:
        """The means whose time has come since the last call."""
        elapsed = self._clock.now() - self._began
        due = [means for means, at in self._due.items() if elapsed >= at]
        for means in due:
            del self._due[means]
        return due

    def hurry(self) -> None:
        """Kill now, unless that has been done."""
        if Means.KILL in self._due:
            self._due = {Means.KILL: 0.0}

    @property
    def seconds_to_next(self) -> float:
        """Seconds until `take_due` has something; ``inf`` when everything was done."""
        elapsed = self._clock.now() - self._began
        return max(0.0, min(self._due.values(), default=math.inf) - elapsed)

    @property
    def is_over(self) -> bool:
        """True when even those that were killed should long have ended."""
        return not self._due and self._clock.now() - self._began >= 2 * self.bound
