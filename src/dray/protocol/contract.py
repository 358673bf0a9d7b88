"""What a server's session needs of a ring, and what it has a stream send."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class LeaseLike(Protocol):
    """What the session needs of a lease: `buffer` is the payload, `offset` its place in the segment."""

    @property
    def slot(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def reader(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def buffer(self) -> memoryview: ...
    @property
    def offset(self) -> int: ...
    @property
    def committed_at(self) -> float: ...


class LeaseSource(Protocol):
    """What the session needs of a ring; see `dray.ring.SharedRingBuffer`."""

    def read_raw(self, slot: int, sequence: int, reader: int = 0) -> LeaseLike: ...
    def copy_many(self, wanted: Sequence[Wanted], most: int) -> Sequence[Any]: ...
    def consume_many(self, wanted: Iterable[Wanted]) -> int: ...
    def mark_consumed(self, lease: Any) -> bool: ...
    def release_reading(self, lease: Any) -> bool: ...
    def consume(self, slot: int, sequence: int, reader: int = 0) -> bool: ...
    def checksum(self, slot: int, sequence: int, compute: Callable[[memoryview | bytes], int]) -> int: ...


@dataclass(frozen=True, slots=True)
class Payload:
    """A payload to be sent as one message; `tag` is where the client expects it."""

    view: memoryview
    tag: int


Outgoing = bytes | Payload
Wanted = tuple[int, int, int]
"""(slot, sequence, reader)."""
