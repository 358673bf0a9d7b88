"""Layers 2 and 3 of reading as state machines: one reference, and one batch of them.

They decide, `threads` does. Each method is an event, takes the time from its caller and returns what to do;
nothing here waits, starts a thread, opens a connection or reads a clock. Times are seconds on one monotonic clock,
``inf`` where nothing bounds them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from dray.errors import DrayError, ProducerLostError, TransportError, TransportTimeout, Unreachable
from dray.payload import Arrays
from dray.protocol import PayloadRef

MOST_READS = 2
"""Layer 2: reads of one reference in one round."""
MOST_ROUNDS = 3
"""Layer 3: rounds of a batch."""
ROUND_PAUSE = 0.1
"""Seconds between two rounds of a batch: what failed at once gets a moment to recover."""
GROUP = 32
"""References of one producer that are read together, pipelined over one connection."""
MOST_GROUPS = 2
"""Groups of one producer under way at a time, once it has answered."""

Outcome = Arrays | DrayError
Identity = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of one reference of one batch.

    Attributes:
        batch: the batch's number, unique in its reader.
        ref: the reference.
        outcome: its arrays, or the error that ended it.
    """

    batch: int
    ref: PayloadRef
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Read:
    """Read `refs`, all of one producer, layer 2 with all its tries, until the batch's time is over.

    Report each to `BatchFetch.came`, and the end to `BatchFetch.ended`.
    """

    refs: tuple[PayloadRef, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """There is nothing to do before the time `until`, unless something happens."""

    until: float


class ReadTries:
    """Layer 2: how often references are read within one round, and how long each time.

    Args:
        by: when all of it must be over.
        most: tries.
        longest: seconds that one try may take at most.
    """

    def __init__(self, by: float, most: int = MOST_READS, longest: float = math.inf) -> None:
        self._by = by
        self._left = most
        self._longest = longest

    def next(self, now: float) -> float:
        """Seconds for the try that starts now: all that is left. Layer 1 sees to it that no endpoint takes all."""
        self._left -= 1
        return min(self._longest, max(0.0, self._by - now))

    def again(self, error: DrayError, now: float) -> bool:
        """Whether what failed with `error` is to be tried once more."""
        return error.retryable and self._left > 0 and now < self._by


class BatchFetch:
    """Layer 3: one batch, every reference for itself, what fails retryably again in the next round.

    References of one producer are read together, as many as `GROUP`: one group at a time until something came of
    it, then two. The producer with the fewest groups under way comes next. So one that does not answer holds up
    its own payloads only. A reference that is in the batch twice is read once. After `close` nothing is accepted.

    Args:
        number: the batch's number.
        refs: what to read.
        by: when all of it must be over.
        rounds: how many.
        pause: seconds between two rounds.
    """

    def __init__(
        self,
        number: int,
        refs: Iterable[PayloadRef],
        by: float,
        rounds: int = MOST_ROUNDS,
        pause: float = ROUND_PAUSE,
    ) -> None:
        self.number = number
        self.refs = tuple(refs)
        self.by = by
        self._rounds = rounds
        self._pause = pause
        self._resume = -math.inf
        self._waiting: dict[bytes, deque[PayloadRef]] = {}  # by producer
        self._reading: Counter[bytes] = Counter()  # groups, by producer
        self._again: list[PayloadRef] = []  # for the next round
        self._errors: dict[Identity, DrayError] = {}
        self._seen: set[Identity] = set()  # not refused in some round
        self._awake: set[bytes] = set()  # producers that a payload or an answer came from
        self._outcomes: dict[Identity, Outcome] = {}
        self._closed = False
        distinct = {ref.identity: ref for ref in self.refs}
        self._count = len(distinct)
        for ref in distinct.values():
            self._wait(ref)

    # --- events -----------------------------------------------------------------------------------------------

    def next(self, now: float) -> Read | Pause | None:
        """What to do now; None when only the end of a read, or nothing at all, can bring more."""
        if now >= self.by:
            self._expire()
        free = [producer for producer in self._waiting if self._reading[producer] < self._most_groups(producer)]
        if not free:
            return None
        if now < self._resume:
            return Pause(min(self._resume, self.by))
        producer = min(free, key=self._reading.__getitem__)
        queue = self._waiting[producer]
        refs = tuple(queue.popleft() for _ in range(min(GROUP, len(queue))))
        if not queue:
            del self._waiting[producer]
        self._reading[producer] += 1
        return Read(refs)

    def came(self, ref: PayloadRef, outcome: Outcome) -> bool:
        """Note how the read of one reference went; False if it is too late: its payload must not be handed out."""
        if self._closed:
            return False
        if not isinstance(outcome, TransportError):
            self._awake.add(ref.producer)
        if not isinstance(outcome, DrayError):
            self._outcomes[ref.identity] = outcome
            return True
        refused = _refused(outcome)
        if not refused:
            self._seen.add(ref.identity)
        self._errors[ref.identity] = outcome
        if self._rounds > 1 and (outcome.retryable or refused):
            self._again.append(ref)
        else:
            self._give_up(ref)
        return True

    def ended(self, read: Read, now: float) -> None:
        """Note that a read is over: each of its references has come, or will not."""
        self._reading[read.refs[0].producer] -= 1
        if self._again and not self._waiting and not self.reading:
            self._rounds -= 1
            self._resume = now + self._pause
            for ref in self._again:
                self._wait(ref)
            self._again.clear()

    def close(self, error: DrayError | None = None) -> None:
        """End the batch: what is not there yet fails with `error`, by default a timeout. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        self._again.clear()
        for ref in self.refs:
            if error is not None:
                self._outcomes.setdefault(ref.identity, error)
            else:
                self._give_up(ref, "the batch was ended before the payload had come")

    # --- state ------------------------------------------------------------------------------------------------

    @property
    def reading(self) -> int:
        """Groups under way."""
        return self._reading.total()

    @property
    def wanted(self) -> int:
        """Groups under way, and those that could be."""
        more = (
            min(self._most_groups(producer) - self._reading[producer], -(-len(queue) // GROUP))
            for producer, queue in self._waiting.items()
        )
        return self.reading + sum(more)

    @property
    def settled(self) -> bool:
        """It is decided what became of every reference. Reads may be about to end, or after `close` hang."""
        return len(self._outcomes) == self._count

    def has(self, ref: PayloadRef) -> bool:
        """It is decided what became of a reference."""
        return ref.identity in self._outcomes

    def result(self, ref: PayloadRef) -> Fetched:
        """What became of a reference; after `close`, or when the batch `has` it."""
        return Fetched(self.number, ref, self._outcomes[ref.identity])

    def results(self) -> list[Fetched]:
        """What became of each reference, in the order they were given; after `close`, or when `settled`."""
        return [self.result(ref) for ref in self.refs]

    def __contains__(self, ref: PayloadRef) -> bool:
        return any(ref.identity == each.identity for each in self.refs)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "settled" if self.settled else f"{self.wanted} to read"
        return f"<BatchFetch {self.number}: {len(self._outcomes)} of {len(self.refs)} done, {state}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _most_groups(self, producer: bytes) -> int:
        return MOST_GROUPS if producer in self._awake else 1

    def _wait(self, ref: PayloadRef) -> None:
        self._waiting.setdefault(ref.producer, deque()).append(ref)

    def _expire(self) -> None:
        """Its time is over: start no more reads."""
        for ref in (*chain.from_iterable(self._waiting.values()), *self._again):
            self._give_up(ref, "the batch's time was over before the payload could be read")
        self._waiting.clear()
        self._again.clear()

    def _give_up(self, ref: PayloadRef, untried: str = "") -> None:
        """The outcome of a reference that is not tried again: why it failed last, else a timeout."""
        if ref.identity in self._outcomes:
            return
        error = self._errors.get(ref.identity)
        if error is None:
            error = TransportTimeout(untried, slot=ref.slot, sequence=ref.sequence)
        elif ref.identity in self._seen and _refused(error) and isinstance(error.__cause__, TransportError):
            # Lost means refused in every round; in an earlier one somebody was there.
            error = error.__cause__
        self._outcomes[ref.identity] = error


def _refused(error: DrayError) -> bool:
    """Every endpoint refused the connection: lost if that stays so, and not if a server is only restarting.

    Where another producer answers in its place, the producer is lost for good.
    """
    return isinstance(error, ProducerLostError) and isinstance(error.__cause__, Unreachable)
