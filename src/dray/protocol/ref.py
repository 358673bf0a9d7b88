"""`PayloadRef`: the reference that is passed on instead of a payload."""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from typing import Any

from dray.errors import ProtocolError
from dray.identifiers import PRODUCER_ID_BYTES, PayloadId

MAX_REF_BYTES = 512
MAX_SLOT = 2**32 - 1
MAX_U64 = 2**64 - 1
HEIR = "heir+"
"""What the address of a producer's heir begins with: it is asked once the producer does not answer any more."""
_DIGITS = frozenset(string.hexdigits)
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class PayloadRef:
    """Names one payload of one producer, and the endpoints that serve it.

    Its JSON form has at most 512 bytes. It consists of plain values, so it can be pickled, compared and used as a
    key.

    Attributes:
        producer: the ring's 128 random bits.
        slot: index of the slot, from 0.
        sequence: the slot's sequence number when it was claimed, from 0.
        nbytes: size of the payload in bytes.
        endpoints: addresses that serve it, e.g. ``("unix:/run/…/0.sock", "tcp:10.0.0.3:40001")``.

    Raises:
        ProtocolError: a value is out of range.
    """

    producer: bytes
    slot: int
    sequence: int
    nbytes: int
    endpoints: tuple[str, ...]

    def __post_init__(self) -> None:
        if not (
            self.producer.__class__ is bytes
            and len(self.producer) == PRODUCER_ID_BYTES
            and self.slot.__class__ is self.sequence.__class__ is self.nbytes.__class__ is int
            and 0 <= self.slot <= MAX_SLOT
            and 0 <= self.sequence <= MAX_U64
            and 0 <= self.nbytes <= MAX_U64
        ):
            raise _refusal(self)

    @property
    def identity(self) -> tuple[bytes, int]:
        """(producer, sequence): unique for every payload ever committed."""
        return self.producer, self.sequence

    @property
    def id(self) -> PayloadId:
        """The payload's identity, as streams and jobs have it."""
        return PayloadId(self.producer, self.sequence, self.slot, self.nbytes)

    def to_json(self) -> str:
        """One line of JSON, at most 512 bytes.

        Raises:
            ProtocolError: the endpoints make it longer than that.
        """
        text = json.dumps(
            {
                "p": self.producer.hex(),
                "s": self.slot,
                "q": self.sequence,
                "n": self.nbytes,
                "e": self.endpoints,
            },
            separators=(",", ":"),
        )
        if len(text) > MAX_REF_BYTES:
            raise ProtocolError(f"a reference has at most {MAX_REF_BYTES} bytes as JSON; this one has {len(text)}")
        return text

    @classmethod
    def from_json(cls, text: str | bytes) -> PayloadRef:
        """Parse what `to_json` wrote; the text is untrusted.

        Raises:
            ProtocolError: it is not such a reference; the message names the field.
        """
        if len(text) > MAX_REF_BYTES:
            raise ProtocolError(f"a reference has at most {MAX_REF_BYTES} bytes; got {len(text)}")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a reference must be JSON: {error}") from error
        if not isinstance(fields, dict) or fields.keys() != {"p", "s", "q", "n", "e"}:
            raise ProtocolError("a reference is a JSON object with exactly the keys p, s, q, n, e")
        endpoints = fields["e"]
        if not isinstance(endpoints, list) or not all(map(_is_address, endpoints)):
            raise ProtocolError(f"reference field endpoints must be a list of addresses, got {endpoints!r}")
        return cls(_producer(fields["p"]), fields["s"], fields["q"], fields["n"], tuple(endpoints))


def has_control(text: str) -> bool:
    r"""Whether the text has a control character (CR, LF, NUL, ``\x1b``, …) or a line or paragraph separator."""
    return _CONTROL.search(text) is not None


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and ":" in value and not has_control(value)


def _producer(value: Any) -> bytes:
    if isinstance(value, str) and len(value) == 2 * PRODUCER_ID_BYTES and _DIGITS.issuperset(value):
        return bytes.fromhex(value)
    digits = 2 * PRODUCER_ID_BYTES
    raise ProtocolError(f"reference field producer must be {digits} hexadecimal digits, got {value!r}")


def _refusal(ref: PayloadRef) -> ProtocolError:
    if not isinstance(ref.producer, bytes) or len(ref.producer) != PRODUCER_ID_BYTES:
        return ProtocolError(f"reference field producer must be {PRODUCER_ID_BYTES} bytes, got {ref.producer!r}")
    bounds = (("slot", MAX_SLOT), ("sequence", MAX_U64), ("nbytes", MAX_U64))
    wrong = [(n, m) for n, m in bounds if type(getattr(ref, n)) is not int or not 0 <= getattr(ref, n) <= m]
    name, most = wrong[0]
    found = getattr(ref, name)
    return ProtocolError(f"reference field {name} must be an integer from 0 to {most}, got {found!r}")
