"""The messages of registrations: what is not one is refused, and secrets are not shown."""

import json

import pytest

from dray.agent.messages import Answer, Request
from dray.errors import ProtocolError

REQUEST = Request("rollout-0", 2, 8, ("shm", "tcp"), "127.0.0.1", bytes(range(16)))


def test_a_request_comes_back_as_it_was() -> None:
    assert Request.decode(REQUEST.encode()) == REQUEST
    without = Request("rollout-0", 1, 8, ("shm",), "127.0.0.1")
    assert Request.decode(without.encode()) == without
    assert REQUEST.secret is not None
    assert REQUEST.secret.hex() not in repr(REQUEST)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("name", 7),
        ("name", "x" * 201),
        ("readers", 0),
        ("readers", 65),
        ("readers", True),
        ("max_leases", -1),
        ("lanes", "shm"),
        ("lanes", [1]),
        ("lanes", ["shm"] * 9),
        ("host", None),
        ("secret", "not hexadecimal"),
        ("secret", 5),
    ],
)
def test_a_request_with_a_wrong_field_is_refused_by_its_name(field: str, value: object) -> None:
    message = json.dumps({**json.loads(REQUEST.encode()), field: value}).encode()
    with pytest.raises(ProtocolError, match=field) as caught:
        Request.decode(message)
    assert "not hexadecimal" not in str(caught.value)


@pytest.mark.parametrize("message", [b"", b"{", b"[]", b"\xff", b"[" * 3000, b'{"version":1}'])
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        Request.decode(message)
    with pytest.raises(ProtocolError):
        Answer.decode(message)


def test_an_answer_names_addresses_of_heirs_or_a_reason() -> None:
    for answer in (Answer(("heir+unix:/a", "heir+tcp:127.0.0.1:7")), Answer(refused="too many rings")):
        assert Answer.decode(answer.encode()) == answer
    for wrong in (Answer(), Answer(("unix:/a",)), Answer(("heir+unix:/a\n",))):
        with pytest.raises(ProtocolError):
            Answer.decode(wrong.encode())
