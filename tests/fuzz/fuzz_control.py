"""What comes out of Redis: an entry, weights, a reference, or a typed refusal.

Input: fields, each with a byte for its name and one for the length of its value.
"""

import contextlib

from fuzz.cursor import Cursor

from dray.errors import ProtocolError
from dray.jobs.queue import RolloutEntry
from dray.jobs.queue.connection import paired
from dray.protocol import PayloadRef

NAMES = (
    b"producer", b"sequence", b"weight_version", b"replica", b"work_item", b"reference", b"payload", b"version",
)  # fmt: skip
_REFERENCE = b'{"p":"00112233445566778899aabbccddeeff","s":3,"q":41,"n":10,"e":["tcp:127.0.0.1:40001"]}'


def fields(values: dict[bytes, bytes]) -> bytes:
    """The input that means these fields."""
    return b"".join(bytes([NAMES.index(name), len(value)]) + value for name, value in values.items())


_ENTRY = {
    b"producer": b"0f" * 16,
    b"sequence": b"7",
    b"weight_version": b"3",
    b"replica": b"rollout-0",
    b"work_item": b"12",
}
SEEDS = [
    fields({**_ENTRY, b"reference": _REFERENCE}),
    fields({**_ENTRY, b"payload": bytes(20)}),
    fields({**_ENTRY, b"payload": b"", b"sequence": b"18446744073709551616"}),
    fields({**_ENTRY, b"reference": _REFERENCE, b"work_item": b" 1_0"}),
    fields({**_ENTRY, b"reference": b"\xff", b"replica": b"\xff"}),
]


def run(data: bytes) -> None:
    cursor = Cursor(data)
    found: dict[bytes, bytes] = {}
    while cursor:
        name = NAMES[cursor.byte() % len(NAMES)]
        length = cursor.byte()
        value = cursor.read(length)
        # A long run stands for one that is far longer, as deep JSON and long numbers need it.
        found[name] = value * 1000 if length == 255 else value
    try:
        entry = RolloutEntry.from_fields(found)
    except ProtocolError:
        return
    written = [part if isinstance(part, bytes) else str(part).encode() for part in entry.to_fields()]
    assert RolloutEntry.from_fields(paired(written)) == entry
    if entry.reference is not None:
        with contextlib.suppress(ProtocolError):
            PayloadRef.from_json(entry.reference)
