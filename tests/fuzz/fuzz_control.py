"""What comes out of Redis: an entry, a command, weights, a reference, or a typed refusal.

Input: fields, each with a byte for its name and one for the length of its value.
"""

import contextlib

from fuzz.cursor import Cursor

from dray.control import RolloutEntry, names
from dray.control.client import paired
from dray.control.commands import Command
from dray.errors import ProtocolError
from dray.protocol import PayloadRef

NAMES = (
    names.PRODUCER, names.SEQUENCE, names.WEIGHT_VERSION, names.REPLICA, names.PROMPT, names.REFERENCE,
    names.PAYLOAD, names.COMMAND_NAME, names.COMMAND_FIELDS, names.COMMAND_TOKEN, names.VERSION,
)  # fmt: skip
_REFERENCE = b'{"p":"00112233445566778899aabbccddeeff","s":3,"q":41,"n":10,"e":["tcp:127.0.0.1:40001"]}'


def fields(values: dict[bytes, bytes]) -> bytes:
    """The input that means these fields."""
    return b"".join(bytes([NAMES.index(name), len(value)]) + value for name, value in values.items())


_ENTRY = {
    names.PRODUCER: b"0f" * 16,
    names.SEQUENCE: b"7",
    names.WEIGHT_VERSION: b"3",
    names.REPLICA: b"rollout-0",
    names.PROMPT: b"12",
}
SEEDS = [
    fields({**_ENTRY, names.REFERENCE: _REFERENCE}),
    fields({**_ENTRY, names.PAYLOAD: bytes(20)}),
    fields({**_ENTRY, names.PAYLOAD: b"", names.SEQUENCE: b"18446744073709551616"}),
    fields({**_ENTRY, names.REFERENCE: _REFERENCE, names.PROMPT: b" 1_0"}),
    fields({**_ENTRY, names.REFERENCE: b"\xff", names.REPLICA: b"\xff"}),
    fields(
        {names.COMMAND_NAME: b"stop", names.COMMAND_FIELDS: b'{"reason": "enough"}', names.COMMAND_TOKEN: b"t"}
    ),
    fields({names.COMMAND_NAME: b"stop", names.COMMAND_FIELDS: b'{"a":' + b"[" * 240}),
    fields({names.COMMAND_NAME: b"\xff", names.COMMAND_FIELDS: b'{"a": NaN, "b": [1e999]}'}),
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
        command = Command.from_fields(found)
    except ProtocolError:
        pass
    else:
        assert all(isinstance(text, str) for pair in command.fields.items() for text in pair)
    try:
        entry = RolloutEntry.from_fields(found)
    except ProtocolError:
        return
    written = [part if isinstance(part, bytes) else str(part).encode() for part in entry.to_fields()]
    assert RolloutEntry.from_fields(paired(written)) == entry
    if entry.reference is not None:
        with contextlib.suppress(ProtocolError):
            PayloadRef.from_json(entry.reference)
