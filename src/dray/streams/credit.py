"""`Credit`: how many payloads each producer may give to a consumer.

While the program works on a payload, the credit of all producers together is `prefetch` less what was given and
not begun. While the consumer waits, a producer without a payload has a credit of one. Of those that have payloads,
a few are woken, each with a credit of a part of `prefetch`: waking one costs more than taking several payloads of
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dray.streams.source import Source


class Credit:
    """The credit of the producers of one consumer.

    Args:
        sources: the producers; their order changes here.
        prefetch: payloads that may lie at the consumer and are not begun.

    Attributes:
        room: payloads that may lie there now: one at least while the program waits.
    """

    def __init__(self, sources: deque[Source], prefetch: int) -> None:
        self.room = prefetch
        self._sources = sources
        self._prefetch = prefetch
        self._favoured: list[Source] = []  # they have credit, of several
        self._asked = 0  # the payloads that these may give

    def forget(self, source: Source) -> None:
        """A producer is gone."""
        self._favoured = [each for each in self._favoured if each is not source]

    def spread(self, unbegun: int) -> bool:
        """Let producers give as many payloads as there is room for, while the program works.

        Args:
            unbegun: how many payloads lie at the consumer.

        Returns true if producers could give more than that until now.
        """
        self.room = prefetch = self._prefetch
        room = max(0, prefetch - unbegun)
        sources = self._sources
        if len(sources) == 1:
            source = sources[0]
            source.subscription.set_credit(source.received + room)
            return False
        waited = self._asked > prefetch
        for source in self._favoured:
            source.subscription.set_credit(source.received)
        self._favoured, self._asked = [], 0
        for _ in range(min(room, len(sources))):
            sources.rotate(-1)
            self._favour(sources[-1], 1)
        return waited

    def look(self, unbegun: int) -> None:
        """As `spread`, for a program that only looks: producers that have payloads come first, and are woken."""
        sources = self._sources
        if len(sources) == 1:
            self.spread(unbegun)
        else:
            self.spread(self._prefetch)
            sources.rotate(-1)
            by_need = sorted(sources, key=lambda source: not source.subscription.pending)
            for source in by_need[: max(0, self._prefetch - unbegun)]:
                self._favour(source, 1)
        for source in sources:
            if source.outstanding > 0 and source.subscription.pending:
                source.subscription.ring()

    def raise_all(self, unbegun: int) -> list[Source]:
        """Let producers give payloads, and wake some of those that have one; returns the others of these.

        Of several producers, one that has a payload gets no credit before it is woken.

        Args:
            unbegun: how many payloads lie at the consumer.
        """
        sources = self._sources
        self.room = max(1, self._prefetch)
        room = self.room - unbegun
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
