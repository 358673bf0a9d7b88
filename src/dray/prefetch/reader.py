"""`BatchReader`: reads batches of references, now or in the background."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dray.clock import MONOTONIC, Clock, Deadline
from dray.counters import Counters
from dray.errors import BufferClosedError, ConfigError, DrayError
from dray.payload import Selection, Values
from dray.payload.selection import Fields, Rows
from dray.prefetch.batch import MAX_READS, MAX_ROUNDS, BatchFetch, DoubleBuffer, Fetched, ReadAttempts
from dray.prefetch.freeing import CLOSE_SECONDS, MAX_ATTEMPTS, RETRY_PAUSE, FreeingThreads
from dray.prefetch.threads import ReadThreads, Source, Threading
from dray.protocol import PayloadRef
from dray.resources import Closing

logger = logging.getLogger("dray.prefetch")

BATCH_SECONDS = 60.0
GRACE_SECONDS = 0.5
"""Seconds after its deadline that a batch waits for reads that are about to end."""
MAX_THREADS = 64


@dataclass(frozen=True, slots=True)
class BatchReaderStatistics:
    """Counters of a `BatchReader`. `reading` and `to_free` are the values of now."""

    reads: int  # payloads read by layers 2 and 3
    reads_again: int  # references that layer 2 read again
    failed: int  # references that layer 2 gave up, once for each round
    late: int  # payloads that arrived after the end of their batch; they are not handed out and stay READY
    freed: int  # payloads that their producers freed
    unfreed: int  # payloads whose freeing was given up; their slots stay READY until their producer ends
    refused_starts: int  # batches that `start` refused
    reading: int  # groups being read
    to_free: int  # payloads that are neither freed nor given up


class BatchReader(Closing):
    """Layers 2 and 3 of reading, and prefetch. Thread-safe.

    A payload of a batch stays with its producer until it is handed out by `fetch_all`, `collect` or `result`. Only
    then is it freed, in the background. So a payload that arrives late, or that no call asks for, is not lost.
    Methods that need an open reader raise `BufferClosedError` after `close`, also if it comes while they wait.

    Args:
        source: where payloads are read from. It is closed with this object.
        threads: limit on the reads at the same time. Threads start when they are needed.
        attempts: reads of one reference in one round.
        rounds: rounds of a batch.
        read_timeout: seconds that one read of a payload, or of a group of a batch's payloads, may take.
        consume: free payloads that `collect` and `result` hand out. False leaves that to the caller, and `collect`
            keeps no results for `result`.
        free_attempts, free_pause: requests to free the same payloads, and the seconds between two of them.
        fields: those of each payload that are wanted, as for `PayloadClient.read`.
        rows: the rows of them, likewise.
        clock, threading: sources of the time, and of locks and threads.

    Raises:
        ConfigError: an argument is not allowed.
        SelectionError: `fields` and `rows` cannot be selected from any payload.
    """

    def __init__(
        self,
        source: Source,
        *,
        threads: int = 8,
        attempts: int = MAX_READS,
        rounds: int = MAX_ROUNDS,
        read_timeout: float | None = None,
        consume: bool = True,
        free_attempts: int = MAX_ATTEMPTS,
        free_pause: float = RETRY_PAUSE,
        fields: Fields | None = None,
        rows: Rows | None = None,
        clock: Clock = MONOTONIC,
        threading: Threading = threading,
    ) -> None:
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError("threads", threads, f"1 to {MAX_THREADS}")
        for name, count in (("attempts", attempts), ("rounds", rounds)):
            if count < 1:
                raise ConfigError(name, count, "1 or more")
        if read_timeout is not None and not read_timeout > 0:
            raise ConfigError("read_timeout", read_timeout, "seconds above 0, or None")
        max_seconds = math.inf if read_timeout is None else read_timeout
        self._source = source
        self._rounds = rounds
        self._consume = consume
        self._clock = clock
        self._counters = Counters("reads", "reads_again", "failed", "late", "freed", "unfreed", "refused_starts")
        selection = Selection.of(fields, rows)
        self._threads = ReadThreads(
            source,
            self._counters,
            selected={} if selection is None else selection.arguments,
            max_threads=threads,
            new_attempts=lambda deadline: ReadAttempts(deadline, attempts, max_seconds),
            on_retired=self._advance,
            clock=clock,
            threading=threading,
        )
        self._freeing = FreeingThreads(
            lambda refs, seconds: source.consume(refs, timeout=seconds),
            self._counters,
            max_attempts=free_attempts,
            pause=free_pause,
            on_crash=self._threads.crash,
            clock=clock,
            threading=threading,
        )
        self._buffers = DoubleBuffer()
        self._numbers = itertools.count(1)
        self._pid = os.getpid()

    def read_one(self, ref: PayloadRef, *, timeout: float | None = BATCH_SECONDS, consume: bool = True) -> Values:
        """Layer 2, in the calling thread: `PayloadClient.read`, repeated after a retryable error."""
        with self._lock():
            self._check_open()
            deadline = self._after(timeout)
        return self._threads.read_one(ref, deadline, consume)

    def fetch_all(
        self, refs: Iterable[PayloadRef], *, timeout: float | None = BATCH_SECONDS, consume: bool = True
    ) -> list[Fetched]:
        """Layer 3: read a batch concurrently, in up to three rounds. Return the results in the order of `refs`.

        A reference that cannot be read has an error as its outcome and does not affect the others: the error of
        its last read, which is `ProducerLostError` only if every endpoint refused in every round.

        `timeout` is for the whole batch. With `consume` the payloads that were read are freed.
        """
        with self._lock():
            self._check_open()
            batch = self._batch(refs, self._after(timeout))
            try:
                self._submit(batch)
                self._threads.locked_wait(lambda: batch.decided, batch.deadline + GRACE_SECONDS)
            finally:
                batch.close()
                self._threads.locked_changed()
            self._check_open()
            results = batch.results()
            if consume:
                self._freeing.add(each.ref for each in results if not isinstance(each.outcome, DrayError))
            return results

    def start(self, refs: Iterable[PayloadRef], *, timeout: float = BATCH_SECONDS) -> bool:
        """Fetch a batch in the background, within `timeout` seconds.

        Returns False if the batch is refused: an earlier batch is still being read, or one is deferred. An earlier
        batch that is decided and not collected is collected by this call.
        """
        with self._lock():
            self._check_open()
            batch = self._batch(refs, self._after(timeout))
            if self._buffers.replaceable:
                self._collect()
            if not self._buffers.start(batch):
                self._counters.add("refused_starts")
                logger.warning("prefetch of %d payloads refused: an earlier batch is being read", len(batch.refs))
                return False
            self._submit(batch)
            return True

    def defer(self, refs: Iterable[PayloadRef], *, timeout: float = BATCH_SECONDS) -> bool:
        """Fetch a batch when the one before it is collected, within `timeout` seconds from then.

        Without a batch before it, it starts at once. Returns False if a batch is deferred already.
        """
        with self._lock():
            self._check_open()
            accepted = self._buffers.defer(self._batch(refs, math.inf), timeout)
            self._advance()
            return accepted

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the batch in the background is decided, by default until its own deadline.

        Returns whether it is decided; True at once if there is no batch.
        """
        with self._lock():
            self._check_open()
            if timeout is not None:
                deadline = self._after(timeout)
            elif self._buffers.back is not None:
                deadline = self._buffers.back.deadline + GRACE_SECONDS
            else:
                deadline = self._after(BATCH_SECONDS)
            decided = self._threads.locked_wait(lambda: self._buffers.decided, deadline)
            self._check_open()
            return decided

    def collect(self) -> list[Fetched]:
        """End the batch in the background and return its results without waiting. The deferred batch starts.

        Payloads that arrive later are counted as late, are not handed out, and stay with their producers.
        """
        with self._lock():
            self._check_open()
            return self._collect()

    def result(self, ref: PayloadRef) -> Fetched | None:
        """Return the result for a reference of the batch collected last, or of the one being fetched.

        Waits for the payload if it is being fetched. Returns None if the reference is in neither batch. Results
        are kept until the next batch is collected.
        """
        with self._lock():
            self._check_open()
            batch = self._buffers.find(ref)
            if not isinstance(batch, BatchFetch):
                return batch
            self._threads.locked_wait(
                lambda: self._buffers.find(ref) is not batch or batch.has_result(ref),
                batch.deadline + GRACE_SECONDS,
            )
            self._check_open()
            if self._buffers.back is not batch:
                found = self._buffers.find(ref)
                return None if isinstance(found, BatchFetch) else found
            fetched, first = self._buffers.result(ref)
            self._threads.locked_changed()
            if first and self._consume and not isinstance(fetched.outcome, DrayError):
                self._freeing.add([ref])
            return fetched

    def discard(self, refs: Iterable[PayloadRef]) -> None:
        """Free, in the background, payloads that are not needed any more."""
        with self._lock():
            self._check_open()
            self._freeing.add(refs)

    def to_free(self) -> list[PayloadRef]:
        """Return the payloads that are to be freed, and are neither freed nor given up."""
        return self._freeing.waiting()

    @property
    def unfreed(self) -> int:
        """Payloads that were to be freed and are not: those that wait, and those that were given up."""
        return self._freeing.unfreed

    @property
    def fetching(self) -> tuple[PayloadRef, ...]:
        """References of the batch in the background."""
        with self._lock():
            return () if self._buffers.back is None else self._buffers.back.refs

    def statistics(self) -> BatchReaderStatistics:
        """Return the counters."""
        with self._threads.lock:
            reading = self._threads.locked_reading()
        waiting = len(self._freeing.waiting())
        return self._counters.statistics(BatchReaderStatistics, reading=reading, to_free=waiting)

    @property
    def alive(self) -> int:
        """Threads that have not ended: after `close`, those with a request that still hangs."""
        return self._threads.workers.alive + self._freeing.workers.alive

    def close(self, timeout: float = 5.0) -> None:
        """End all calls that wait, free what was handed out, close the source, join the threads. Twice is fine.

        Threads that are still running after `timeout` seconds are logged. They end with their requests.
        """
        if os.getpid() != self._pid:
            return
        deadline = Deadline.after(timeout, self._clock)
        self._threads.stop(self._closed_error())
        self._freeing.close(min(CLOSE_SECONDS, deadline.remaining))
        self._source.close()
        self._threads.workers.join(deadline.remaining, self._clock)
        self._freeing.join(deadline.remaining)
        if self.alive:
            logger.error("%d threads are still running %.1f s after the reader was closed", self.alive, timeout)

    def _lock(self) -> Any:
        """The lock itself, for `with`: a context manager in Python may keep it if a signal handler raises."""
        # A forked child must not take the lock: a thread that the child does not have may hold it.
        if os.getpid() != self._pid:
            raise self._closed_error()
        return self._threads.lock

    def _check_open(self) -> None:
        if self._threads.closing:
            raise self._closed_error()

    def _closed_error(self) -> BufferClosedError:
        return BufferClosedError("the reader is closed, or belongs to the process that this one was forked from")

    def _batch(self, refs: Iterable[PayloadRef], deadline: float) -> BatchFetch:
        return BatchFetch(next(self._numbers), refs, deadline, rounds=self._rounds)

    def _submit(self, batch: BatchFetch) -> None:
        if not batch.decided:
            self._threads.locked_submit(batch)

    def _collect(self) -> list[Fetched]:
        results, handed_out = self._buffers.collect(keep=self._consume)
        if self._consume:
            self._freeing.add(handed_out)
        self._advance()
        self._threads.locked_changed()
        return results

    def _advance(self) -> None:
        batch = self._buffers.advance(self._clock.now())
        if batch is not None:
            self._submit(batch)

    def _after(self, timeout: float | None) -> float:
        return Deadline.after(timeout, self._clock).at
