"""Which work items are given out, to whom, and which are done. No I/O and no clock.

```
  new ──take──► held by a replica ──published──► in flight ──finished──► gone
                     │ release (its holder died),                        ▲
                     │ failed (the attempt raised)                       │
                     ├──► first in line again                            │
                     └──► given up (the last attempt raised) ────────────┘
```
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterable

from dray.jobs.messages.models import PartlyFinished, PayloadPart, UnfinishedWork


class WorkQueue:
    """Hands out work item indices, at most `in_flight` of which are unfinished at a time.

    A work item is finished when all its trajectories were trained on, or are known to be lost or discarded, and
    when it was given up, after `max_attempts` failed attempts. The bound keeps rollouts from running ahead of
    training: it limits both staleness and what waits in memory.

    Attributes:
        given_again: work items of lost replicas that were released.
        given_up_in_a_row: work items that were given up since the last one that was published.
    """

    def __init__(self, in_flight: int, first: int = 0, *, max_attempts: int = 3) -> None:
        self._in_flight = in_flight
        self._next = first
        self._max_attempts = max_attempts
        self._again: deque[int] = deque()
        self._holders: dict[int, str] = {}
        self._published: set[int] = set()
        self._parts = PartlyFinished()
        self._attempts: dict[int, int] = {}
        self._failed_by: dict[int, set[str]] = {}
        self.given_again = 0
        self.failed_attempts = 0
        self.given_up = 0
        self.given_up_in_a_row = 0

    def assign(
        self, holder: str, count: int, *, working: Collection[int] = (), others: Collection[str] = ()
    ) -> list[int]:
        """Up to `count` work items for `holder`; those that are given again come first.

        What the replica holds, and is not `working` on, was given in a reply that got lost, and is given to it
        once more. A work item that has failed in it waits for one of the `others` in which it has not.
        """
        kept = frozenset(working)
        taken = sorted(index for index, by in self._holders.items() if by == holder and index not in kept)
        while len(taken) < count:
            index = next((each for each in self._again if self._may_try(holder, each, others)), None)
            if index is not None:
                self._again.remove(index)
            elif len(self._unfinished()) < self._in_flight:
                index = self._next
                self._next += 1
            else:
                break
            self._holders[index] = holder
            taken.append(index)
        return taken

    def attempt(self, index: int) -> int:
        """Which attempt at a work item is the next one, or under way: from 1."""
        return self._attempts.get(index, 0) + 1

    def published(self, holder: str, indices: Iterable[int]) -> None:
        """`holder` has published all trajectories of `indices`; those it does not hold are ignored."""
        for index in indices:
            if self._holders.get(index) == holder:
                del self._holders[index]
                self._published.add(index)
                self.given_up_in_a_row = 0

    def failed(self, holder: str, index: int, attempt: int) -> bool:
        """The attempt of `holder` has failed; returns whether the work item is given up for it.

        Nothing happens if it does not hold the work item, or has reported this attempt before.
        """
        if self._holders.get(index) != holder or attempt != self.attempt(index):
            return False
        del self._holders[index]
        self.failed_attempts += 1
        if attempt < self._max_attempts:
            self._attempts[index] = attempt
            self._failed_by.setdefault(index, set()).add(holder)
            self._again.append(index)
            return False
        self._forget(index)
        self.given_up += 1
        self.given_up_in_a_row += 1
        return True

    def finished(self, indices: Iterable[int]) -> None:
        """All trajectories of `indices` are trained on, lost or discarded; unknown ones are ignored."""
        for index in indices:
            self._published.discard(index)
            self._holders.pop(index, None)
            if index in self._again:
                self._again.remove(index)
            self._forget(index)

    def finished_parts(self, payloads: Iterable[PayloadPart]) -> None:
        """As `finished`, for single trajectories; a work item is finished with the last of its own."""
        for payload in payloads:
            index = payload[0]
            known = index in self._published or index in self._holders or index in self._again
            if known and self._parts.finish(payload):
                self.finished([index])

    def release(self, holder: str) -> list[int]:
        """Give again what `holder` still held; returns it."""
        held = sorted(index for index, by in self._holders.items() if by == holder)
        for index in held:
            del self._holders[index]
        self._again.extend(held)
        self.given_again += len(held)
        return held

    def _may_try(self, holder: str, index: int, others: Collection[str]) -> bool:
        failed = self._failed_by.get(index, set())
        return holder not in failed or failed.issuperset(others)

    def _forget(self, index: int) -> None:
        self._attempts.pop(index, None)
        self._failed_by.pop(index, None)
        self._parts.forget(index)

    def _unfinished(self) -> list[int]:
        return [*self._holders, *self._published, *self._again]

    def under_way(self) -> UnfinishedWork:
        """The work items that are not finished, and the index of the next one."""
        return UnfinishedWork(
            unfinished=sorted(self._unfinished()),
            published=sorted(self._published),
            next=self._next,
            finished_parts=self._parts.finished(),
        )

    def statistics(self) -> dict[str, int]:
        """Counts for the status page."""
        return {
            "next": self._next,
            "held": len(self._holders),
            "published": len(self._published),
            "waiting_again": len(self._again),
            "given_again": self.given_again,
            "failed_attempts": self.failed_attempts,
            "given_up": self.given_up,
        }


def work_item_seed(job_seed: int, index: int) -> int:
    """The seed of work item `index`: 31 bits that depend on the job's seed and the index alone."""
    digest = hashlib.blake2b(f"{job_seed}:{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF
