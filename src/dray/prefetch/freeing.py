"""Frees consumed payloads at their producers in the background: the state machine and its threads."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dray.clock import MONOTONIC, Clock, Deadline
from dray.counters import Counters
from dray.errors import DrayError, ProducerLostError
from dray.prefetch.batch import Identity, Pause
from dray.prefetch.threads import Threading, Workers
from dray.protocol import PayloadRef
from dray.resources import Closing

logger = logging.getLogger("dray.prefetch")

MAX_ATTEMPTS = 3  # requests for the same payloads
RETRY_PAUSE = 1.0  # seconds between two requests for the same payloads
MAX_REQUESTS = 2  # at the same time, each in a thread of its own
REQUEST_SECONDS = 5.0  # limit of one request
CLOSE_SECONDS = 1.0  # limit of all last requests


@dataclass(frozen=True, slots=True)
class Free:
    """Action: request that the producer of `refs` frees them; then report to `Freeing.report`."""

    refs: tuple[PayloadRef, ...]


@dataclass(slots=True)
class _Unfreed:
    refs: dict[Identity, PayloadRef]
    failures: int = 0
    after: float = -math.inf
    requested: bool = False


class Freeing:
    """Decides which producer gets the next request. Each producer has one request at a time, for all its payloads.

    Args:
        max_attempts: requests for the same payloads; then they are given up, unless their producer is lost.
        pause: seconds between two requests for the same payloads.
    """

    def __init__(self, max_attempts: int = MAX_ATTEMPTS, pause: float = RETRY_PAUSE) -> None:
        self._max_attempts = max_attempts
        self._pause = pause
        self._by_producer: dict[bytes, _Unfreed] = {}

    def add(self, refs: Iterable[PayloadRef]) -> None:
        """Add payloads to free."""
        for ref in refs:
            self._by_producer.setdefault(ref.producer, _Unfreed({})).refs[ref.identity] = ref

    def next(self, now: float) -> Free | Pause | None:
        """Return the next action; None if there is none before a request ends or payloads are added."""
        waiting = [unfreed for unfreed in self._by_producer.values() if not unfreed.requested]
        if not waiting or len(self._by_producer) - len(waiting) >= MAX_REQUESTS:
            return None
        first = min(waiting, key=lambda unfreed: unfreed.after)
        if now < first.after:
            return Pause(first.after)
        first.requested = True
        return Free(tuple(first.refs.values()))

    def report(self, free: Free, error: DrayError | None, now: float) -> int:
        """Record the end of a request; return how many payloads are given up."""
        producer = free.refs[0].producer
        unfreed = self._by_producer[producer]
        unfreed.requested = False
        unfreed.failures = 0 if error is None else unfreed.failures + 1
        if error is not None and error.retryable and unfreed.failures < self._max_attempts:
            unfreed.after = now + self._pause
            return 0
        unfreed.after = now  # behind the producers that have waited longer
        for ref in free.refs:
            del unfreed.refs[ref.identity]
        if not unfreed.refs:
            del self._by_producer[producer]
        return 0 if error is None or isinstance(error, ProducerLostError) else len(free.refs)

    def hurry(self) -> None:
        """End all pauses, and repeat no request from now on."""
        self._max_attempts = 1
        for unfreed in self._by_producer.values():
            unfreed.after = -math.inf

    @property
    def wanted(self) -> int:
        """Requests under way, and those that could be."""
        return min(len(self._by_producer), MAX_REQUESTS)

    def waiting(self) -> list[PayloadRef]:
        """Return the payloads that are neither freed nor given up."""
        return [ref for unfreed in self._by_producer.values() for ref in unfreed.refs.values()]


class FreeingThreads(Closing):
    """Frees payloads in up to `MAX_REQUESTS` threads, which start with the first payloads. Thread-safe.

    Args:
        consume: frees payloads of one producer within some seconds, and returns how many it freed.
        counters: where ``freed`` and ``unfreed`` (given up) payloads are counted.
        max_attempts, pause: see `Freeing`.
        on_crash: called with an error that ends a thread because it is not a `DrayError`.
        clock, threading: sources of the time, and of locks and threads.
    """

    def __init__(
        self,
        consume: Callable[[tuple[PayloadRef, ...], float], int],
        counters: Counters,
        *,
        max_attempts: int = MAX_ATTEMPTS,
        pause: float = RETRY_PAUSE,
        on_crash: Callable[[BaseException], None] = lambda crash: None,
        clock: Clock = MONOTONIC,
        threading: Threading = threading,
    ) -> None:
        self._consume = consume
        self._counters = counters
        self._on_crash = on_crash
        self._clock = clock
        # `with` takes the lock itself: a `Condition` may keep it if a signal handler raises within `__enter__`.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._state = Freeing(max_attempts, pause)
        self.workers = Workers(threading, "dray-free", self._run)
        self._closing: Deadline | None = None

    def add(self, refs: Iterable[PayloadRef]) -> None:
        """Free payloads in the background."""
        with self._lock:
            self._state.add(refs)
            if self._closing is None:
                self.workers.start(self._state.wanted)
            self._changed.notify_all()

    def waiting(self) -> list[PayloadRef]:
        """Return the payloads that are neither freed nor given up."""
        with self._lock:
            return self._state.waiting()

    @property
    def unfreed(self) -> int:
        """Payloads that are not freed: those that wait, and those that were given up."""
        with self._lock:
            return len(self._state.waiting()) + int(self._counters["unfreed"])

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Send each producer one last request, within `timeout` seconds together. Twice is fine.

        A request under way may take longer, until the client that makes it is closed; `join` waits for its end.
        """
        with self._lock:
            if self._closing is None:
                self._closing = Deadline.after(timeout, self._clock)
            left = self._closing.remaining
            self._state.hurry()
            self._changed.notify_all()
        self.join(left)
        if unfreed := self.unfreed:
            logger.warning("%d payloads were not freed: their producers did not answer", unfreed)

    def join(self, timeout: float | None = None) -> None:
        """Wait, after `close`, until the threads have ended."""
        self.workers.join(timeout, self._clock)

    def _run(self) -> None:
        try:
            while (task := self._next_task()) is not None:
                free, seconds = task
                freed, error = 0, None
                try:
                    freed = self._consume(free.refs, seconds)
                except DrayError as failure:
                    logger.info("%d payloads are not freed yet: %s", len(free.refs), failure)
                    error = failure
                with self._lock:
                    unfreed = self._state.report(free, error, self._clock.now())
                    self._counters.add_all({"freed": freed, "unfreed": unfreed})
                    self._changed.notify_all()
        except BaseException as crash:
            logger.critical("a thread that frees payloads ended", exc_info=crash)
            self._on_crash(crash)

    def _next_task(self) -> tuple[Free, float] | None:
        """The next request and its time limit; None if this thread has nothing left to do."""
        with self._lock:
            while self._closing is None or not self._closing.expired:
                now = self._clock.now()
                action = self._state.next(now)
                if isinstance(action, Free):
                    left = math.inf if self._closing is None else self._closing.remaining
                    return action, min(REQUEST_SECONDS, left)
                if self._closing is not None:
                    break
                self._changed.wait(None if action is None else action.until - now)
            return None
