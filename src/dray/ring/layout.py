"""The byte layout of a segment. No other module contains an offset.

All integers are little-endian. Every offset is derived from the one before it::

    segment                                          slot header
    0   ┌─────────────────────────────────┐          0  ┌─────────────────────────────────┐
        │ magic "DRAYRING"             8s │             │ state (SlotState)            u8 │
    8   ├─────────────────────────────────┤          1  ├─────────────────────────────────┤
        │ version                     u32 │             │ flags (1: has checksum)      u8 │
    12  ├─────────────────────────────────┤          2  ├─────────────────────────────────┤
        │ bytes of one slot header    u32 │             │ unused                       6s │
    16  ├─────────────────────────────────┤          8  ├─────────────────────────────────┤
        │ slots                       u64 │             │ sequence                    u64 │
    24  ├─────────────────────────────────┤          16 ├─────────────────────────────────┤
        │ slot_bytes (capacity)       u64 │             │ nbytes of the payload       u64 │
    32  ├─────────────────────────────────┤          24 ├─────────────────────────────────┤
        │ stride from slot to slot    u64 │             │ checksum (xxh3-64)          u64 │
    40  ├─────────────────────────────────┤          32 ├─────────────────────────────────┤
        │ offset of slot 0            u64 │             │ commit time (seconds)       f64 │
    48  ├─────────────────────────────────┤          40 ├─────────────────────────────────┤
        │ producer id                 16s │             │ consumed by (bit per reader)u64 │
    64  ├─────────────────────────────────┤          48 ├─────────────────────────────────┤
        │ slot headers, 64 bytes each     │             │ unused                      16s │
        ├─────────────────────────────────┤          64 └─────────────────────────────────┘
        │ unused, up to a page boundary   │
    P   ├─────────────────────────────────┤          The commit time is the creator's monotonic clock.
        │ slot 0                          │          A slot header of zeros is a FREE slot that was
        ├─────────────────────────────────┤          never used; of a FREE slot only the state means
        │ slot 1 …                        │          anything.
        └─────────────────────────────────┘

Slots of a page or more start on a page, smaller ones on a cache line, so that every payload is 64-byte aligned.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from dray.errors import ConfigError, ProtocolError, VersionMismatch
from dray.identifiers import MAX_SLOT_BYTES, PRODUCER_ID_BYTES

MAGIC: Final = b"DRAYRING"
VERSION: Final = 1
PAGE: Final = 4096
CACHE_LINE: Final = 64
MAX_SLOTS: Final = 1 << 20

SEGMENT_HEADER: Final = struct.Struct(f"<8sIIQQQQ{PRODUCER_ID_BYTES}s")
SLOT_HEADER: Final = struct.Struct("<BB6xQQQdQ16x")
write_slot_header: Final = SLOT_HEADER.pack_into

STATE_OFFSET: Final = 0
FLAGS_OFFSET: Final = STATE_OFFSET + 1
SEQUENCE_OFFSET: Final = FLAGS_OFFSET + 1 + 6
NBYTES_OFFSET: Final = SEQUENCE_OFFSET + 8
CHECKSUM_OFFSET: Final = NBYTES_OFFSET + 8
COMMIT_TIME_OFFSET: Final = CHECKSUM_OFFSET + 8
CONSUMED_BY_OFFSET: Final = COMMIT_TIME_OFFSET + 8

HAS_CHECKSUM: Final = 1
U64: Final = struct.Struct("<Q")


def _round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def checked_int(key: str, value: object, low: int, high: int) -> int:
    """`value` if it is an integer from `low` to `high`; `ConfigError` naming `key` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(key, value, f"an integer from {low} to {high}")
    return value


@dataclass(frozen=True)
class SegmentLayout:
    """The offsets in a segment of `slots` slots with a capacity of `slot_bytes` bytes each.

    Raises:
        ConfigError: `slots` or `slot_bytes` is not an integer within its bounds.
    """

    slots: int
    slot_bytes: int

    def __post_init__(self) -> None:
        checked_int("slots", self.slots, 1, MAX_SLOTS)
        checked_int("slot_bytes", self.slot_bytes, 1, MAX_SLOT_BYTES)

    @cached_property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        return _round_up(self.slot_bytes, PAGE if self.slot_bytes >= PAGE else CACHE_LINE)

    @cached_property
    def slots_offset(self) -> int:
        """Byte offset of slot 0."""
        return _round_up(self.header_offset(self.slots), PAGE)

    @cached_property
    def nbytes(self) -> int:
        """Size of the whole segment, a multiple of the page size."""
        return _round_up(self.slots_offset + self.slots * self.stride, PAGE)

    def header_offset(self, slot: int) -> int:
        """Byte offset of the header of `slot`."""
        return SEGMENT_HEADER.size + slot * SLOT_HEADER.size

    def slot_offset(self, slot: int) -> int:
        """Byte offset of the bytes of `slot`."""
        return self.slots_offset + slot * self.stride

    def pack_segment_header(self, producer_id: bytes) -> bytes:
        """The segment header of this layout."""
        sizes = self.slots, self.slot_bytes, self.stride, self.slots_offset
        return SEGMENT_HEADER.pack(MAGIC, VERSION, SLOT_HEADER.size, *sizes, producer_id)


def unpack_segment_header(header: bytes) -> tuple[SegmentLayout, bytes]:
    """The layout and the producer id in the first `SEGMENT_HEADER.size` bytes of a segment.

    Every field is checked, because the header comes from another process.

    Raises:
        ProtocolError: the bytes are not a segment header, or its fields contradict each other.
        VersionMismatch: the segment has another version of this layout.
    """
    if len(header) != SEGMENT_HEADER.size:
        raise ProtocolError(f"a segment header has {SEGMENT_HEADER.size} bytes, not {len(header)}")
    magic, version, record_bytes, slots, slot_bytes, *offsets, producer_id = SEGMENT_HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolError(f"the memory is not a dray segment: it starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise VersionMismatch(f"the segment has layout version {version}, this dray reads version {VERSION}")
    try:
        layout = SegmentLayout(slots, slot_bytes)
    except ConfigError as error:
        raise ProtocolError(f"the segment header is not valid: {error}") from error
    if record_bytes != SLOT_HEADER.size or offsets != [layout.stride, layout.slots_offset]:
        raise ProtocolError("the segment header is not valid: its offsets contradict its sizes")
    return layout, producer_id
