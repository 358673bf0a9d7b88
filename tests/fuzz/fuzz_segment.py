"""The descriptor that a server sends: its segment's header is checked before the memory is used.

Input: one byte for seals and size, then the header.
"""

import fcntl
import os

from fuzz.cursor import Cursor

from dray.errors import ProtocolError, SlotError
from dray.ring import Segment
from dray.ring.layout import SegmentLayout
from dray.ring.mapping import SEALS

_F_ADD_SEALS = 1033
_HEADER = SegmentLayout(2, 64).pack_segment_header(bytes(range(16)))
_NBYTES = SegmentLayout(2, 64).nbytes
RIGHT, UNSEALED, SHORT, LONG = range(4)
SEEDS = [
    bytes([RIGHT]) + _HEADER,
    bytes([UNSEALED]) + _HEADER,
    bytes([SHORT]) + _HEADER[:-5],
    bytes([LONG]) + _HEADER,
    bytes([RIGHT]) + _HEADER[:16] + b"\xff" * 16 + _HEADER[32:],
    bytes([RIGHT]) + _HEADER[:12] + bytes(4) + _HEADER[16:],
]


def run(data: bytes) -> None:
    cursor = Cursor(data)
    form = cursor.byte() % 4
    header = cursor.read(4096)
    size = {RIGHT: _NBYTES, UNSEALED: _NBYTES, SHORT: len(header), LONG: _NBYTES + 1 + cursor.byte()}[form]
    descriptor = os.memfd_create("dray-fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, header[:size], 0)
        if form != UNSEALED:
            fcntl.fcntl(descriptor, _F_ADD_SEALS, SEALS)
        try:
            segment = Segment.attach(descriptor)
        except (ProtocolError, SlotError):
            return
    finally:
        os.close(descriptor)
    with segment:
        assert form != UNSEALED
        assert segment.nbytes == size
        for slot in {0, segment.layout.slots // 2, segment.layout.slots - 1}:
            start = segment.slot_offset(slot)
            assert 0 <= start <= size - segment.layout.slot_bytes
            bytes(segment.view[start : start + segment.layout.slot_bytes])
