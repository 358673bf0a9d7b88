"""How the two ends of a connection between nodes show each other that they know the job's secret.

```
head                                         node
  nonce (32 bytes) ─────────────────────────►
  ◄───────── nonce, length, purpose, proof of the node
  proof of the head ────────────────────────►
```

A proof is an HMAC-SHA256 over both nonces and the purpose, under a key that follows from the secret. The secret
itself is never sent, and a proof is good for one connection. The purpose is JSON: from which node of which attempt
the connection comes, and for which policy rank, if it is for one. No I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Annotated

from pydantic import Field, ValidationError

from dray.errors import AuthenticationError
from dray.runtime.messages import Message

NONCE = 32
PROOF = 32
_LENGTH = struct.Struct("!H")
_LONGEST = 1024


class Purpose(Message):
    """What a connection is for: the orders to a node, or the channel of a policy rank there."""

    node: Annotated[str, Field(min_length=1, max_length=255)]
    attempt: Annotated[str, Field(min_length=1, max_length=64)]
    rank: Annotated[int, Field(ge=1)] | None = None


class Host:
    """The head's end.

    Attributes:
        nonce: what it sends first.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = _key(secret)
        self._received = bytearray()
        self.nonce = secrets.token_bytes(NONCE)

    def feed(self, chunk: bytes) -> tuple[Purpose, bytes] | None:
        """Take what was received; once the node's words are complete, its purpose and the head's proof.

        Raises:
            AuthenticationError: the node does not know the secret, or says something else.
        """
        self._received += chunk
        begin = NONCE + _LENGTH.size
        if len(self._received) < begin:
            return None
        (length,) = _LENGTH.unpack_from(self._received, NONCE)
        if length > _LONGEST:
            raise AuthenticationError(f"the purpose of a connection has {length} bytes")
        end = begin + length + PROOF
        if len(self._received) < end:
            return None
        words = bytes(self._received)
        theirs, text, proof = words[:NONCE], words[begin : begin + length], words[begin + length :]
        if not hmac.compare_digest(_proof(self._key, b"node", self.nonce, theirs, text), proof):
            raise AuthenticationError("the other end of a connection does not know the job's secret")
        try:
            purpose = Purpose.model_validate_json(text)
        except ValidationError as error:
            raise AuthenticationError("the other end of a connection is of another version") from error
        return purpose, _proof(self._key, b"head", self.nonce, theirs, text)


class Guest:
    """The node's end."""

    def __init__(self, secret: bytes, purpose: Purpose) -> None:
        self._key = _key(secret)
        self._text = purpose.model_dump_json().encode()
        self._nonce = secrets.token_bytes(NONCE)

    def answer(self, nonce: bytes) -> bytes:
        """What the node sends when it has received the head's `nonce`."""
        self._expected = _proof(self._key, b"head", nonce, self._nonce, self._text)
        proof = _proof(self._key, b"node", nonce, self._nonce, self._text)
        return self._nonce + _LENGTH.pack(len(self._text)) + self._text + proof

    def check(self, proof: bytes) -> None:
        """Check the head's proof.

        Raises:
            AuthenticationError: who listens there does not know the secret.
        """
        if not hmac.compare_digest(self._expected, proof):
            raise AuthenticationError("who listens at the head's address does not know the job's secret")


def _key(secret: bytes) -> bytes:
    return hmac.digest(secret, b"dray connection between nodes", hashlib.sha256)


def _proof(key: bytes, whose: bytes, nonce_of_head: bytes, nonce_of_node: bytes, text: bytes) -> bytes:
    return hmac.digest(key, whose + nonce_of_head + nonce_of_node + text, hashlib.sha256)
