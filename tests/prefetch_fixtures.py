"""References, errors as layer 1 raises them, and a source with given answers, for tests of batches."""

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dray.errors import DrayError, ProducerLostError, TransportTimeout, Unreachable
from dray.protocol import PayloadRef
from dray.transport.attempts import OtherProducerError
from dray.transport.pipeline import ReadResult

HERE = b"a" * 16
THERE = b"b" * 16


def ref(sequence: int, producer: bytes = HERE) -> PayloadRef:
    return PayloadRef(producer, sequence % 7, sequence, 64, ("tcp:127.0.0.1:1",))


def refs(count: int, producer: bytes = HERE, first: int = 0) -> list[PayloadRef]:
    return [ref(first + index, producer) for index in range(count)]


def arrays(of: PayloadRef) -> dict[str, Any]:
    return {"sequence": np.asarray(of.sequence)}


def lost(cause: Exception) -> ProducerLostError:
    error = ProducerLostError("the producer is gone")
    error.__cause__ = cause
    return error


REFUSED = lost(Unreachable("no process listens", refused=True))
REPLACED = lost(OtherProducerError("another producer listens there"))
TIMEOUT = TransportTimeout("no answer")


class ManualClock:
    def __init__(self, now: float = 1000.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time


class FakeSource:
    """Returns the arrays of each reference or raises given errors. Reads wait for `gate`, frees for `free_gate`.

    `opens_when_closed` opens `gate` on `close`, as a client ends reads that are under way.
    """

    def __init__(self) -> None:
        self.answers: dict[tuple[bytes, int], list[BaseException]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.free_gate = threading.Event()
        self.free_gate.set()
        self.asked: list[int] = []
        self.freed: list[int] = []
        self.free_errors: list[DrayError] = []
        self.closed = 0
        self.opens_when_closed = True

    def fail(self, of: PayloadRef, *errors: BaseException) -> None:
        self.answers[of.identity] = list(errors)

    def read(self, of: PayloadRef, *, timeout: float | None, consume: bool) -> dict[str, Any]:
        self.asked.append(of.sequence)
        assert self.gate.wait(20)
        waiting = self.answers.get(of.identity)
        if waiting:
            raise waiting.pop(0)
        return arrays(of)

    def read_many(
        self, of: Iterable[PayloadRef], *, timeout: float | None, consume: bool, return_errors: bool
    ) -> Iterator[ReadResult[Any]]:
        assert return_errors
        assert not consume
        for each in of:
            try:
                yield ReadResult(each, self.read(each, timeout=timeout, consume=consume))
            except DrayError as error:
                yield ReadResult(each, error)

    def consume(self, of: Iterable[PayloadRef], *, timeout: float | None) -> int:
        assert self.free_gate.wait(20)
        if self.free_errors:
            raise self.free_errors.pop(0)
        freed = [each.sequence for each in of]
        self.freed += freed
        return len(freed)

    def close(self) -> None:
        self.closed += 1
        if self.opens_when_closed:
            self.gate.set()
