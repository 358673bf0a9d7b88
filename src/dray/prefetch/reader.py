"""`BatchReader`: reads batches of references, now or in the background."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from dray.clock import MONOTONIC, Clock, Deadline
from dray.counters import Counters
from dray.errors import BufferClosedError, ConfigError, DrayError
from dray.payload import Arrays
from dray.prefetch.batch import MOST_READS, MOST_ROUNDS, BatchFetch, Fetched
from dray.prefetch.double_buffer import DoubleBuffer
from dray.prefetch.threads import ReadThreads, Source, Threading
from dray.protocol import PayloadRef

logger = logging.getLogger("dray.prefetch")

BATCH_SECONDS = 60.0
GRACE_SECONDS = 0.5
"""How long after its deadline a batch waits for reads that are about to give up."""
MOST_THREADS = 64


class BatchReader:
    """Layers 2 and 3 of reading, and prefetch. Thread-safe.

    A payload of a batch stays with its producer until it is handed out, by `fetch_all`, `collect` or `take`. Only
    then is the producer told, in the background, that its slot is free. So what comes too late, or is not asked
    for, is not lost.

    Args:
        source: what to read from; closed with this object.
        threads: how many reads can be under way at a time. They start when they are needed.
        attempts: reads of one reference in one round.
        rounds: rounds of a batch.
        read_timeout: seconds that one read may take at most, of a payload or of a group of a batch's; None leaves
            that to the batch's deadline.
        clock: where time comes from.
        threading: where locks and threads come from.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self,
        source: Source,
        *,
        threads: int = 8,
        attempts: int = MOST_READS,
        rounds: int = MOST_ROUNDS,
        read_timeout: float | None = None,
        clock: Clock = MONOTONIC,
        threading: Threading = threading,
    ) -> None:
        if not 1 <= threads <= MOST_THREADS:
            raise ConfigError("threads", threads, f"1 to {MOST_THREADS}")
        for name, most in (("attempts", attempts), ("rounds", rounds)):
            if most < 1:
                raise ConfigError(name, most, "1 or more")
        if read_timeout is not None and not read_timeout > 0:
            raise ConfigError("read_timeout", read_timeout, "seconds above 0, or None")
        longest = math.inf if read_timeout is None else read_timeout
        self._rounds = rounds
        self._clock = clock
        self._counters = Counters("reads", "reads_again", "failed", "late", "freed", "unfreed", "refused_starts")
        self._threads = ReadThreads(
            source, threads, attempts, longest, self._counters, self._advance, clock, threading
        )
        self._buffers = DoubleBuffer()
        self._numbers = itertools.count(1)
        self._pid = os.getpid()

    # --- now --------------------------------------------------------------------------------------------------

    def read_one(self, ref: PayloadRef, *, timeout: float | None = BATCH_SECONDS, consume: bool = True) -> Arrays:
        """Layer 2, in the calling thread: read one payload, again if that fails in a way that may pass.

        Raises:
            As `PayloadClient.read`.
        """
        with self._lock():
            self._check_open()
            by = self._by(timeout)
        return self._threads.read_one(ref, by, consume)

    def fetch_all(
        self, refs: Iterable[PayloadRef], *, timeout: float | None = BATCH_SECONDS, consume: bool = True
    ) -> list[Fetched]:
        """Layer 3: read a batch, concurrently and in up to three rounds; what became of each, in their order.

        A reference that cannot be read has its error as outcome and does not touch the others: `StaleSlotError`,
        `ProducerLostError` where every endpoint refused in every round, otherwise why its last read failed.

        Args:
            refs: what to read.
            timeout: seconds for the whole batch.
            consume: free what was read.

        Raises:
            BufferClosedError: the reader is closed, or gets closed meanwhile.
        """
        with self._lock():
            self._check_open()
            batch = self._batch(refs, self._by(timeout))
            try:
                self._submit(batch)
                self._threads.locked_wait(lambda: batch.settled, batch.by + GRACE_SECONDS)
            finally:
                batch.close()
                self._threads.locked_changed()
            self._check_open()
            results = batch.results()
            if consume:
                self._threads.locked_free(f.ref for f in results if not isinstance(f.outcome, DrayError))
            return results

    # --- in the background ------------------------------------------------------------------------------------

    def start(self, refs: Iterable[PayloadRef], *, timeout: float = BATCH_SECONDS) -> bool:
        """Fetch a batch in the background, within `timeout` seconds.

        Returns False if it is refused: an earlier batch is still being read, or one is deferred. An earlier one
        that has come and was not collected is collected by this.

        Raises:
            BufferClosedError: the reader is closed.
        """
        with self._lock():
            self._check_open()
            batch = self._batch(refs, self._by(timeout))
            if self._buffers.displaceable:
                self._collect()
            if not self._buffers.start(batch):
                self._counters.add("refused_starts")
                logger.warning("prefetch of %d payloads refused: an earlier one is not over", len(batch.refs))
                return False
            self._submit(batch)
            return True

    def defer(self, refs: Iterable[PayloadRef], *, timeout: float = BATCH_SECONDS) -> bool:
        """Fetch a batch when the one before it is collected, or now if there is none; as `start` otherwise.

        Returns False if one is deferred already.

        Raises:
            BufferClosedError: the reader is closed.
        """
        with self._lock():
            self._check_open()
            accepted = self._buffers.defer(self._batch(refs, math.inf), timeout)
            self._advance()
            return accepted

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the batch in the background has come; True at once if there is none.

        Args:
            timeout: seconds; by default as long as the batch itself has.

        Raises:
            BufferClosedError: the reader is closed, or gets closed meanwhile.
        """
        with self._lock():
            self._check_open()
            if timeout is not None:
                by = self._by(timeout)
            elif self._buffers.back is not None:
                by = self._buffers.back.by + GRACE_SECONDS
            else:
                by = self._by(BATCH_SECONDS)
            came = self._threads.locked_wait(lambda: self._buffers.settled, by)
            self._check_open()
            return came

    def collect(self) -> list[Fetched]:
        """End the batch in the background and take what has come, without waiting; the deferred one starts.

        What comes later is late: it is counted, stays with its producer and is not handed out.

        Raises:
            BufferClosedError: the reader is closed.
        """
        with self._lock():
            self._check_open()
            return self._collect()

    def take(self, ref: PayloadRef) -> Fetched | None:
        """What became of a reference in the batch collected last, or in the one being fetched, for which it waits.

        None if it is in neither. Results stay until the next batch is collected.

        Raises:
            BufferClosedError: the reader is closed, or gets closed meanwhile.
        """
        with self._lock():
            self._check_open()
            found = self._buffers.find(ref)
            if not isinstance(found, BatchFetch):
                return found
            batch = found
            by = batch.by + GRACE_SECONDS
            self._threads.locked_wait(lambda: self._buffers.find(ref) is not batch or batch.has(ref), by)
            self._check_open()
            if self._buffers.back is not batch:
                found = self._buffers.find(ref)
                return None if isinstance(found, BatchFetch) else found
            taken, first = self._buffers.take(ref)
            if first and not isinstance(taken.outcome, DrayError):
                self._threads.locked_free([ref])
            return taken

    def discard(self, refs: Iterable[PayloadRef]) -> None:
        """Free, in the background and as far as that is possible, payloads that nobody will ask for any more.

        Raises:
            BufferClosedError: the reader is closed.
        """
        with self._lock():
            self._check_open()
            self._threads.locked_free(refs)

    # --- life -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, float]:
        """Counters, and how many reads are under way and payloads still to be freed."""
        with self._threads.lock:
            now = self._threads.locked_statistics()
        return {**self._counters.snapshot(), **now}

    @property
    def alive(self) -> int:
        """Threads that have not ended: after `close`, those that a read still holds."""
        return self._threads.alive

    def close(self, timeout: float = 5.0) -> None:
        """End: wake everyone who waits, free what was handed out, close the source, join the threads.

        Twice is fine. Threads that do not end within `timeout` seconds are reported, and end with their reads.
        """
        if os.getpid() == self._pid:
            self._threads.close(self._closed_error(), timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside, with the lock held ---------------------------------------------------------------------------

    def _lock(self) -> Any:
        """The lock itself, as a context manager in Python may not give it back where a signal handler raises."""
        # A forked child must not even try the lock: a thread that it does not have may hold it.
        if os.getpid() != self._pid:
            raise self._closed_error()
        return self._threads.lock

    def _check_open(self) -> None:
        if self._threads.closing:
            raise self._closed_error()

    def _closed_error(self) -> BufferClosedError:
        return BufferClosedError("the reader is closed, or belongs to the process this one was forked from")

    def _batch(self, refs: Iterable[PayloadRef], by: float) -> BatchFetch:
        return BatchFetch(next(self._numbers), refs, by, self._rounds)

    def _submit(self, batch: BatchFetch) -> None:
        if not batch.settled:
            self._threads.locked_submit(batch)

    def _collect(self) -> list[Fetched]:
        results, handed_out = self._buffers.collect()
        self._threads.locked_free(handed_out)
        self._advance()
        return results

    def _advance(self) -> None:
        batch = self._buffers.advance(self._clock.now())
        if batch is not None:
            self._submit(batch)

    def _by(self, timeout: float | None) -> float:
        return Deadline.after(timeout, self._clock).at
