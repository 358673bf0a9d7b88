import pytest

from dray.errors import ConfigError, ProtocolError, VersionMismatch
from dray.ring import layout
from dray.ring.layout import SegmentLayout, unpack_segment_header

PRODUCER = bytes(range(16))


def test_header_sizes_and_offsets_are_pinned() -> None:
    assert layout.SEGMENT_HEADER.size == 64
    assert layout.SLOT_HEADER.size == 64
    assert (
        layout.STATE_OFFSET,
        layout.FLAGS_OFFSET,
        layout.SEQUENCE_OFFSET,
        layout.NBYTES_OFFSET,
        layout.CHECKSUM_OFFSET,
        layout.COMMIT_TIME_OFFSET,
        layout.CONSUMED_BY_OFFSET,
    ) == (0, 1, 8, 16, 24, 32, 40)


def test_derived_offsets_are_those_of_the_slot_header_struct() -> None:
    packed = layout.SLOT_HEADER.pack(2, 1, 3, 4, 5, 0.0, 6)
    assert packed[layout.STATE_OFFSET] == 2
    assert packed[layout.FLAGS_OFFSET] == layout.HAS_CHECKSUM
    for offset, value in (
        (layout.SEQUENCE_OFFSET, 3),
        (layout.NBYTES_OFFSET, 4),
        (layout.CHECKSUM_OFFSET, 5),
        (layout.CONSUMED_BY_OFFSET, 6),
    ):
        assert layout.U64.unpack_from(packed, offset) == (value,)


def test_slot_area_is_page_aligned_behind_the_header_table() -> None:
    small = SegmentLayout(slots=3, slot_bytes=100)
    assert (small.header_offset(2), small.slots_offset, small.stride, small.nbytes) == (192, 4096, 128, 8192)
    large = SegmentLayout(slots=100, slot_bytes=5000)
    assert (large.slots_offset, large.stride, large.nbytes) == (8192, 8192, 8192 * 101)
    assert large.slot_offset(1) == 16384


@pytest.mark.parametrize("slot_bytes", [1, 63, 64, 65, 4095, 4096, 4097])
def test_slots_are_aligned_and_do_not_overlap(slot_bytes: int) -> None:
    shape = SegmentLayout(slots=7, slot_bytes=slot_bytes)
    starts = [shape.slot_offset(slot) for slot in range(7)]
    assert starts[0] >= shape.header_offset(7)
    assert all(start % 64 == 0 for start in starts)
    assert all(b - a >= slot_bytes for a, b in zip(starts, [*starts[1:], shape.nbytes], strict=True))


@pytest.mark.parametrize(
    ("slots", "slot_bytes", "key"),
    [(0, 8, "slots"), (-1, 8, "slots"), (2.0, 8, "slots"), (True, 8, "slots"), (1 << 21, 8, "slots"),
     (2, 0, "slot_bytes"), (2, -5, "slot_bytes"), (2, "8", "slot_bytes"), (2, 1 << 60, "slot_bytes")],
)  # fmt: skip
def test_sizes_out_of_bounds_are_refused_by_name(slots: int, slot_bytes: int, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SegmentLayout(slots, slot_bytes)
    assert caught.value.key == key
    assert "from 1 to" in caught.value.allowed


def test_segment_header_round_trips() -> None:
    shape = SegmentLayout(slots=5, slot_bytes=1000)
    assert unpack_segment_header(shape.pack_segment_header(PRODUCER)) == (shape, PRODUCER)


@pytest.mark.parametrize("offset", [0, 12, 16, 24, 32, 40])
def test_changed_segment_header_is_refused(offset: int) -> None:
    header = bytearray(SegmentLayout(slots=5, slot_bytes=12_288).pack_segment_header(PRODUCER))
    header[offset] = 0 if offset == 16 else header[offset] ^ 0x81
    with pytest.raises(ProtocolError):
        unpack_segment_header(bytes(header))


def test_other_version_and_short_header_are_refused() -> None:
    header = bytearray(SegmentLayout(slots=5, slot_bytes=64).pack_segment_header(PRODUCER))
    with pytest.raises(ProtocolError):
        unpack_segment_header(bytes(header[:-1]))
    header[8] = 99
    with pytest.raises(VersionMismatch, match="version 99"):
        unpack_segment_header(bytes(header))
