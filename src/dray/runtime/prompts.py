"""Which prompts are given out, to whom, and which are done. No I/O and no clock.

```
  new ──take──► held by a replica ──published──► in flight ──settled──► gone
                     │ release (its holder died)
                     └──► first in line again
```
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable


class PromptLedger:
    """Hands out prompt indices, at most `in_flight` of which are unsettled at a time.

    A prompt is settled when its trajectory was trained on, or is known to be lost or discarded. The bound keeps
    rollouts from running ahead of training: it limits both staleness and what waits in memory.
    """

    def __init__(self, in_flight: int, first: int = 0) -> None:
        self._in_flight = in_flight
        self._next = first
        self._again: deque[int] = deque()
        self._holders: dict[int, str] = {}
        self._published: set[int] = set()
        self.given_again = 0

    def take(self, holder: str, count: int) -> list[int]:
        """Up to `count` prompts for `holder`; prompts of dead holders come first.

        A replica asks when it has nothing left to do: what it still holds was given in a reply that got lost, and
        is given to it once more.
        """
        taken = sorted(index for index, by in self._holders.items() if by == holder)
        while len(taken) < count:
            if self._again:
                index = self._again.popleft()
            elif self.outstanding < self._in_flight:
                index = self._next
                self._next += 1
            else:
                break
            self._holders[index] = holder
            taken.append(index)
        return taken

    def published(self, holder: str, indices: Iterable[int]) -> None:
        """`holder` has published the trajectories of `indices`; those it does not hold are ignored."""
        for index in indices:
            if self._holders.get(index) == holder:
                del self._holders[index]
                self._published.add(index)

    def settled(self, indices: Iterable[int]) -> None:
        """The trajectories of `indices` are trained on, lost or discarded; unknown ones are ignored."""
        for index in indices:
            self._published.discard(index)
            self._holders.pop(index, None)
            if index in self._again:
                self._again.remove(index)

    def release(self, holder: str) -> list[int]:
        """Give again what `holder` still held; returns it."""
        held = sorted(index for index, by in self._holders.items() if by == holder)
        for index in held:
            del self._holders[index]
        self._again.extend(held)
        self.given_again += len(held)
        return held

    def in_flight(self) -> list[int]:
        """Prompts whose trajectories were published and are not settled."""
        return sorted(self._published)

    def unfinished(self) -> tuple[list[int], int]:
        """The unsettled prompts, and the index of the next one."""
        return sorted({*self._holders, *self._published, *self._again}), self._next

    @property
    def outstanding(self) -> int:
        """Prompts given out, or to be given again, and not settled."""
        return len(self._holders) + len(self._published) + len(self._again)

    def statistics(self) -> dict[str, int]:
        """Counts for the status page."""
        return {
            "next": self._next,
            "held": len(self._holders),
            "published": len(self._published),
            "waiting_again": len(self._again),
            "given_again": self.given_again,
        }


def prompt_seed(job_seed: int, index: int) -> int:
    """The seed of prompt `index`: 31 bits that depend on the job's seed and the index alone."""
    digest = hashlib.blake2b(f"{job_seed}:{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF
