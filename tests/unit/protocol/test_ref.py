import json
import pickle

import pytest

from dray.errors import ProtocolError
from dray.protocol import PayloadRef

REF = PayloadRef(bytes(range(16)), 3, 7, 1000, ("unix:/run/dray/1/0.sock", "tcp:127.0.0.1:40001"))


def fields(**changed: object) -> str:
    return json.dumps({**json.loads(REF.to_json()), **changed})


def test_reference_survives_json_and_pickle() -> None:
    assert PayloadRef.from_json(REF.to_json()) == REF
    assert PayloadRef.from_json(REF.to_json().encode()) == REF
    assert pickle.loads(pickle.dumps(REF)) == REF  # noqa: S301
    assert {REF: 1}[PayloadRef.from_json(REF.to_json())] == 1


def test_reference_json_is_one_short_line_of_ascii() -> None:
    text = REF.to_json()
    assert "\n" not in text
    assert text.isascii()
    assert len(text.encode()) <= 512


def test_slot_zero_and_sequence_zero_are_valid() -> None:
    ref = PayloadRef(bytes(16), 0, 0, 0, ("tcp:h:1",))
    assert PayloadRef.from_json(ref.to_json()) == ref


def test_largest_values_survive() -> None:
    ref = PayloadRef(b"\xff" * 16, 2**32 - 1, 2**64 - 1, 2**64 - 1, ("tcp:h:1",))
    assert PayloadRef.from_json(ref.to_json()) == ref


def test_identity_is_producer_and_sequence() -> None:
    assert REF.identity == (REF.producer, 7)


def test_too_many_endpoints_do_not_make_a_reference() -> None:
    ref = PayloadRef(bytes(16), 0, 0, 0, tuple(f"tcp:127.0.0.1:{port}" for port in range(40000, 40040)))
    with pytest.raises(ProtocolError, match="at most 512 bytes"):
        ref.to_json()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "must be JSON"),
        ("{", "must be JSON"),
        ("[" * 500, "must be JSON"),
        (b"\xff\xfe\xff", "must be JSON"),
        ("[]", "exactly the keys"),
        ("null", "exactly the keys"),
        ("{}", "exactly the keys"),
        (fields(x=1), "exactly the keys"),
        (fields(p=1), "field producer"),
        (fields(p="zz" * 16), "field producer"),
        (fields(p="00" * 15), "field producer"),
        (fields(p="00 " * 10 + "00"), "field producer"),
        (fields(s=-1), "field slot"),
        (fields(s=2**32), "field slot"),
        (fields(s=1.0), "field slot"),
        (fields(s=True), "field slot"),
        (fields(q="7"), "field sequence"),
        (fields(q=2**64), "field sequence"),
        (fields(n=None), "field nbytes"),
        (fields(n=-1), "field nbytes"),
        (fields(e="tcp:h:1"), "field endpoints"),
        (fields(e=[1]), "field endpoints"),
        (fields(e=["nonsense"]), "field endpoints"),
        *(
            (fields(e=["tcp:h:1", f"unix:/run/{character}/0.sock"]), "field endpoints")
            for character in ("\0", "\r", "\n", "\t", "\x1b[2J", "\x7f", "\x85", "\x9b", "\u2028", "\u2029")
        ),
        (fields(e=["tcp:" + "h" * 600 + ":1"]), "at most 512 bytes"),
    ],
)
def test_malformed_references_are_refused_by_field(text: str | bytes, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        PayloadRef.from_json(text)


@pytest.mark.parametrize(
    "changed", [{"slot": -1}, {"slot": 2**32}, {"sequence": -1}, {"nbytes": -1}, {"producer": b"short"}]
)
def test_a_reference_cannot_be_made_with_values_the_wire_cannot_carry(changed: dict[str, object]) -> None:
    values = {"producer": bytes(16), "slot": 0, "sequence": 0, "nbytes": 0, "endpoints": ("tcp:h:1",), **changed}
    with pytest.raises(ProtocolError, match=next(iter(changed))):
        PayloadRef(**values)  # type: ignore[arg-type]
