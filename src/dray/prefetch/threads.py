"""The threads that carry out what the state machines of `dray.prefetch` decide."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

from dray.clock import Clock, Deadline
from dray.counters import Counters
from dray.errors import DrayError
from dray.prefetch.batch import Arrays, BatchFetch, Outcome, Pause, Read, ReadTries
from dray.prefetch.freeing import Free, Freeing
from dray.protocol import PayloadRef
from dray.transport.pipeline import ReadResult

logger = logging.getLogger("dray.prefetch")

FREE_SECONDS = 5.0
LAST_FREE_SECONDS = 1.0


class Source(Protocol):
    """What payloads are read from: layer 1, a `PayloadClient`."""

    def read(self, ref: PayloadRef, *, timeout: float | None, consume: bool) -> Arrays:
        """The payload's arrays; raises a `DrayError` that says whether trying again makes sense."""
        ...

    def read_many(
        self, refs: Iterable[PayloadRef], *, timeout: float | None, consume: bool, return_errors: bool
    ) -> Iterator[ReadResult[Any]]:
        """The same for several, pipelined; yields the error of one that cannot be read. May be left early."""
        ...

    def consume(self, refs: Iterable[PayloadRef], *, timeout: float | None) -> int:
        """Free payloads that were read without consuming them."""
        ...

    def close(self) -> None:
        """End; reads under way fail as soon as they can."""
        ...


class Threading(Protocol):
    """What of the module `threading` is used: a simulation gives its own."""

    @property
    def Lock(self) -> Callable[[], Any]: ...
    @property
    def Condition(self) -> Callable[[Any], Any]: ...
    @property
    def Thread(self) -> Callable[..., Any]: ...


