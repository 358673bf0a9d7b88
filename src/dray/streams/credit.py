"""`Credit`: how many payloads each producer may give to a consumer.

While the program works on a payload, the credit of all producers together is `prefetch` less what was given and
not begun. While the consumer waits, a producer without a payload has a credit of one. Of those that have payloads,
a few are woken, each with a credit of a part of `prefetch`: waking one costs more than taking several payloads of
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from dray.streams.source import Source

_TURNS: Final = 8
"""So many payloads the program gets while a producer that was woken keeps its credit."""


class Credit:
    """The credit of the producers of one consumer.

    Args:
        sources: the producers; their order changes here.
        prefetch: payloads that may lie at the consumer and are not begun.
    """

    def __init__(self, sources: deque[Source], prefetch: int) -> None:
        self._room = prefetch
        self._sources = sources
        self._prefetch = prefetch
        self._favoured: list[Source] = []  # they have credit, of several
        self._asked = 0  # the payloads that these may give
        self._woken: Source | None = None  # one of them, which was woken
        self._received = 0  # what it had given before
        self._turns = 0  # calls of `spread` in which it may give
        self._last: Source | None = None  # the one that was woken last

    def room_for(self, source: Source) -> int:
        """How many payloads may lie here when one of a producer comes: the one that was woken keeps its place."""
        woken = self._woken
        return self._room - (woken is not None and woken is not source and woken.received == self._received)

    def forget(self, source: Source) -> None:
        """A producer is gone."""
        self._favoured = [each for each in self._favoured if each is not source]
        self._woken = None if self._woken is source else self._woken
        self._last = None if self._last is source else self._last

    def spread(self, unbegun: int) -> bool:
        """Let producers give as many payloads as there is room for, while the program works.

        Of several producers, each gets its turn. One that may have payloads, and may wait until some are consumed,
        is woken, and has its credit for a while: else one that never pauses would leave no turn to the others.

        Args:
            unbegun: how many payloads lie at the consumer.

        Returns true if producers could give more than that until now.
        """
        self._room = prefetch = self._prefetch
        room = max(0, prefetch - unbegun)
        sources = self._sources
        if len(sources) == 1:
            source = sources[0]
            source.subscription.set_credit(source.received + room)
            return False
        waited, woken = self._asked > prefetch, self._woken
        self._turns -= 1
        if woken is not None and (woken.received != self._received or not room or self._turns <= 0):
            woken = None  # it has given, has nothing, stands still, or has to wait for another turn
        for source in self._favoured:
            if source is not woken:
                source.subscription.set_credit(source.received)
        self._favoured, self._asked, self._woken = [], 0, woken
        if woken is not None:
            self._favour(woken, 1)
            room -= 1
        able = []
        for _ in range(min(room, len(sources))):
            sources.rotate(-1)
            source = sources[-1]
            if source is not woken:
                self._favour(source, 1)
                if source.subscription.may_give:  # loaded after the credit was stored
                    able.append(source)
        if woken is None and able:
            last = self._last
            self._woken = self._last = source = next((each for each in able if each is not last), able[0])
            self._received, self._turns = source.received, _TURNS
            source.subscription.ring()
        return waited

    def spread_and_wake(self, unbegun: int) -> None:
        """As `spread`, for a program that only counts: a single producer that has payloads is woken as well."""
        self.spread(unbegun)
        if len(self._sources) == 1:
            source = self._sources[0]
            if source.outstanding > 0 and source.subscription.pending:
                source.subscription.ring()

    def raise_all(self, unbegun: int) -> list[Source]:
        """Let producers give payloads, and wake some of those that have one; returns the others of these.

        Of several producers, one that has a payload gets no credit before it is woken.

        Args:
            unbegun: how many payloads lie at the consumer.
        """
        sources = self._sources
        self._room = max(1, self._prefetch)
        self._woken = None
        room = self._room - unbegun
        if room <= 0:
            for source in sources:
                source.announce()
            return []
        several = len(sources) > 1
        pending = []
        for source in sources:
            subscription = source.subscription
            if not (several and subscription.pending):
                if several:
                    self._favour(source, 1)
                else:
                    subscription.set_credit(source.received + room)
                if subscription.pending:  # loaded after the credit was stored
                    pending.append(source)
            else:
                pending.append(source)
            source.announce()
        if not pending:
            return pending
        share = max(1, room // 2)
        first = -(-room // share)
        sources.rotate(-min(first, len(pending)))
        self.ask(pending[:first], share)
        return pending[first:]

    def ask(self, sources: Sequence[Source], share: int) -> None:
        """Let producers that have payloads give up to `share` of them each."""
        several = len(self._sources) > 1
        for source in sources:
            if several:
                self._favour(source, share)
            source.subscription.ring()

    def _favour(self, source: Source, credit: int) -> None:
        self._favoured.append(source)
        self._asked += credit
        source.subscription.set_credit(source.received + credit)
