"""Frames: 64 bytes are a frame that packs to the same bytes, anything else is a `ProtocolError`."""

from dray.errors import ProtocolError
from dray.protocol.frames import FRAME_BYTES, MAX_TEXT_BYTES, Flag, Frame, Kind, Status, parse

SEEDS = [
    Frame(Kind.READ, slot=3, request=7, sequence=41, nbytes=1 << 20, tag=9).pack(),
    Frame(Kind.STATUS, Status.OK, flags=Flag.CHECKSUM, slot=3, request=7, sequence=41, nbytes=8).pack(),
    Frame(Kind.STATUS, Status.ERROR, flags=Flag.TEXT, nbytes=MAX_TEXT_BYTES + 1).pack(),
    Frame(Kind.ACK, flags=Flag.CONSUMED, slot=3, request=7, sequence=41).pack(),
    Frame(Kind.CONSUME, reader=255, slot=2**32 - 1, sequence=2**64 - 1).pack(),
    Frame(Kind.STAT).pack()[:-1],
]


def run(data: bytes) -> None:
    try:
        frame = parse(data)
    except ProtocolError:
        return
    assert len(data) == FRAME_BYTES
    assert frame.pack() == data
    assert frame.kind in frozenset(Kind)
    assert frame.status in frozenset(Status)
    assert not (frame.flags & Flag.TEXT and frame.nbytes > MAX_TEXT_BYTES)
    assert parse(memoryview(bytearray(data))) == frame
