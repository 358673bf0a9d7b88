"""What a process of the soak did, in records that survive its death.

Each process appends to a file of its own, one `write` of 128 bytes per record, which falls into one page of the
page cache: a SIGKILL leaves whole records, up to the last act. What cannot be taken back is recorded before and
after it is done.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Self

from dray.errors import (
    ConnectionClosed,
    ConnectionReset,
    DrayError,
    MessageTruncated,
    ProducerLostError,
    ServerBusy,
    StaleSlotError,
    TransportError,
    TransportTimeout,
    Unreachable,
)

RECORD_BYTES = 128
NO_PRODUCER = bytes(16)


class Kind(IntEnum):
    """What happened. A payload is named by its producer's id and its sequence number."""

    BEGAN = 0
    """A process is ready; a producer names its ring, and its slots and `on_full` in `nbytes` and `reason`."""
    WRITING = 1
    """A producer is about to commit a payload."""
    COMMITTED = 2
    """It has; with the ring as it is now (see SNAPSHOT)."""
    SNAPSHOT = 3
    """The ring: a bit for each slot whose payload is live, payloads consumed, payloads dropped."""
    PUBLISHING = 4
    """A producer is about to put a reference into the stream."""
    PUBLISHED = 5
    """The reference is there."""
    RECLAIMED = 6
    """A producer has freed a payload that the stream no longer lists: no consumer will ask for it."""
    LEFT = 7
    """A payload is still there as its producer closes the ring."""
    RECEIVED = 8
    """A consumer was given a reference; `nbytes` is the number of its deliveries so far."""
    TAKING = 9
    """A consumer is about to read in a way that consumes."""
    DELIVERED = 10
    """A payload was read and its bytes are right."""
    WRONG = 11
    """A payload was read and its bytes are not right; `reason` is a `Wrong`."""
    FAILED = 12
    """A payload could not be read, and was not consumed; `reason` is a `Failure`."""
    GIVING_UP = 13
    """A consumer is about to give a payload up; `reason` is a `Given`."""
    ENDED_IN_STREAM = 14
    """A delivery was committed; `reason` is an `Outcome`."""
    WAIT = 15
    """A call that has a deadline has returned; `reason` is an `Operation`."""
    FULL = 16
    """A claim was refused: the ring is full."""
    ENDED = 17
    """A process is about to end as asked."""
    NOT_TAKEN = 18
    """What was about to be read was not, and can still be."""


class Wrong(IntEnum):
    """In what way bytes are not right."""

    SIZE = 0
    IDENTITY = 1
    CHECKSUM = 2
    BYTES = 3


class Given(IntEnum):
    """Why a consumer gives a payload up."""

    STALE = 0
    LOST = 1
    UNREACHABLE = 2
    DEAD_LETTER = 3


class Outcome(IntEnum):
    """The result of a commit for a delivery."""

    ENDED = 0
    UNKNOWN = 1
    REFUSED = 2


class Operation(IntEnum):
    """Calls that have a deadline."""

    CLAIM = 0
    ATTACH = 1
    PUBLISH = 2
    LOOK_UP = 3
    RECEIVE = 4
    COMMIT = 5
    DISCARD = 6
    CLAIM_FROM = 7
    READ = 8
    READ_MANY = 9
    LEASE = 10
    CONSUME = 11
    BATCH = 12


class Failure(IntEnum):
    """Why a payload could not be read."""

    OTHER = 0
    TIMEOUT = 1
    RESET = 2
    CLOSED = 3
    TRUNCATED = 4
    UNREACHABLE = 5
    BUSY = 6
    LOST = 7
    STALE = 8

    @classmethod
    def of(cls, error: DrayError) -> Self:
        """The kind of `error`; raises it if no fault of the soak explains it."""
        for kind, failure in _FAILURES.items():
            if isinstance(error, kind):
                return cls[failure]
        if isinstance(error, TransportError):
            return cls.OTHER
        raise error


_FAILURES: dict[type[DrayError], str] = {
    TransportTimeout: "TIMEOUT",
    ConnectionReset: "RESET",
    ConnectionClosed: "CLOSED",
    MessageTruncated: "TRUNCATED",
    Unreachable: "UNREACHABLE",
    ServerBusy: "BUSY",
    ProducerLostError: "LOST",
    StaleSlotError: "STALE",
}


class Record(NamedTuple):
    """One act. Times are nanoseconds on the machine's monotonic clock."""

    kind: int
    reason: int
    slot: int
    time: int
    producer: bytes
    sequence: int
    nbytes: int
    live: int
    consumed: int
    dropped: int
    elapsed: int
    limit: int
    delayed: int

    @property
    def identity(self) -> tuple[bytes, int]:
        return self.producer, self.sequence


_RECORD = struct.Struct("<BBxxIQ16sQQQQQQQQ32x")
assert _RECORD.size == RECORD_BYTES


class Ledger:
    """The file that one process appends to. Thread-safe; a context manager."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(
        self,
        kind: Kind,
        producer: bytes = NO_PRODUCER,
        sequence: int = 0,
        *,
        reason: int = 0,
        slot: int = 0,
        nbytes: int = 0,
        live: int = 0,
        consumed: int = 0,
        dropped: int = 0,
        elapsed: int = 0,
        limit: int = 0,
        delayed: int = 0,
    ) -> None:
        """Append a record."""
        packed = _RECORD.pack(
            kind, reason, slot, time.monotonic_ns(), producer, sequence, nbytes, live, consumed, dropped,
            elapsed, limit, delayed,
        )  # fmt: skip
        if os.write(self._descriptor, packed) != RECORD_BYTES:
            raise OSError("a record was written in part")

    @contextlib.contextmanager
    def waiting(self, operation: Operation, seconds: float) -> Iterator[None]:
        """Record how long the block took, which must end within `seconds`."""
        began, delayed = time.monotonic_ns(), _run_delay()
        try:
            yield
        finally:
            self.write(
                Kind.WAIT,
                reason=operation,
                elapsed=time.monotonic_ns() - began,
                limit=int(seconds * 1e9),
                delayed=_run_delay() - delayed,
            )

    def close(self) -> None:
        """Twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_ledger(path: Path) -> list[Record]:
    """The records of a file, oldest first."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) % RECORD_BYTES:
        raise ValueError(f"{path} ends within a record")
    return [Record._make(fields) for fields in _RECORD.iter_unpack(content)]


def count_kinds(path: Path, offset: int) -> tuple[dict[Kind, int], int]:
    """The number of records of each kind after `offset` in a growing file, and the offset for the next call."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(offset)
        content = file.read()
        whole = len(content) - len(content) % RECORD_BYTES
        kinds = content[:whole:RECORD_BYTES]
        return {Kind(kind): kinds.count(kind) for kind in set(kinds)}, offset + whole
    return {}, offset


def _run_delay() -> int:
    """Nanoseconds for which this thread was ready to run and had no processor, since it began."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:  # noqa: PTH123  (twice for every call that waits)
            return int(file.read().split()[1])
    except (FileNotFoundError, IndexError):
        return 0
