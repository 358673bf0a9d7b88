"""The ways in which consumers of the soak read: each takes references and reports the result for each payload."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from soak.ledger import Failure, Kind, Ledger, Operation, Wrong
from soak.payloads import check_arrays, check_raw
from soak.producer import RAW

from dray.clock import MONOTONIC
from dray.errors import DrayError, TransportError, TransportTimeout
from dray.jobs.queue import Delivery
from dray.payload import Arrays
from dray.prefetch import BatchReader
from dray.protocol import PayloadRef
from dray.transport import PayloadClient

READ_SECONDS = 3.0
BATCH_SECONDS = 5.0
CONSUME_SECONDS = 2.0


@dataclass(slots=True)
class PendingDelivery:
    """A delivery that is neither committed nor given up."""

    delivery: Delivery
    ref: PayloadRef
    since: float = field(default_factory=MONOTONIC.now)
    again: float = 0.0

    @property
    def raw(self) -> bool:
        return self.delivery.entry.work_item == RAW


Read = tuple[PendingDelivery, DrayError | None]
"""None: the payload was delivered."""


class Reader(Protocol):
    """One way of reading."""

    def read(self, batch: list[PendingDelivery]) -> Iterable[Read]:
        """Read each payload, check it and record that; or report why it could not be read."""
        ...

    def committed(self, batch: list[PendingDelivery]) -> None:
        """The stream knows that these are done."""
        ...

    def read_again(self, held: PendingDelivery) -> None:
        """Redeem an old reference: it must be stale, lost, or give the payload that it named."""
        ...

    def close(self) -> None: ...


class _Way:
    """What the ways of reading share."""

    def __init__(self, client: PayloadClient, ledger: Ledger, rng: random.Random) -> None:
        self._client = client
        self._ledger = ledger
        self._rng = rng

    def committed(self, batch: list[PendingDelivery]) -> None:
        return

    def read_again(self, held: PendingDelivery) -> None:
        self._read_beside(held, consume=False)

    def close(self) -> None:
        self._client.close()

    def _read_beside(self, held: PendingDelivery, *, consume: bool) -> None:
        """Read a payload beside its delivery: only what is wrong is recorded."""
        try:
            found = self._plain_read(held, consume)
        except DrayError as error:
            Failure.of(error)
            return
        wrong = (check_raw if held.raw else check_arrays)(held.ref, found)
        if wrong is not None:
            self._record(Kind.WRONG, held, wrong)

    def _plain_read(self, held: PendingDelivery, consume: bool) -> Any:
        read = self._client.read_bytes if held.raw else self._client.read
        with self._ledger.waiting(Operation.READ, READ_SECONDS):
            return read(held.ref, timeout=READ_SECONDS, consume=consume)

    def _checked(self, held: PendingDelivery, wrong: Wrong | None) -> Read:
        if wrong is None:
            self._record(Kind.DELIVERED, held)
        else:
            self._record(Kind.WRONG, held, wrong)
        return held, None

    def _failed(self, held: PendingDelivery, error: DrayError) -> Read:
        self._record(Kind.FAILED, held, Failure.of(error))
        return held, error

    def _record(self, kind: Kind, held: PendingDelivery, reason: int = 0) -> None:
        self._ledger.write(kind, *held.ref.identity, reason=reason, slot=held.ref.slot, nbytes=held.ref.nbytes)

    def _read_one(self, held: PendingDelivery, consume: bool) -> Read:
        if consume:
            self._record(Kind.TAKING, held)
        try:
            found = self._plain_read(held, consume)
        except DrayError as error:
            return self._failed(held, error)
        return self._checked(held, (check_raw if held.raw else check_arrays)(held.ref, found))


class Step(_Way):
    """Reads without consuming, pipelined; consumes after the commit, as the policy does after a training step."""

    def read(self, batch: list[PendingDelivery]) -> Iterable[Read]:
        images = {held.ref.identity: held for held in batch if not held.raw}
        if images:
            refs = [held.ref for held in images.values()]
            with self._ledger.waiting(Operation.READ_MANY, BATCH_SECONDS):
                results = list(
                    self._client.read_many(refs, timeout=BATCH_SECONDS, consume=False, return_errors=True)
                )
            for result in results:
                held = images.pop(result.ref.identity)
                if result.error is not None:
                    yield self._failed(held, result.error)
                else:
                    yield self._checked(held, check_arrays(result.ref, result.payload))
            assert not images, "references without a result"
        for held in batch:
            if held.raw:
                yield self._read_one(held, consume=False)

    def committed(self, batch: list[PendingDelivery]) -> None:
        by_producer: dict[bytes, list[PayloadRef]] = {}
        for held in batch:
            by_producer.setdefault(held.ref.producer, []).append(held.ref)
        for refs in by_producer.values():
            free(self._client, self._ledger, refs)


class InPlace(_Way):
    """Works in the slot on the shm lane. Ends some leases without consuming, and comes back.

    Holds other leases while another read consumes the payload: its bytes must not change.
    """

    def __init__(self, client: PayloadClient, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(client, ledger, rng)
        self._pause = threading.Event()

    def read(self, batch: list[PendingDelivery]) -> Iterable[Read]:
        for held in batch:
            yield self._read_one(held, consume=True) if held.raw else self._lease(held)

    def _lease(self, held: PendingDelivery) -> Read:
        self._record(Kind.TAKING, held)
        try:
            with self._ledger.waiting(Operation.LEASE, READ_SECONDS):
                lease = self._client.lease(held.ref, timeout=READ_SECONDS)
            with lease as arrays:
                wrong = check_arrays(held.ref, arrays)
                course = self._rng.random()
                if course < 0.1:
                    raise _Released
                if course < 0.3:
                    self._read_beside(held, consume=True)
                    self._pause.wait(self._rng.uniform(0.0, 0.2))
                    wrong = wrong or check_arrays(held.ref, arrays)
                return self._checked(held, wrong)
        except _Released:
            return self._failed(held, TransportError("released on purpose"))
        except DrayError as error:
            return self._failed(held, error)


class _Released(Exception):
    """Ends a lease before its payload is used."""


class HandedOver(_Way):
    """Hands references on, as text, to threads that read with consuming, over one client."""

    def __init__(self, client: PayloadClient, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(client, ledger, rng)
        self._threads = ThreadPoolExecutor(3, "soak-reader")

    def read(self, batch: list[PendingDelivery]) -> Iterable[Read]:
        return list(self._threads.map(self._read_text, batch, [held.ref.to_json() for held in batch]))

    def close(self) -> None:
        super().close()
        self._threads.shutdown()

    def _read_text(self, held: PendingDelivery, text: str) -> Read:
        assert PayloadRef.from_json(text) == held.ref
        return self._read_one(held, consume=True)


class Prefetch(_Way):
    """Fetches the second half of a batch while it checks the first; payloads are freed as they are collected.

    A batch whose reads hang may come later than it is waited for: until then its payloads count as not read.
    """

    def __init__(self, client: PayloadClient, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(client, ledger, rng)
        self._batches = BatchReader(client, threads=4, read_timeout=READ_SECONDS)
        self._begun: dict[tuple[bytes, int], PendingDelivery] = {}  # in batches that are not collected

    def read(self, batch: list[PendingDelivery]) -> Iterable[Read]:
        came = {held.ref.identity for held in batch if held.raw}
        for held in batch:
            if held.raw:
                yield self._read_one(held, consume=True)
        fresh = [held for held in batch if not held.raw and held.ref.identity not in self._begun]
        for outcomes in (self._collect(), self._fetch(fresh), self._collect(), self._collect()):
            for held, error in outcomes:
                came.add(held.ref.identity)
                yield held, error
        for held in batch:
            if held.ref.identity not in came:
                yield self._failed(held, TransportTimeout("its batch has not come yet"))

    def close(self) -> None:
        self._batches.close()

    def _fetch(self, fresh: list[PendingDelivery]) -> Iterator[Read]:
        """Begin to fetch two batches, one after the other; or fetch at once while an earlier one hangs."""
        if not fresh:
            return
        middle = len(fresh) // 2
        halves = [fresh[:middle], fresh[middle:]]
        refs = [[held.ref for held in half] for half in halves]
        if not self._begun and self._batches.start(refs[0], timeout=BATCH_SECONDS):
            self._begun |= {held.ref.identity: held for held in halves[0]}
            if self._batches.defer(refs[1], timeout=BATCH_SECONDS):
                self._begun |= {held.ref.identity: held for held in halves[1]}
                return
            fresh = halves[1]
        for held in fresh:
            self._record(Kind.TAKING, held)
        with self._ledger.waiting(Operation.BATCH, BATCH_SECONDS):
            results = self._batches.fetch_all([held.ref for held in fresh], timeout=BATCH_SECONDS)
        for held, fetched in zip(fresh, results, strict=True):
            yield self._outcome(held, fetched.outcome)

    def _collect(self) -> Iterator[Read]:
        """What has come of the oldest batch that was begun."""
        if not self._begun:
            return
        with self._ledger.waiting(Operation.BATCH, BATCH_SECONDS):
            self._batches.wait(BATCH_SECONDS)
        for held in self._begun.values():
            self._record(Kind.TAKING, held)
        results = {fetched.ref.identity: fetched.outcome for fetched in self._batches.collect()}
        for identity, held in list(self._begun.items()):
            if identity in results:
                del self._begun[identity]
                yield self._outcome(held, results[identity])
            else:
                self._record(Kind.NOT_TAKEN, held)

    def _outcome(self, held: PendingDelivery, outcome: Arrays | DrayError) -> Read:
        if isinstance(outcome, DrayError):
            return self._failed(held, outcome)
        return self._checked(held, check_arrays(held.ref, outcome))


ROLES: dict[str, Callable[[PayloadClient, Ledger, random.Random], Reader]] = {
    "step": Step,
    "in_place": InPlace,
    "handed_over": HandedOver,
    "prefetch": Prefetch,
}


def free(client: PayloadClient, ledger: Ledger, refs: list[PayloadRef]) -> None:
    """Free payloads of one producer, if it answers in time; otherwise the producer reclaims them."""
    with ledger.waiting(Operation.CONSUME, CONSUME_SECONDS):
        try:
            client.consume(refs, timeout=CONSUME_SECONDS)
        except DrayError as error:
            Failure.of(error)
