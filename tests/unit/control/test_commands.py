import json

import pytest

from dray.control import names
from dray.control.commands import Command
from dray.errors import ProtocolError


def test_command_is_what_its_fields_say() -> None:
    fields = {
        names.COMMAND_NAME: b"drain",
        names.COMMAND_FIELDS: json.dumps({"reason": "solved", "n": 1}).encode(),
    }
    assert Command.from_fields(fields) == Command("drain", {"reason": "solved", "n": "1"})


@pytest.mark.parametrize(
    "fields",
    [
        {names.COMMAND_FIELDS: b"{}"},
        {names.COMMAND_NAME: b"drain"},
        *(
            {names.COMMAND_NAME: b"drain", names.COMMAND_FIELDS: text}
            for text in (
                b"",
                b"[]",
                b"null",
                b"{",
                b"\xff",
                b"[" * 100_000,
                b'{"a":' + b"[" * 100_000,
                b"9" * 5000,
            )
        ),
    ],
)
def test_anything_else_in_the_stream_is_a_protocol_error(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(ProtocolError, match="command"):
        Command.from_fields(fields)
