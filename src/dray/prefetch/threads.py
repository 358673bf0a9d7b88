"""The threads that read what `BatchFetch` decides."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Protocol

from dray.clock import Clock, Deadline
from dray.counters import Counters
from dray.errors import DrayError
from dray.payload import Values
from dray.prefetch.batch import BatchFetch, Outcome, Pause, Read, ReadAttempts
from dray.protocol import PayloadRef
from dray.transport.pipeline import ReadResult

logger = logging.getLogger("dray.prefetch")


class Source(Protocol):
    """Layer 1: the methods of a `PayloadClient` that are used. `close` ends reads that are under way."""

    def read(self, ref: PayloadRef, *, timeout: float | None, consume: bool) -> Values: ...
    def read_many(
        self, refs: Iterable[PayloadRef], *, timeout: float | None, consume: bool, return_errors: bool
    ) -> Iterator[ReadResult[Any]]: ...
    def consume(self, refs: Iterable[PayloadRef], *, timeout: float | None) -> int: ...
    def close(self) -> None: ...


class Threading(Protocol):
    """The part of the module `threading` that is used. A simulation replaces it."""

    @property
    def Lock(self) -> Callable[[], Any]: ...
    @property
    def Condition(self) -> Callable[[Any], Any]: ...
    @property
    def Thread(self) -> Callable[..., Any]: ...


class Workers:
    """Threads that run one function. They start on demand, under the lock of their owner."""

    def __init__(self, threading: Threading, name: str, run: Callable[[], None]) -> None:
        self._make = threading.Thread
        self._name = name
        self._run = run
        self._threads: tuple[Any, ...] = ()  # replaced, not changed: it is read without the lock

    def start(self, count: int) -> None:
        """Make sure that `count` threads have been started."""
        for number in range(len(self._threads), count):
            thread = self._make(target=self._run, name=f"{self._name}-{number}", daemon=True)
            thread.start()
            self._threads = (*self._threads, thread)

    @property
    def alive(self) -> int:
        """Threads that have not ended."""
        return sum(thread.is_alive() for thread in self._threads)

    def join(self, timeout: float | None, clock: Clock) -> None:
        """Wait until the threads have ended."""
        deadline = Deadline.after(timeout, clock)
        for thread in self._threads:
            thread.join(deadline.timeout)


class ReadThreads:
    """Up to `max_threads` threads that read any number of batches. They start when they are needed.

    Methods whose names begin with ``locked_`` are called with `lock` held, and `closing` is read with it.

    Args:
        selected: further keyword arguments of all reads, which select a part of each payload.
        new_attempts: returns the attempts at one read that ends at a time.
        on_retired: called, with the lock held, when a batch is decided and no read of it is under way.
    """

    def __init__(
        self,
        source: Source,
        counters: Counters,
        *,
        max_threads: int,
        selected: Mapping[str, Any],
        new_attempts: Callable[[float], ReadAttempts],
        on_retired: Callable[[], None],
        clock: Clock,
        threading: Threading,
    ) -> None:
        self.lock = threading.Lock()
        self.closing = False
        self._work = threading.Condition(self.lock)  # there may be something to read
        self._news = threading.Condition(self.lock)  # something was read
        self._source = source
        self._counters = counters
        self._max_threads = max_threads
        self._selected = selected
        self._new_attempts = new_attempts
        self._on_retired = on_retired
        self._clock = clock
        self._active: list[BatchFetch] = []
        self.workers = Workers(threading, "dray-read", self._run)
        self._crash: BaseException | None = None

    def read_one(self, ref: PayloadRef, deadline: float, consume: bool) -> Values:
        """Layer 2, in the calling thread."""
        attempts = self._new_attempts(deadline)
        while True:
            seconds = attempts.start(self._clock.now())
            try:
                arrays = self._source.read(ref, timeout=_timeout(seconds), consume=consume, **self._selected)
            except DrayError as error:
                if not attempts.may_retry(error, self._clock.now()) or self._is_closing():
                    raise
                self._counters.add("reads_again")
            else:
                self._counters.add("reads")
                return arrays

    def locked_submit(self, batch: BatchFetch) -> None:
        """Fetch a batch. It is decided at its deadline at the latest, or by `BatchFetch.close`."""
        self._active.append(batch)
        self.locked_changed()

    def locked_changed(self) -> None:
        """Start the threads that are needed, and make all threads and callers test their conditions again."""
        wanted = sum(batch.wanted for batch in self._active)
        # A thread for each read that may wait for a producer. Idle threads count: a read may be meant for them.
        self.workers.start(min(wanted, self._max_threads))
        self._work.notify_all()
        self._news.notify_all()

    def locked_wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until `condition` holds; False at the time `deadline`, or after `stop`."""
        while not self.closing and not condition():
            if self._crash is not None:
                raise self._crash
            left = deadline - self._clock.now()
            if left <= 0:
                return False
            self._news.wait(None if left == math.inf else left)
        return not self.closing

    def locked_reading(self) -> int:
        """Groups being read."""
        return sum(batch.reading for batch in self._active)

    def crash(self, error: BaseException) -> None:
        """Let all callers that wait raise the error that ended a thread."""
        with self.lock:
            self._crash = error
            self._news.notify_all()

    def stop(self, error: DrayError) -> None:
        """End all batches with `error`, and wake all threads and callers. Reads end when the source is closed."""
        with self.lock:
            self.closing = True
            for batch in self._active:
                batch.close(error)
            self.locked_changed()

    def _run(self) -> None:
        try:
            while self._read_next():
                pass
        except BaseException as crash:
            logger.critical("a thread that reads payloads ended", exc_info=crash)
            self.crash(crash)

    def _read_next(self) -> bool:
        task = self._next_task()
        if task is not None:
            self._read(*task)
        return task is not None

    def _next_task(self) -> tuple[BatchFetch, Read] | None:
        with self.lock:
            while not self.closing:
                now = self._clock.now()
                # A thread that waits refers to no batch: its payloads may lie in slots of their producers.
                due = self._due(now)
                if not isinstance(due, float):
                    return due
                if not self._retire():
                    self._work.wait(None if due == math.inf else due - now)
            return None

    def _due(self, now: float) -> tuple[BatchFetch, Read] | float:
        """What can be read now, else the time at which there may be something."""
        resume = math.inf
        for batch in self._active:
            action = batch.next(now)
            if isinstance(action, Read):
                return batch, action
            if isinstance(action, Pause):
                resume = min(resume, action.until)
        return resume

    def _retire(self) -> bool:
        """Forget batches that are decided and not being read; False if there are none."""
        active = [batch for batch in self._active if batch.reading or not batch.decided]
        retired = len(active) < len(self._active)
        if retired:
            self._active = active
            self._on_retired()
            self._news.notify_all()
        return retired

    def _read(self, batch: BatchFetch, read: Read) -> None:
        attempts = self._new_attempts(batch.deadline)
        refs: tuple[PayloadRef, ...] = read.refs
        while refs and not self._is_closing():
            try:
                refs = self._attempt(batch, refs, attempts)
            except DrayError as error:  # the source as a whole failed
                _forget_frames(error)
                with self.lock:
                    refs = tuple(ref for ref in refs if not batch.has_result(ref))
                for ref in refs:
                    self._report(batch, ref, error)
                refs = ()
            self._counters.add("reads_again", len(refs))
        with self.lock:
            batch.finish(read, self._clock.now())
            self.locked_changed()

    def _attempt(
        self, batch: BatchFetch, refs: tuple[PayloadRef, ...], attempts: ReadAttempts
    ) -> tuple[PayloadRef, ...]:
        """Read references once; return those to read again."""
        again = []
        seconds = _timeout(attempts.start(self._clock.now()))
        results = self._source.read_many(
            refs, timeout=seconds, consume=False, return_errors=True, **self._selected
        )
        try:
            for result in results:
                ref, outcome = result.ref, result.outcome
                if isinstance(outcome, DrayError):
                    _forget_frames(outcome)
                    if attempts.may_retry(outcome, self._clock.now()):
                        again.append(ref)
                        continue
                if not self._report(batch, ref, outcome):
                    return ()
        finally:
            if isinstance(results, Generator):
                results.close()  # releases the leases of payloads that it has not yielded
        return tuple(again)

    def _report(self, batch: BatchFetch, ref: PayloadRef, outcome: Outcome) -> bool:
        failed = isinstance(outcome, DrayError)
        with self.lock:
            wanted = batch.wanted
            accepted = batch.report(ref, outcome)
            if batch.wanted > wanted:
                self.locked_changed()
            else:
                self._news.notify_all()
        if failed:
            logger.debug("batch %d: %s", batch.number, outcome)
        self._counters.add("failed" if failed else "reads" if accepted else "late")
        return accepted

    def _is_closing(self) -> bool:
        with self.lock:
            return self.closing


def _forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error that is kept as an outcome: they hold connections and buffers."""
    seen: set[int] = set()  # an error may be its own cause
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _timeout(seconds: float) -> float | None:
    return None if seconds == math.inf else seconds
