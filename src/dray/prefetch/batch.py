"""Layers 2 and 3 of reading as state machines: attempts at one read, one batch of references, and two batches.

These classes decide, and `dray.prefetch.threads` acts. Each method is an event: it gets the time from its caller
and returns the next action. Nothing here waits, starts a thread, opens a connection or reads a clock. Times are
seconds on one monotonic clock; ``inf`` means no limit.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from dray.errors import DrayError, ProducerLostError, TransportError, TransportTimeout, Unreachable
from dray.payload import Values
from dray.protocol import PayloadRef

MAX_READS = 2  # layer 2: reads of one reference in one round
MAX_ROUNDS = 3  # layer 3: rounds of a batch
ROUND_PAUSE = 0.1  # seconds between two rounds, in which the cause of a failure may pass
GROUP = 32  # references of one producer that are read together, pipelined over one connection
MAX_GROUPS = 2  # groups of one producer that are read at the same time, once it has answered

Outcome = Values | DrayError
Identity = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result for one reference of one batch."""

    batch: int  # the batch's number, unique in its reader
    ref: PayloadRef
    outcome: Outcome  # arrays, or the error of the last read


@dataclass(frozen=True, slots=True)
class Read:
    """Action: read `refs`, all of one producer; then `BatchFetch.report` each and `BatchFetch.finish` the read."""

    refs: tuple[PayloadRef, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Action: wait for an event until the time `until`."""

    until: float


class ReadAttempts:
    """Layer 2: limits the attempts at one read in one round, each to `max_seconds` and all to `deadline`."""

    def __init__(self, deadline: float, max_attempts: int = MAX_READS, max_seconds: float = math.inf) -> None:
        self._deadline = deadline
        self._left = max_attempts
        self._max_seconds = max_seconds

    def start(self, now: float) -> float:
        """Begin an attempt and return its seconds: all that are left, which layer 1 divides among endpoints."""
        self._left -= 1
        return min(self._max_seconds, max(0.0, self._deadline - now))

    def may_retry(self, error: DrayError, now: float) -> bool:
        """Whether another attempt may follow the one that failed with `error`."""
        return error.retryable and self._left > 0 and now < self._deadline


class BatchFetch:
    """Layer 3: one batch. Each reference has its own outcome; retryable failures are read again in the next round.

    References of one producer are read together, `GROUP` at most: one group until the first outcome, then two
    groups at the same time. The producer with the fewest groups being read comes next. So a producer that does not
    answer delays its own payloads only. A reference that is in the batch twice is read once.

    Args:
        number: number of the batch.
        refs: references to read.
        deadline: time at which the batch ends.
        rounds, pause: limit on the rounds, and the seconds between two of them.
    """

    def __init__(
        self,
        number: int,
        refs: Iterable[PayloadRef],
        deadline: float,
        *,
        rounds: int = MAX_ROUNDS,
        pause: float = ROUND_PAUSE,
    ) -> None:
        self.number = number
        self.refs = tuple(refs)
        self.deadline = deadline
        self._rounds = rounds
        self._pause = pause
        self._resume = -math.inf
        self._waiting: dict[bytes, deque[PayloadRef]] = {}  # by producer
        self._reading: Counter[bytes] = Counter()  # groups, by producer
        self._again: dict[Identity, PayloadRef] = {}  # for the next round
        self._errors: dict[Identity, DrayError] = {}
        self._seen: set[Identity] = set()  # some round did not end with a refused connection
        self._answering: set[bytes] = set()  # producers that sent a payload or an answer
        self._outcomes: dict[Identity, Outcome] = {}
        self._closed = False
        distinct = {ref.identity: ref for ref in self.refs}
        self._identities = distinct.keys()
        for ref in distinct.values():
            self._wait(ref)

    def next(self, now: float) -> Read | Pause | None:
        """Return the next action; None if there is none before a read ends."""
        if now >= self.deadline:
            self._expire()
        free = [producer for producer in self._waiting if self._reading[producer] < self._max_groups(producer)]
        if not free:
            return None
        if now < self._resume:
            return Pause(min(self._resume, self.deadline))
        producer = min(free, key=self._reading.__getitem__)
        queue = self._waiting[producer]
        refs = tuple(queue.popleft() for _ in range(min(GROUP, len(queue))))
        if not queue:
            del self._waiting[producer]
        self._reading[producer] += 1
        return Read(refs)

    def report(self, ref: PayloadRef, outcome: Outcome) -> bool:
        """Record the outcome of reading `ref`; False after `close`: the payload must then not be handed out."""
        if self._closed:
            return False
        if not isinstance(outcome, TransportError):
            self._answering.add(ref.producer)
        if not isinstance(outcome, DrayError):
            self._outcomes[ref.identity] = outcome
            return True
        refused = _refused(outcome)
        if not refused:
            self._seen.add(ref.identity)
        self._errors[ref.identity] = outcome
        if self._rounds > 1 and (outcome.retryable or refused):
            self._again[ref.identity] = ref
        else:
            self._give_up(ref)
        return True

    def finish(self, read: Read, now: float) -> None:
        """Record the end of a read. References without a report have no outcome."""
        self._reading[read.refs[0].producer] -= 1
        if self._again and not self._waiting and not self.reading:
            self._rounds -= 1
            self._resume = now + self._pause
            for ref in self._again.values():
                self._wait(ref)
            self._again.clear()

    def close(self, error: DrayError | None = None) -> None:
        """End the batch. References without an outcome get `error`, by default a timeout. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        self._again.clear()
        for ref in self.refs:
            if error is not None:
                self._outcomes.setdefault(ref.identity, error)
            else:
                self._give_up(ref, "the batch ended before the payload arrived")

    @property
    def reading(self) -> int:
        """Groups being read."""
        return self._reading.total()

    @property
    def wanted(self) -> int:
        """Groups being read, and those that could be read at the same time."""
        more = (
            min(self._max_groups(producer) - self._reading[producer], -(-len(queue) // GROUP))
            for producer, queue in self._waiting.items()
        )
        return self.reading + sum(more)

    @property
    def decided(self) -> bool:
        """Every reference has an outcome. Reads may still be under way, after `close` for a long time."""
        return len(self._outcomes) == len(self._identities)

    def has_result(self, ref: PayloadRef) -> bool:
        return ref.identity in self._outcomes

    def result(self, ref: PayloadRef) -> Fetched:
        """Return the result for a reference that has one. After `close` each has."""
        return Fetched(self.number, ref, self._outcomes[ref.identity])

    def results(self) -> list[Fetched]:
        """Return the result for each reference of a `decided` batch, in the order of the batch."""
        return [self.result(ref) for ref in self.refs]

    def __contains__(self, ref: PayloadRef) -> bool:
        return ref.identity in self._identities

    def __repr__(self) -> str:
        state = "closed" if self._closed else "decided" if self.decided else f"{self.wanted} to read"
        return f"<BatchFetch {self.number}: {len(self._outcomes)} of {len(self.refs)} done, {state}>"

    def _max_groups(self, producer: bytes) -> int:
        return MAX_GROUPS if producer in self._answering else 1

    def _wait(self, ref: PayloadRef) -> None:
        self._waiting.setdefault(ref.producer, deque()).append(ref)

    def _expire(self) -> None:
        for ref in (*chain.from_iterable(self._waiting.values()), *self._again.values()):
            self._give_up(ref, "the batch's time ended before the payload could be read")
        self._waiting.clear()
        self._again.clear()

    def _give_up(self, ref: PayloadRef, untried: str = "") -> None:
        """Make the error of the last read the outcome; a timeout with the text `untried` if there was no read."""
        if ref.identity in self._outcomes:
            return
        error = self._errors.get(ref.identity)
        if error is None:
            error = TransportTimeout(untried, slot=ref.slot, sequence=ref.sequence)
        elif ref.identity in self._seen and _refused(error) and isinstance(error.__cause__, TransportError):
            # Lost means refused in every round, and an earlier round reached the producer.
            error = error.__cause__
        self._outcomes[ref.identity] = error


class DoubleBuffer:
    """The results of the batch in use (front), the batch being fetched (back), and the batch to fetch after it.

    Results are found by their reference, so no result can be mistaken for another. A batch starts only when no
    read of an earlier batch is under way.
    """

    def __init__(self) -> None:
        self.back: BatchFetch | None = None
        self._deferred: BatchFetch | None = None
        self._seconds = 0.0  # for the deferred batch
        self._front: dict[Identity, Fetched] = {}
        self._handed_out: set[Identity] = set()  # of the batch being fetched
        self._ending: list[BatchFetch] = []  # collected with reads under way

    def start(self, batch: BatchFetch) -> bool:
        """Fetch a batch; False if it is refused: an earlier batch is not collected, or is still being read."""
        if self.back is not None or self._deferred is not None or self._busy:
            return False
        self.back = batch
        return True

    @property
    def replaceable(self) -> bool:
        """The batch being fetched is decided, and another may start as soon as it is collected."""
        return self.back is not None and self.back.decided and self._deferred is None and not self._busy

    def defer(self, batch: BatchFetch, seconds: float) -> bool:
        """Fetch a batch, within `seconds`, after the one before it; False if one is deferred already."""
        if self._deferred is not None:
            return False
        self._deferred, self._seconds = batch, seconds
        return True

    def advance(self, now: float) -> BatchFetch | None:
        """Make the deferred batch the one being fetched and return it; None if it must still wait."""
        batch = self._deferred
        if batch is None or self.back is not None or self._busy:
            return None
        batch.deadline = now + self._seconds
        self.back, self._deferred = batch, None
        return batch

    def find(self, ref: PayloadRef) -> Fetched | BatchFetch | None:
        """Return the result for a reference, or the batch being fetched if the reference is in it."""
        found = self._front.get(ref.identity)
        if found is None and self.back is not None and ref in self.back:
            return self.back
        return found

    def result(self, ref: PayloadRef) -> tuple[Fetched, bool]:
        """Return the result for a reference of the batch being fetched, and whether this is the first time.

        If there is no result yet, the batch ends: the caller has waited as long as the batch had.
        """
        assert self.back is not None
        if not self.back.has_result(ref):
            self._end(self.back)
        first = ref.identity not in self._handed_out
        self._handed_out.add(ref.identity)
        return self.back.result(ref), first

    def collect(self, *, keep: bool = True) -> tuple[list[Fetched], list[PayloadRef]]:
        """End the batch being fetched; its results replace those in front, where they are kept.

        Returns the results, and the references of payloads that are handed out by this for the first time.
        """
        batch, self.back = self.back, None
        before, self._handed_out = self._handed_out, set()
        if batch is None:
            return [], []
        self._end(batch)
        results = batch.results()
        found = {fetched.ref.identity: fetched for fetched in results}
        self._front = found if keep else {}
        return results, [
            fetched.ref
            for identity, fetched in found.items()
            if identity not in before and not isinstance(fetched.outcome, DrayError)
        ]

    @property
    def decided(self) -> bool:
        """The batch being fetched is decided, or there is none and none is deferred."""
        return self._deferred is None if self.back is None else self.back.decided

    def _end(self, batch: BatchFetch) -> None:
        if not batch.decided:
            self._ending.append(batch)
        batch.close()

    @property
    def _busy(self) -> bool:
        self._ending = [batch for batch in self._ending if batch.reading]
        return bool(self._ending)


def _refused(error: DrayError) -> bool:
    """Whether every endpoint refused the connection. If that stays so in every round, the producer is lost.

    A server that restarts refuses for a moment only. Where another producer answers, the producer is lost at once.
    """
    return isinstance(error, ProducerLostError) and isinstance(error.__cause__, Unreachable)
