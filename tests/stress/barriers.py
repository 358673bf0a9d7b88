"""Builds of the producer that exist only for the stress test: what `membarrier` is replaced by in its process."""

from __future__ import annotations

import enum
import errno
import itertools
import random
from collections.abc import Callable
from typing import Final

from stress.books import CHOSEN

from dray.ring import membarrier
from dray.ring.direct import RETIRING, DirectLeases

_COLD_BYTES: Final = 256 << 20


class Build(enum.StrEnum):
    """What is different in the producer."""

    NONE = "none"
    CLOSE = "close"
    CLOSE_WITHOUT_BARRIER = "close without barrier"
    WITHOUT_WORDS = "without lease words"

    @property
    def close(self) -> bool:
        """The lease words are read directly after the store that forbids new leases."""
        return self in (Build.CLOSE, Build.CLOSE_WITHOUT_BARRIER)

    def make(self, head: memoryview) -> None:
        """Make this process such a producer; `head` is that of the books."""
        if self is Build.CLOSE_WITHOUT_BARRIER:
            membarrier.barrier = _no_barrier
        if self.close:
            read_words_at_once(head)
        if self is Build.WITHOUT_WORDS:
            DirectLeases.named = lambda self: {}  # type: ignore[method-assign]


def fail_at_random(probability: float, seed: int) -> None:
    """Have barriers fail, as the kernel may for want of memory."""
    rng = random.Random(seed)
    passes: Callable[[], None] = membarrier.barrier

    def barrier() -> None:
        if rng.random() < probability:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        passes()

    membarrier.barrier = barrier


def read_words_at_once(head: memoryview) -> None:
    """Read the lease words directly after the store that forbids new leases, with a barrier between the two.

    dray reads them some microseconds of Python later, in which the processor has written out its stores by itself.
    Here a store before this one misses the cache, so that both are written out late; the words are read at once;
    and consumers learn from `CHOSEN` when it happens. So only the barrier keeps the order.
    """
    cold = memoryview(bytearray(b"\1") * _COLD_BYTES)  # every page is mapped
    rng = random.Random(1)
    places = itertools.cycle(rng.sample(range(0, _COLD_BYTES, 64), 100_000))
    delays = itertools.cycle([range(rng.randrange(200)) for _ in range(10_007)])
    found: list[dict[int, int]] = []
    named = DirectLeases.named

    def suspect(self: DirectLeases, slot: int, sequence: int) -> None:
        (page, *_) = [attached.page.words for attached in self.attached.values()]
        generations, value = self.control.words, (sequence + 1) | RETIRING
        place, last = next(places), len(page) - 2  # the word that a consumer takes first
        barrier = membarrier.barrier
        head[CHOSEN] = sequence + 1
        for _ in next(delays):
            pass
        if barrier is _no_barrier:
            cold[place] = 1
            generations[slot] = value
            word = page[last]
        else:
            cold[place] = 1
            generations[slot] = value
            barrier()
            word = page[last]
        found.append({each - 1: 1 for each in (word, *page[:-2]) if each})

    def named_then(self: DirectLeases) -> dict[int, int]:
        return found.pop() if found else named(self)

    DirectLeases.suspect = suspect  # type: ignore[method-assign]
    DirectLeases.named = named_then  # type: ignore[method-assign]


def _no_barrier() -> None:
    """Nothing."""