class ReadThreads:
    """Up to `most` threads for any number of batches; started when needed, idle without cost, joined by `close`.

    Methods whose names begin with ``locked_`` are called with `lock` held.

    Args:
        source: what to read from; closed with this object.
        most: how many threads.
        attempts: reads of one reference in one round.
        longest: seconds that one read may take at most.
        counters: where reads are counted.
        over: called, with the lock held, when a batch is over and no read of it under way.
        clock: where time comes from.
        threads: where locks and threads come from.
    """

    def __init__(
        self,
        source: Source,
        most: int,
        attempts: int,
        longest: float,
        counters: Counters,
        over: Callable[[], None],
        clock: Clock,
        threads: Threading,
    ) -> None:
        self.lock = threads.Lock()
        self._work = threads.Condition(self.lock)  # there may be something to do
        self._news = threads.Condition(self.lock)  # something has been done
        self._make_thread = threads.Thread
        self._source = source
        self._most = most
        self._attempts = attempts
        self._longest = longest
        self._counters = counters
        self._over = over
        self._clock = clock
        self._active: list[BatchFetch] = []
        self._freeing = Freeing()
        self._threads: list[Any] = []
        self._crash: BaseException | None = None
        self._ended = False
        self.closing = False

    # --- for callers ------------------------------------------------------------------------------------------

    def read_one(self, ref: PayloadRef, by: float, consume: bool) -> Arrays:
        """Layer 2, in the calling thread."""
        tries = ReadTries(by, self._attempts, self._longest)
        while True:
            seconds = tries.next(self._clock.now())
            try:
                arrays = self._source.read(ref, timeout=_timeout(seconds), consume=consume)
            except DrayError as error:
                if self.closing or not tries.again(error, self._clock.now()):
                    raise
                self._counters.add("reads_again")
            else:
                self._counters.add("reads")
                return arrays

    def locked_submit(self, batch: BatchFetch) -> None:
        """Fetch a batch; it settles by itself at its deadline, or as soon as it can after `BatchFetch.close`."""
        self._active.append(batch)
        self.locked_changed()

    def locked_free(self, refs: Iterable[PayloadRef]) -> None:
        """Tell the producers, in the background, that these payloads are consumed."""
        self._freeing.add(refs)
        self.locked_changed()

    def locked_changed(self) -> None:
        """Make sure that what there is to do gets done, and that who waits looks again."""
        wanted = sum(batch.wanted for batch in self._active) + self._freeing.wanted
        # A thread for everything that may have to wait for a peer, idle ones included: they may be spoken for.
        for number in range(len(self._threads), min(wanted, self._most)):
            thread = self._make_thread(target=self._run, name=f"dray-read-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._work.notify_all()
        self._news.notify_all()

    def locked_wait(self, condition: Callable[[], bool], by: float) -> bool:
        """Wait until `condition`, the time `by`, or `close`; whether it was the condition."""
        while not self.closing and not condition():
            self._raise_crash()
            left = by - self._clock.now()
            if left <= 0:
                return False
            self._news.wait(None if left == math.inf else left)
        return not self.closing

    def locked_statistics(self) -> dict[str, float]:
        """Reads under way, and payloads still to be freed."""
        return {"reading": sum(batch.reading for batch in self._active), "to_free": len(self._freeing)}

    @property
    def alive(self) -> int:
        """Threads that have not ended."""
        return sum(thread.is_alive() for thread in self._threads)

    def close(self, error: DrayError, timeout: float) -> None:
        """Wake everyone who waits, free what is to be freed, close the source, join the threads. Twice is fine."""
        deadline = Deadline.after(timeout, self._clock)
        with self.lock:
            self.closing = True
            for batch in self._active:
                batch.close(error)
            self._freeing.hurry()
            self._work.notify_all()
            self._news.notify_all()
            last_free = deadline.capped_at(LAST_FREE_SECONDS)
            while self._freeing and self._crash is None and not self._ended and not last_free.expired:
                self._news.wait(last_free.remaining)
            self._counters.add("unfreed", 0 if self._ended else len(self._freeing))
            self._ended = True
            self._work.notify_all()
        self._source.close()
        for thread in self._threads:
            thread.join(deadline.remaining)
        if self.alive:
            logger.error("%d reads did not end within %.1f s of being told to", self.alive, timeout)

    # --- the threads ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (task := self._next_task()) is not None:
                if isinstance(task, Free):
                    self._free(task)
                else:
                    self._read(*task)
        except BaseException as crash:
            logger.critical("a thread that reads payloads ended", exc_info=crash)
            with self.lock:
                self._crash = crash
                self._news.notify_all()

    def _next_task(self) -> tuple[BatchFetch, Read] | Free | None:
        """The next thing to do; None when it is time to end."""
        with self.lock:
            while not self._ended:
                now = self._clock.now()
                resume = math.inf
                for batch in self._active:
                    action = batch.next(now)
                    if isinstance(action, Read):
                        return batch, action
                    if isinstance(action, Pause):
                        resume = min(resume, action.until)
                free = self._freeing.next(now)
                if isinstance(free, Free):
                    return free
                if isinstance(free, Pause):
                    resume = min(resume, free.until)
                if self._retire():
                    continue
                self._work.wait(None if resume == math.inf else resume - now)
            return None

    def _retire(self) -> bool:
        """Forget the batches that are over; whether there were any."""
        open_batches = [batch for batch in self._active if batch.reading or not batch.settled]
        if len(open_batches) == len(self._active):
            return False
        self._active = open_batches
        self._over()
        self._news.notify_all()
        return True

    def _read(self, batch: BatchFetch, read: Read) -> None:
        tries = ReadTries(batch.by, self._attempts, self._longest)
        waiting: tuple[PayloadRef, ...] = read.refs
        while waiting and not self.closing:
            try:
                waiting = self._read_group(batch, waiting, tries)
            except DrayError as error:  # the source as a whole refuses
                _forget_frames(error)
                for ref in waiting:
                    if not batch.has(ref):
                        self._came(batch, ref, error)
                waiting = ()
            self._counters.add("reads_again", len(waiting))
        with self.lock:
            batch.ended(read, self._clock.now())
            self.locked_changed()

    def _read_group(
        self, batch: BatchFetch, refs: tuple[PayloadRef, ...], tries: ReadTries
    ) -> tuple[PayloadRef, ...]:
        """Read once; what is to be read again."""
        again = []
        seconds = _timeout(tries.next(self._clock.now()))
        results = self._source.read_many(refs, timeout=seconds, consume=False, return_errors=True)
        try:
            for result in results:
                ref, outcome = result.ref, result.outcome
                if isinstance(outcome, DrayError):
                    _forget_frames(outcome)
                    if tries.again(outcome, self._clock.now()):
                        again.append(ref)
                        continue
                if not self._came(batch, ref, outcome):
                    return ()
        finally:
            if isinstance(results, Generator):
                results.close()  # what it holds and was not taken goes back to its producer
        return tuple(again)

    def _came(self, batch: BatchFetch, ref: PayloadRef, outcome: Outcome) -> bool:
        failed = isinstance(outcome, DrayError)
        with self.lock:
            wanted = batch.wanted
            accepted = batch.came(ref, outcome)
            if batch.wanted > wanted:
                self.locked_changed()
            self._news.notify_all()
        if failed:
            logger.debug("batch %d: %s", batch.number, outcome)
        self._counters.add("failed" if failed else "reads" if accepted else "late")
        return accepted

    def _free(self, free: Free) -> None:
        error = None
        freed = 0
        try:
            freed = self._source.consume(free.refs, timeout=LAST_FREE_SECONDS if self.closing else FREE_SECONDS)
        except DrayError as failure:
            logger.debug("%d payloads could not be freed: %s", len(free.refs), failure)
            error = failure
        with self.lock:
            unfreed = self._freeing.ended(free, error, self._clock.now())
            self._counters.add_all({"freed": freed, "unfreed": unfreed})
            self.locked_changed()

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise self._crash


def _forget_frames(error: BaseException | None) -> None:
    """An error that is kept as an outcome must not keep the connections and buffers of those who raised it."""
    seen: set[int] = set()  # an error may be its own cause
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _timeout(seconds: float) -> float | None:
    return None if seconds == math.inf else seconds
