"""A simulated consumer that reads in batches, now and in the background, with the production `BatchReader`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dray.errors import BufferClosedError, DrayError
from dray.prefetch.batch import Fetched
from dray.prefetch.reader import GRACE_SECONDS, BatchReader
from dray.protocol import PayloadRef
from simulation.clients import SimulatedConsumer, World
from simulation.scheduler import Actor, Interrupted, Violation
from simulation.threads import SimulatedThreading

_ENDED = "the reader is closed"


class SimulatedBatches(SimulatedConsumer):
    """Like its base, and with a `BatchReader` over the same client."""

    def __init__(self, world: World, name: str, reader: int, welcome: bool, **options: Any) -> None:
        super().__init__(world, name, reader, welcome, **options)
        self._reader = BatchReader(
            self.client,
            threads=self.rng.randint(1, 3),
            attempts=self.rng.choice((1, 2)),
            rounds=self.rng.choice((1, 2, 3)),
            read_timeout=self.rng.choice((None, None, 1.0)),
            clock=self.scheduler.clock,
            threading=SimulatedThreading(self.scheduler, self.process),
        )
        self._seconds = 0.0
        self._submitted: dict[PayloadRef, float] = {}
        self._prefetcher: Actor | None = None
        self._background: list[tuple[list[PayloadRef], bool]] = []  # batches in order, and whether it has started
        self._collected: list[tuple[list[Fetched], list[Any]]] = []
        self._number = 0

    def close(self) -> None:
        self.closes()
        self._forget_batches()
        with self.unhurried(15.0):
            self._reader.close(timeout=5.0)
        self.check_results()

    def check_results(self) -> None:
        """The results of a batch stay as they were when the batch ended."""
        for results, outcomes in self._collected:
            if any(fetched.outcome is not outcome for fetched, outcome in zip(results, outcomes, strict=True)):
                raise Violation("the results of a batch changed after it had ended")

    # --- what programs do -------------------------------------------------------------------------------------

    def _something(self) -> None:
        choice = self.rng.random()
        if choice < 0.35:
            super()._something()
            return
        seconds = self.rng.choice((0.02, 0.2, 3.0, 30.0))
        # One thread prefetches, as in a trainer; any may fetch batches of its own.
        actor = self.scheduler.actor
        alone = self._prefetcher is None or self._prefetcher is actor
        try:
            if choice < 0.5 or not alone:
                self._fetch_all(seconds)
                return
            self._prefetcher = actor
            if choice < 0.7:
                self._start(seconds)
            elif choice < 0.78:
                self._defer(seconds)
            elif choice < 0.86 and self._fetching():
                self._take()
            else:
                self._collect()
        except Interrupted:
            self.unbound()
            self._forget_batches()
        except BufferClosedError:
            self.unbound()
            if not self.closed:
                raise Violation(f"{self.process.name}: closed, although no call has closed it") from None

    def _fetch_all(self, seconds: float) -> None:
        refs = self._batch()
        self.scheduler.note(f"fetches {len(refs)} payloads within {seconds} s")
        with self.bounded(seconds + GRACE_SECONDS):
            results = self._reader.fetch_all(refs, timeout=seconds)
        self._check(refs, results)
        self.world.plan.count("batch: done")
        for fetched in results:
            self._got_or_not(fetched, seconds)

    def _start(self, seconds: float) -> None:
        refs = self._batch()
        before = [ref for each, _ in self._background for ref in each]
        self._background.append((refs, False))  # after an interrupt it may have started
        started = self._reader.start(refs, timeout=seconds)
        self.scheduler.note(f"starts {len(refs)} payloads within {seconds} s: {started}")
        if not started:
            self._background.pop()
            self.world.give_back(self.reader, refs)
            return
        for ref in before:  # they are collected by this, and so handed out
            self.world.ledger.give_up(ref, self.reader)
        self._background = [(refs, True)]
        self._seconds = seconds

    def _defer(self, seconds: float) -> None:
        refs = self._batch()
        self._background.append((refs, False))
        if not self._reader.defer(refs, timeout=seconds):
            self._background.pop()
            self.world.give_back(self.reader, refs)

    def _take(self) -> None:
        ref = self.rng.choice(self._fetching())
        with self.bounded(200.0):
            fetched = self._reader.take(ref)
        if fetched is not None:
            self._of(ref, fetched)
            self._got_or_not(fetched, self._seconds)

    def _collect(self) -> None:
        if self.rng.random() < 0.7:
            with self.bounded(200.0):
                self._reader.wait()
        results = self._reader.collect()
        self._was_due([fetched.ref for fetched in results])
        numbers = {fetched.batch for fetched in results}
        if len(numbers) > 1 or (numbers and min(numbers) <= self._number):
            raise Violation(f"results of the batches {numbers} were handed out after batch {self._number}")
        self._number = max(numbers, default=self._number)
        self._collected.append((results, [fetched.outcome for fetched in results]))
        self.scheduler.note(f"collects {len(results)} payloads")
        for fetched in results:
            self._got_or_not(fetched, self._seconds)
        for fetched in results:
            if self.rng.random() < 0.2 and (found := self._reader.take(fetched.ref)) is not None:
                self._of(fetched.ref, found)

    # --- inside -----------------------------------------------------------------------------------------------

    def _batch(self) -> list[PayloadRef]:
        refs = self.world.take(self.reader, self.rng.randint(0, 5))
        old = self.world.old()
        if old and self.rng.random() < 0.3:
            refs.append(self.rng.choice(old))
        self.client.asks(refs)
        for ref in refs:
            self._submitted.setdefault(ref, self.scheduler.now())
        return refs

    def _fetching(self) -> list[PayloadRef]:
        """The references of the batch in the background."""
        return self._background[0][0] if self._background else []

    def _was_due(self, refs: list[PayloadRef]) -> None:
        """Check that results are those of the oldest batch, or that there are none because it has not started."""
        for index, (expected, started) in enumerate(self._background):
            if refs == expected:
                del self._background[: index + 1]
                return
            if started:
                raise Violation("the results of a batch are not those of its references")
        if refs:
            raise Violation("results were collected of a batch that was never started")

    def _forget_batches(self) -> None:
        """What the batches in the background bring, and how far they are, is unknown from now on."""
        for refs, _ in self._background:
            for ref in refs:
                self.world.ledger.give_up(ref, self.reader)
        self._background = [(refs, False) for refs, _ in self._background]

    def _check(self, refs: Sequence[PayloadRef], results: Sequence[Fetched]) -> None:
        if [fetched.ref for fetched in results] != list(refs):
            raise Violation("the results of a batch are not those of its references")

    def _of(self, ref: PayloadRef, fetched: Fetched) -> None:
        if fetched.ref.identity != ref.identity:
            raise Violation("the result of another reference was handed out")

    def _got_or_not(self, fetched: Fetched, seconds: float) -> None:
        if isinstance(fetched.outcome, DrayError):
            # Groups share their time, and the batch's own is short: only the kind of error is checked.
            self.judge(fetched.ref, fetched.outcome, min(seconds, 1.0), self._submitted[fetched.ref])
        else:
            self.got_arrays(fetched.ref, fetched.outcome, consume=False)
            self.world.ledger.give_up(fetched.ref, self.reader)
