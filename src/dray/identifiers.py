"""The numbers that name a payload, as the ring and the protocol both use them."""

from __future__ import annotations

from typing import Final, TypeAlias

PRODUCER_ID_BYTES: Final = 16
"""Size of a producer id: random bytes that name one ring."""

MAX_READERS: Final = 64
"""Readers of one ring; a bit mask of 8 bytes records which of them have consumed a payload."""

Wanted: TypeAlias = tuple[int, int, int]
"""(slot, sequence number, reader id) of a payload that a reader asks for."""
