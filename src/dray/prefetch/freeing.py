"""Telling producers which of their payloads are consumed, as a state machine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dray.errors import DrayError, ProducerLostError
from dray.prefetch.batch import Identity, Pause
from dray.protocol import PayloadRef

MOST_TRIES = 3
RETRY_PAUSE = 1.0
MOST_UNDER_WAY = 2
"""Requests at a time: a few producers that do not answer must not hold every thread."""


@dataclass(frozen=True, slots=True)
class Free:
    """Tell the producer of `refs` that they are consumed; then report to `Freeing.ended`."""

    refs: tuple[PayloadRef, ...]


@dataclass(slots=True)
class _Unfreed:
    refs: dict[Identity, PayloadRef]
    failures: int = 0
    after: float = -math.inf
    under_way: bool = False


class Freeing:
    """Payloads that their producers are to be told about, one request at a time for each producer.

    A request that fails is made again after a pause, a few times. With a producer that is gone its payloads are.
    """

    def __init__(
        self, most_tries: int = MOST_TRIES, pause: float = RETRY_PAUSE, most_under_way: int = MOST_UNDER_WAY
    ) -> None:
        self._most_tries = most_tries
        self._pause = pause
        self._most_under_way = most_under_way
        self._by_producer: dict[bytes, _Unfreed] = {}

    def add(self, refs: Iterable[PayloadRef]) -> None:
        """Free these too."""
        for ref in refs:
            self._by_producer.setdefault(ref.producer, _Unfreed({})).refs[ref.identity] = ref

    def next(self, now: float) -> Free | Pause | None:
        """What to do now."""
        if self.under_way >= self._most_under_way:
            return None
        resume = math.inf
        for unfreed in self._by_producer.values():
            if unfreed.under_way:
                continue
            if now >= unfreed.after:
                unfreed.under_way = True
                return Free(tuple(unfreed.refs.values()))
            resume = min(resume, unfreed.after)
        return None if resume == math.inf else Pause(resume)

    def ended(self, free: Free, error: DrayError | None, now: float) -> int:
        """Note how a request went; how many payloads are given up with it."""
        producer = free.refs[0].producer
        unfreed = self._by_producer[producer]
        unfreed.under_way = False
        unfreed.failures = 0 if error is None else unfreed.failures + 1
        if error is not None and error.retryable and unfreed.failures < self._most_tries:
            unfreed.after = now + self._pause
            return 0
        for ref in free.refs:
            del unfreed.refs[ref.identity]
        if not unfreed.refs:
            del self._by_producer[producer]
        return 0 if error is None or isinstance(error, ProducerLostError) else len(free.refs)

    def hurry(self) -> None:
        """Wait for no pause any more, and make each request only once: the end is near."""
        self._most_tries = 1
        for unfreed in self._by_producer.values():
            unfreed.after = -math.inf

    @property
    def under_way(self) -> int:
        """Requests under way."""
        return sum(unfreed.under_way for unfreed in self._by_producer.values())

    @property
    def wanted(self) -> int:
        """Requests under way, and those that could be."""
        return min(len(self._by_producer), self._most_under_way)

    def waiting(self) -> list[PayloadRef]:
        """Those that no answer has come for."""
        return [ref for unfreed in self._by_producer.values() for ref in unfreed.refs.values()]

    def __len__(self) -> int:
        return sum(len(unfreed.refs) for unfreed in self._by_producer.values())
