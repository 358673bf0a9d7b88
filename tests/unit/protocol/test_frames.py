import pytest

from dray.errors import ProtocolError
from dray.protocol.frames import FRAME, FRAME_BYTES, MAX_TEXT_BYTES, Flag, Frame, Kind, Status, parse


def test_frame_is_64_bytes_in_the_documented_order() -> None:
    assert FRAME_BYTES == FRAME.size == 64
    frame = Frame(Kind.STATUS, Status.STALE, 3, Flag.CHECKSUM, 4, 5, 6, 7, 8, 9, 10, 11)
    packed = frame.pack()
    assert packed[:8] == bytes([2, 1, 3, 2, 4, 0, 0, 0])
    assert [int.from_bytes(packed[at : at + 8], "little") for at in range(8, 64, 8)] == [5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_survives_the_wire(kind: Kind) -> None:
    frame = Frame(kind, 0, 63, 0, 2**32 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 1, 2)
    assert parse(frame.pack()) == frame
    assert parse(bytearray(frame.pack())) == frame
    assert parse(memoryview(frame.pack())) == frame


@pytest.mark.parametrize("size", [0, 1, 63, 65, 128])
def test_a_frame_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match="64 bytes"):
        parse(bytes(size))


@pytest.mark.parametrize("kind", [0, 13, 255])
def test_unknown_kinds_are_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"kind {kind}"):
        parse(Frame(kind).pack())


@pytest.mark.parametrize("status", [6, 255])
def test_unknown_status_codes_are_refused(status: int) -> None:
    with pytest.raises(ProtocolError, match=f"status {status}"):
        parse(Frame(Kind.STATUS, status).pack())


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (Kind.READ, Flag.CONSUMED),
        (Kind.ACK, Flag.TEXT),
        (Kind.STATUS, Flag.CONSUMED),
        (Kind.CONSUME, 1),
        (Kind.STAT, 128),
    ],
)
def test_flags_of_another_kind_are_refused(kind: Kind, flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        parse(Frame(kind, flags=flags).pack())


def test_longer_texts_than_the_bound_are_refused_before_memory_is_allocated() -> None:
    assert parse(Frame(Kind.STATUS, flags=Flag.TEXT, nbytes=MAX_TEXT_BYTES).pack())
    with pytest.raises(ProtocolError, match="at most"):
        parse(Frame(Kind.STATUS, flags=Flag.TEXT, nbytes=MAX_TEXT_BYTES + 1).pack())
