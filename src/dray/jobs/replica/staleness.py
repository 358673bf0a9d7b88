"""In which order payloads are trained on, so that none becomes too old. No I/O and no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dray.jobs.messages.models import PartlyFinished, PayloadPart


class StalenessWindow:
    """Which work items' payloads a training step has to use so that none becomes too old. No I/O and no clock.

    With at most (s + 1) batches of work items under way, and each step using those with the lowest indices, no
    payload is trained on by weights more than s versions newer than those it was made with: work item i is given
    out when all but (s + 1) batches of those before it are finished and the weights trained on them are published,
    and it is trained on when all before it are.

    Args:
        unfinished: the work items that were given out and are not finished.
        following: index of the first one that was not given out.
        payloads_each: how many payloads a work item has at least.
    """

    def __init__(self, unfinished: Iterable[int], following: int, payloads_each: int = 1) -> None:
        self._unfinished = set(unfinished)
        self._following = following
        self._payloads_each = payloads_each
        self._parts = PartlyFinished()
        self._in_use: Counter[int] = Counter()  # payloads of a step that has begun, by work item

    def last_due(self, count: int) -> int:
        """The index of the last of the lowest unfinished work items that have `count` payloads together which are
        neither finished nor used by a step that has begun."""
        for index in sorted(self._unfinished):
            count -= max(0, self._parts.remaining(index, self._payloads_each) - self._in_use[index])
            if count <= 0:
                return index
        return self._following - (-count // self._payloads_each) - 1

    def found(self, payloads: Iterable[PayloadPart]) -> None:
        """These payloads were received: they have the number of payloads of their work items."""
        for index, _, parts in payloads:
            if parts > 1 and (index in self._unfinished or index >= self._following):
                self._parts.found(index, parts)

    def begin(self, payloads: Iterable[PayloadPart]) -> None:
        """A step on these payloads begins."""
        for index, _, _ in payloads:
            self._give_out(index + 1)
            self._in_use[index] += 1

    def finished(self, indices: Iterable[int]) -> None:
        """These are trained on, or never will be; those that were not given out as far as known are now."""
        for index in indices:
            self._give_out(index + 1)
            self._unfinished.discard(index)
            self._parts.forget(index)
            self._in_use.pop(index, None)

    def finished_payloads(self, payloads: Iterable[PayloadPart]) -> None:
        """These payloads are trained on, or never will be; a work item is finished with the last of its own."""
        for payload in payloads:
            index = payload[0]
            self._give_out(index + 1)
            if self._in_use[index] > 1:
                self._in_use[index] -= 1
            else:
                self._in_use.pop(index, None)
            if index in self._unfinished and self._parts.finish(payload):
                self.finished([index])

    def compare(self, unfinished: Iterable[int], following: int) -> None:
        """The controller knows of no others that are `unfinished`, among those before `following`."""
        self._give_out(following)
        known = set(unfinished)
        self.finished({index for index in self._unfinished if index < following} - known)

    def _give_out(self, following: int) -> None:
        """All before `following` were given out."""
        self._unfinished.update(range(self._following, following))
        self._following = max(self._following, following)
