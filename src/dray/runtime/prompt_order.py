"""Which prompts' payloads a training step has to take so that none of them becomes too old. No I/O and no clock.

With at most (s + 1) batches of prompts under way, and each step taking those with the lowest indices, no payload
is
trained on by weights more than s versions newer than those it was made with: prompt i is given out when all but
(s + 1) batches of those before it are settled and the weights trained on them are published, and it is trained on
when all before it are.
"""

from __future__ import annotations

from collections.abc import Iterable


class PromptOrder:
    """The prompts that are not settled.

    Args:
        unsettled: those given out already.
        following: index of the first one that was not given out.
    """

    def __init__(self, unsettled: Iterable[int], following: int) -> None:
        self._unsettled = set(unsettled)
        self._following = following

    def last_due(self, count: int) -> int:
        """The highest index among the `count` lowest that are not settled."""
        given = sorted(self._unsettled)
        if len(given) >= count:
            return given[count - 1]
        return self._following + count - len(given) - 1

    def settled(self, indices: Iterable[int]) -> None:
        """These are trained on, or never will be; those that were not given out as far as known are now."""
        for index in indices:
            if index >= self._following:
                self._unsettled.update(range(self._following, index))
                self._following = index + 1
            self._unsettled.discard(index)
