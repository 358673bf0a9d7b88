"""What the owner of a ring and an agent send each other: JSON in messages of one Unix socket (`SOCK_SEQPACKET`).

1. owner → agent: a `Request`, with the descriptors of `dray.ring.inherited.FOR_HEIR`.
2. agent → owner: an `Answer`.
3. owner → agent: `WITHDRAWN`, before it closes its ring in order.

The connection stays open meanwhile. Its end says nothing about the owner.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from dray.errors import ProtocolError
from dray.identifiers import MAX_READERS
from dray.protocol.ref import HEIR, has_control
from dray.text import printable, printable_value

VERSION: Final = 1
WITHDRAWN: Final = b'{"withdrawn":true}'
MAX_MESSAGE: Final = 4096
MAX_LEASES: Final = 1 << 20
_MAX_SECRET, _MAX_HOST, _MAX_NAME, _MAX_REASON, _MAX_ENDPOINTS = 1024, 256, 200, 500, 8


@dataclass(frozen=True, slots=True)
class Request:
    """What the agent must know to serve a ring once its owner is dead.

    Attributes:
        name: what the agent calls the owner, in its log.
        readers: how many readers the ring has.
        max_leases: payloads that a connection may hold at a time.
        lanes: the lanes to serve.
        host: the address to listen on for lanes over the network.
        secret: of the ring's server, if it has one.
    """

    name: str
    readers: int
    max_leases: int
    lanes: tuple[str, ...]
    host: str
    secret: bytes | None = field(default=None, repr=False)

    def encode(self) -> bytes:
        """The message."""
        fields = {**asdict(self), "version": VERSION, "secret": None if self.secret is None else self.secret.hex()}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, message: bytes) -> Self:
        """Parse what `encode` has made.

        Raises:
            ProtocolError: it is not such a message; the error names the field.
        """
        fields = _object(message)
        if fields.get("version") != VERSION:
            raise ProtocolError(f"version {printable_value(fields.get('version'))} is not {VERSION}")
        secret = fields.get("secret")
        try:
            decoded = None if secret is None else bytes.fromhex(_text(fields, "secret", _MAX_SECRET))
        except ValueError:  # the text is not shown: it is a secret
            raise ProtocolError("secret must be hexadecimal digits") from None
        return cls(
            name=printable(_text(fields, "name", _MAX_NAME)),
            readers=_number(fields, "readers", MAX_READERS),
            max_leases=_number(fields, "max_leases", MAX_LEASES),
            lanes=_texts(fields, "lanes"),
            host=_text(fields, "host", _MAX_HOST),
            secret=decoded,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The addresses at which the agent will serve the ring, or why it does not take it.

    Attributes:
        endpoints: for references, each with the prefix `HEIR`; empty if it is refused.
        refused: the reason; empty if it is not.
    """

    endpoints: tuple[str, ...] = ()
    refused: str = ""

    def encode(self) -> bytes:
        """The message."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, message: bytes) -> Self:
        """Parse what `encode` has made.

        Raises:
            ProtocolError: it is not such a message.
        """
        fields = _object(message)
        endpoints = _texts(fields, "endpoints")
        if not all(each.startswith(HEIR) and not has_control(each) for each in endpoints):
            raise ProtocolError(f"endpoints must be addresses of heirs, got {printable_value(endpoints)}")
        refused = printable(_text(fields, "refused", MAX_MESSAGE), _MAX_REASON)
        if not endpoints and not refused:
            raise ProtocolError("the answer has neither an address nor a reason")
        return cls(endpoints, refused)


def _object(message: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the message is not JSON") from error
    if not isinstance(fields, dict):
        raise ProtocolError("the message is not a JSON object")
    return fields


def _text(fields: dict[str, Any], key: str, most: int) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or len(value) > most:
        kind = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
        raise ProtocolError(f"{key} must be text of at most {most} characters, got {kind}")
    return value


def _number(fields: dict[str, Any], key: str, most: int) -> int:
    value = fields.get(key)
    if value.__class__ is not int or not 1 <= value <= most:
        raise ProtocolError(f"{key} must be an integer from 1 to {most}, got {printable_value(value)}")
    return int(value)


def _texts(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    value = fields.get(key)
    if not isinstance(value, list) or len(value) > _MAX_ENDPOINTS or not all(isinstance(e, str) for e in value):
        raise ProtocolError(f"{key} must be a list of up to {_MAX_ENDPOINTS} texts, got {printable_value(value)}")
    return tuple(value)
