"""Names and numbers of payloads, lanes and agents that several layers share. No heavy import is needed."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

PRODUCER_ID_BYTES: Final = 16
"""Size of a producer id: random bytes that name one ring."""

MAX_READERS: Final = 64
"""Readers of one ring; a bit mask of 8 bytes records which of them have consumed a payload."""

MAX_SLOT_BYTES: Final = 1 << 42
"""Size limit of a slot."""

LANE_NAMES: Final = ("shm", "ucx", "tcp")
"""The lanes of `dray.transport.lanes.LANES`, best first."""

DEFAULT_AGENT_MEMORY: Final = 4 << 30
"""Bytes of memory that the rings which an agent has inherited may keep together."""

DEFAULT_AGENT_KEEP: Final = 600.0
"""Seconds after the death of a ring's owner when its agent drops what is left."""

Wanted: TypeAlias = tuple[int, int, int]
"""(slot, sequence number, reader id) of a payload that a reader asks for."""


class PayloadId(NamedTuple):
    """Names one payload of a stream, for as long as it exists. It can be pickled, compared and used as a key.

    Attributes:
        producer: the producer's id.
        sequence: the payload's sequence number.
        slot, nbytes: where it lies in the producer's ring, and its size.
    """

    producer: bytes
    sequence: int
    slot: int
    nbytes: int

    @property
    def key(self) -> str:
        """``producer:sequence``, as Redis and files have it."""
        return f"{self.producer.hex()}:{self.sequence}"

    def __str__(self) -> str:
        return f"{self.producer.hex()[:8]}/{self.sequence}"
