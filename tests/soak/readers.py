"""The ways in which consumers of the soak read: each takes references and says what became of each payload."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from soak.ledger import Failure, Kind, Ledger, Operation, Wrong
from soak.payloads import check_arrays, check_raw
from soak.producer import RAW

from dray.clock import MONOTONIC
from dray.control import Delivery
from dray.errors import DrayError, TransportError, TransportTimeout
from dray.prefetch import BatchReader
from dray.transport import PayloadClient
from dray.wire import PayloadRef

READ_SECONDS = 3.0
BATCH_SECONDS = 5.0
CONSUME_SECONDS = 2.0


@dataclass(slots=True)
class Held:
    """A delivery that is neither committed nor given up."""

    delivery: Delivery
    ref: PayloadRef
    since: float = field(default_factory=MONOTONIC.now)
    again: float = 0.0

    @property
    def raw(self) -> bool:
        return self.delivery.entry.prompt == RAW


Read = tuple[Held, DrayError | None]
"""None: the payload was delivered."""


class Reader(Protocol):
    """One way of reading."""

    def read(self, batch: list[Held]) -> Iterable[Read]:
        """Read each payload, check it and record that; or say why it could not be read."""
        ...

    def committed(self, batch: list[Held]) -> None:
        """The stream knows that these are done."""
        ...

    def close(self) -> None: ...


class _Way:
    """What the ways of reading share."""

    def __init__(self, client: PayloadClient, ledger: Ledger, rng: random.Random) -> None:
        self._client = client
        self._ledger = ledger
        self._rng = rng

    def committed(self, batch: list[Held]) -> None:
        return

    def close(self) -> None:
        self._client.close()

    def _checked(self, held: Held, wrong: Wrong | None) -> Read:
        if wrong is None:
            self._record(Kind.DELIVERED, held)
        else:
            self._record(Kind.WRONG, held, wrong)
        return held, None

    def _failed(self, held: Held, error: DrayError) -> Read:
        self._record(Kind.FAILED, held, Failure.of(error))
        return held, error

    def _record(self, kind: Kind, held: Held, reason: int = 0) -> None:
        self._ledger.write(kind, *held.ref.identity, reason=reason, slot=held.ref.slot, nbytes=held.ref.nbytes)

    def _read_one(self, held: Held, consume: bool) -> Read:
        if consume:
            self._record(Kind.TAKING, held)
        found: Any
        try:
            with self._ledger.waiting(Operation.READ, READ_SECONDS):
                if held.raw:
                    found = self._client.read_bytes(held.ref, timeout=READ_SECONDS, consume=consume)
                else:
                    found = self._client.read(held.ref, timeout=READ_SECONDS, consume=consume)
        except DrayError as error:
            return self._failed(held, error)
        return self._checked(held, (check_raw if held.raw else check_arrays)(held.ref, found))


class Step(_Way):
    """Reads without consuming, pipelined; consumes after the commit, as the policy does after a training step."""

    def read(self, batch: list[Held]) -> Iterable[Read]:
        images = {held.ref.identity: held for held in batch if not held.raw}
        if images:
            refs = [held.ref for held in images.values()]
            with self._ledger.waiting(Operation.READ_MANY, BATCH_SECONDS):
                results = list(
                    self._client.read_many(refs, timeout=BATCH_SECONDS, consume=False, return_errors=True)
                )
            for ref, found in results:
                held = images.pop(ref.identity)
                if isinstance(found, DrayError):
                    yield self._failed(held, found)
                else:
                    yield self._checked(held, check_arrays(ref, found))
            assert not images, "references without a result"
        for held in batch:
            if held.raw:
                yield self._read_one(held, consume=False)

    def committed(self, batch: list[Held]) -> None:
        by_producer: dict[bytes, list[PayloadRef]] = {}
        for held in batch:
            by_producer.setdefault(held.ref.producer, []).append(held.ref)
        for refs in by_producer.values():
            free(self._client, self._ledger, refs)


class InPlace(_Way):
    """Works in the slot on the shm lane, for a while; ends some leases without consuming, and comes back."""

    def read(self, batch: list[Held]) -> Iterable[Read]:
        for held in batch:
            yield self._read_one(held, consume=True) if held.raw else self._lease(held)

    def _lease(self, held: Held) -> Read:
        self._record(Kind.TAKING, held)
        try:
            with self._ledger.waiting(Operation.LEASE, READ_SECONDS):
                lease = self._client.lease(held.ref, timeout=READ_SECONDS)
            with lease as arrays:
                wrong = check_arrays(held.ref, arrays)
                if self._rng.random() < 0.1:
                    raise _Returned
                return self._checked(held, wrong)
        except _Returned:
            return self._failed(held, TransportError("returned on purpose"))
        except DrayError as error:
            return self._failed(held, error)


class _Returned(Exception):
    """Ends a lease before its payload is used."""


class HandedOver(_Way):
    """Hands references on, as text, to threads that read with consuming, over one client."""

    def __init__(self, client: PayloadClient, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(client, ledger, rng)
        self._threads = ThreadPoolExecutor(3, "soak-reader")

    def read(self, batch: list[Held]) -> Iterable[Read]:
        return list(self._threads.map(self._take, batch, [held.ref.to_json() for held in batch]))

    def close(self) -> None:
        super().close()
        self._threads.shutdown()

    def _take(self, held: Held, text: str) -> Read:
        assert PayloadRef.from_json(text) == held.ref
        return self._read_one(held, consume=True)


class Prefetch(_Way):
    """Fetches the second half of a batch while it checks the first; payloads are freed as they are collected."""

    def __init__(self, client: PayloadClient, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(client, ledger, rng)
        self._batches = BatchReader(client, threads=4, read_timeout=READ_SECONDS)

    def read(self, batch: list[Held]) -> Iterable[Read]:
        images = [held for held in batch if not held.raw]
        middle = len(images) // 2
        halves = [half for half in (images[:middle], images[middle:]) if half]
        begun = [self._begin(half) for half in halves]
        for half, started in zip(halves, begun, strict=True):
            yield from self._collect(half, started)
        for held in batch:
            if held.raw:
                yield self._read_one(held, consume=True)

    def close(self) -> None:
        self._batches.close()

    def _begin(self, half: list[Held]) -> bool:
        refs = [held.ref for held in half]
        return self._batches.start(refs, timeout=BATCH_SECONDS) or self._batches.defer(refs, timeout=BATCH_SECONDS)

    def _collect(self, half: list[Held], started: bool) -> Iterator[Read]:
        for held in half:
            self._record(Kind.TAKING, held)
        if started:
            with self._ledger.waiting(Operation.BATCH, BATCH_SECONDS):
                self._batches.wait()
            results = {fetched.ref.identity: fetched.outcome for fetched in self._batches.collect()}
        else:
            refs = [held.ref for held in half]
            with self._ledger.waiting(Operation.BATCH, BATCH_SECONDS):
                fetched_now = self._batches.fetch_all(refs, timeout=BATCH_SECONDS)
            results = {fetched.ref.identity: fetched.outcome for fetched in fetched_now}
        for held in half:
            outcome = results.get(held.ref.identity, TransportTimeout("another batch was collected"))
            if isinstance(outcome, DrayError):
                yield self._failed(held, outcome)
            else:
                yield self._checked(held, check_arrays(held.ref, outcome))


ROLES: dict[str, Callable[[PayloadClient, Ledger, random.Random], Reader]] = {
    "step": Step,
    "in_place": InPlace,
    "handed_over": HandedOver,
    "prefetch": Prefetch,
}


def free(client: PayloadClient, ledger: Ledger, refs: list[PayloadRef]) -> None:
    """Free payloads of one producer, if that can be told in time; otherwise the producer reclaims them."""
    with ledger.waiting(Operation.CONSUME, CONSUME_SECONDS):
        try:
            client.consume(refs, timeout=CONSUME_SECONDS)
        except DrayError as error:
            Failure.of(error)
