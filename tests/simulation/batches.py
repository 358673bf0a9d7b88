"""A simulated consumer that reads in batches, now and in the background, with the real `BatchReader`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dray.errors import BufferClosedError, DrayError
from dray.prefetch.batch import Fetched, Identity, Outcome
from dray.prefetch.reader import GRACE_SECONDS, BatchReader
from dray.protocol import PayloadRef
from simulation.clients import SimulatedConsumer, World
from simulation.scheduler import Actor, Interrupted, Violation
from simulation.threads import SimulatedThreading


class SimulatedBatches(SimulatedConsumer):
    """A `SimulatedConsumer` with a `BatchReader` over its client."""

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
        self._deferred: list[PayloadRef] = []
        self._fetching: set[PayloadRef] = set()  # by calls that wait for their results
        self._collected = 0  # number of the batch collected last
        self._results: dict[tuple[int, Identity], Outcome] = {}
        self._arrived = 0  # payloads in results
        self._unsure = False  # some results were not seen

    def close(self) -> None:
        self.closes()
        pending = len({ref.identity for ref in (*self._reader.fetching, *self._deferred, *self._fetching)})
        self._forget_batches()
        with self.unhurried(15.0):
            self._reader.close(timeout=5.0)
        reads = self._reader.statistics().reads
        if not self._unsure and not self._reader.alive and not 0 <= reads - self._arrived <= pending:
            raise Violation(f"{reads} payloads were accepted, and {self._arrived} were in results of batches")

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
            elif choice < 0.86 and self._reader.fetching:
                self._get_result()
            else:
                self._collect()
        except Interrupted:
            self._unsure = True
            self.unbound()
            self._forget_batches()
        except BufferClosedError:
            self._unsure = True
            self.unbound()
            if not self.closed:
                raise Violation(f"{self.process.name}: a call found the open reader closed") from None

    def _fetch_all(self, seconds: float) -> None:
        refs = self._batch()
        self.scheduler.note(f"fetches {len(refs)} payloads within {seconds} s")
        self._fetching.update(refs)
        with self.bounded(seconds + GRACE_SECONDS):
            results = self._reader.fetch_all(refs, timeout=seconds)
        self._fetching.difference_update(refs)
        self._check(refs, results)
        self.world.plan.count("batch: done")
        for fetched in results:
            self._got_or_not(fetched, seconds)

    def _start(self, seconds: float) -> None:
        refs = self._batch()
        before = self._reader.fetching
        started = self._reader.start(refs, timeout=seconds)
        self.scheduler.note(f"starts {len(refs)} payloads within {seconds} s: {started}")
        if not started:
            self.world.give_back(self.reader, refs)
            return
        results = [self._reader.result(ref) for ref in before]  # this call collected them
        self._check(before, [fetched for fetched in results if fetched is not None])
        for ref in before:
            self.world.ledger.give_up(ref, self.reader)
        self._seconds = seconds

    def _defer(self, seconds: float) -> None:
        refs = self._batch()
        if self._reader.defer(refs, timeout=seconds):
            self._deferred = refs
        else:
            self.world.give_back(self.reader, refs)

    def _get_result(self) -> None:
        ref = self.rng.choice(self._reader.fetching)
        with self.bounded(200.0):
            fetched = self._reader.result(ref)
        if fetched is not None:
            self._of(ref, fetched)
            self._got_or_not(fetched, self._seconds)

    def _collect(self) -> None:
        if self.rng.random() < 0.7:
            with self.bounded(200.0):
                self._reader.wait()
        refs = self._reader.fetching
        results = self._reader.collect()
        self._check(refs, results)
        numbers = {fetched.batch for fetched in results}
        if len(numbers) > 1 or any(number <= self._collected for number in numbers):
            raise Violation(f"results of batches {sorted(numbers)} were handed out as those of a new batch")
        self._collected = max((self._collected, *numbers))
        self.scheduler.note(f"collects {len(results)} payloads")
        for fetched in results:
            self._got_or_not(fetched, self._seconds)
        for ref in refs:
            if self.rng.random() < 0.2 and (found := self._reader.result(ref)) is not None:
                self._of(ref, found)

    # --- inside -----------------------------------------------------------------------------------------------

    def _batch(self) -> list[PayloadRef]:
        refs = self.world.hand_references(self.reader, self.rng.randint(0, 5))
        old = self.world.old()
        if old and self.rng.random() < 0.3:
            refs.append(self.rng.choice(old))
        self.client.asks(refs)
        for ref in refs:
            self._submitted.setdefault(ref, self.scheduler.now())
        return refs

    def _forget_batches(self) -> None:
        """Record that the payloads of the batches in the background may be lost to this consumer."""
        for ref in (*self._reader.fetching, *self._deferred):
            self.world.ledger.give_up(ref, self.reader)

    def _check(self, refs: Sequence[PayloadRef], results: Sequence[Fetched]) -> None:
        if [fetched.ref for fetched in results] != list(refs):
            raise Violation("the results of a batch are not those of its references")
        for ref, fetched in zip(refs, results, strict=True):
            self._of(ref, fetched)
        arrays = {fetched.ref.identity for fetched in results if not isinstance(fetched.outcome, DrayError)}
        self._arrived += len(arrays)

    def _of(self, ref: PayloadRef, fetched: Fetched) -> None:
        if fetched.ref.identity != ref.identity:
            raise Violation("the result of another reference was handed out")
        if self._results.setdefault((fetched.batch, ref.identity), fetched.outcome) is not fetched.outcome:
            raise Violation(f"the result for {ref} changed after it had been handed out")

    def _got_or_not(self, fetched: Fetched, seconds: float) -> None:
        if isinstance(fetched.outcome, DrayError):
            # Groups share their time, and the batch's own is short: only the error is judged.
            self.judge(fetched.ref, fetched.outcome, min(seconds, 1.0), self._submitted[fetched.ref])
        else:
            submitted = self._submitted[fetched.ref]
            self.got_arrays(fetched.ref, fetched.outcome, consume=False, asked_at=submitted)
            self.world.ledger.give_up(fetched.ref, self.reader)
