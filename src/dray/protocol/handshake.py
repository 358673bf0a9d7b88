"""The handshake: who is there, which version, which producer, and proof of the secret on both sides.

```
client                                          server
  HELLO(version, lane, producer, nonce) ──────►
        ◄────── CHALLENGE(status, version, producer, nonce, proof, ring)
  PROOF(proof) ───────────────────────────────►
        ◄────── WELCOME(status)                 on the Unix lane it carries the segment's descriptor
```

A proof is HMAC-SHA256(secret, role ‖ version ‖ lane ‖ client nonce ‖ server nonce ‖ producer id); the role
keeps a proof from being reflected. Without a secret on either side proofs are zero and mean nothing. The proof
authenticates the peer; it neither encrypts nor signs what follows.

HELLO is 64 bytes, CHALLENGE 128, PROOF 32, WELCOME 8. All begin with or follow the magic ``DRAY``.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import secrets
import struct
from dataclasses import dataclass
from typing import Protocol

from dray.errors import AuthenticationError, ConfigError, ProtocolError, VersionMismatch
from dray.identifiers import MAX_READERS, PRODUCER_ID_BYTES
from dray.protocol.frames import VERSION

MAGIC = b"DRAY"
NONCE_BYTES = 32
PROOF_BYTES = 32
NO_PROOF = bytes(PROOF_BYTES)
MIN_SECRET_BYTES = 16
"""A shorter secret is refused: a client gets the server's proof first, and can try secrets against it offline."""

ANY_PRODUCER = bytes(PRODUCER_ID_BYTES)
_SECRET_BYTES = 32

#                     magic version lane flags producer nonce
HELLO = struct.Struct("<4sHBB16s32s8x")
#                         magic version status flags producer nonce proof slots slot_bytes max_leases readers
CHALLENGE = struct.Struct("<4sHBB16s32s32sQQIB19x")
PROOF = struct.Struct(f"<{PROOF_BYTES}s")
WELCOME = struct.Struct("<4sB3x")


class LaneTraits(Protocol):
    """What the protocol needs to know about a lane; see `dray.transport.lanes.base.Lane`.

    Attributes:
        number: its number in HELLO.
        in_band: payloads travel over the connection.
        tagged: a READ carries the tag under which its payload arrives.
    """

    number: int
    in_band: bool
    tagged: bool


class Verdict(enum.IntEnum):
    """What the server says of the client at each step."""

    WELCOME = 0
    VERSION = 1
    DENIED = 2
    MALFORMED = 3


class HelloFlag(enum.IntFlag):
    """What a side says of itself."""

    NONE = 0
    SECRET = 1


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What CHALLENGE tells about the ring behind a server."""

    producer: bytes
    slots: int
    slot_bytes: int
    max_leases: int
    readers: int


def make_secret() -> bytes:
    """Return a fresh secret: 32 random bytes."""
    return secrets.token_bytes(_SECRET_BYTES)


def check_secret(secret: bytes | None) -> None:
    """Raise `ConfigError`, which does not show it, unless the secret is long enough or ``None``."""
    if secret is None or (isinstance(secret, bytes) and len(secret) >= MIN_SECRET_BYTES):
        return
    kind = type(secret).__name__
    problem = f"has {len(secret)} bytes" if isinstance(secret, bytes) else f"is a {kind}"
    allowed = (
        f"must have at least {MIN_SECRET_BYTES} random bytes, such as those of dray.make_secret(), or be None"
    )
    raise ConfigError("secret", kind, allowed, problem)


def proof(secret: bytes, role: bytes, lane: LaneTraits, nonces: bytes, producer: bytes) -> bytes:
    """HMAC-SHA256 over everything both sides know of this handshake."""
    return hmac.digest(secret, role + bytes([VERSION, lane.number]) + nonces + producer, hashlib.sha256)


class ClientHandshake:
    """The client's side. Feed it each of the server's messages; it returns what to send next, or ``None``."""

    def __init__(self, lane: LaneTraits, producer: bytes = ANY_PRODUCER, secret: bytes | None = None) -> None:
        self._lane = lane
        self._secret = secret
        self._producer = producer
        self._nonce = os.urandom(NONCE_BYTES)
        self.server: ServerIdentity | None = None
        self.expects = CHALLENGE.size
        self.done = False

    def hello(self) -> bytes:
        """The first message of the connection."""
        flags = HelloFlag.SECRET if self._secret is not None else HelloFlag.NONE
        return HELLO.pack(MAGIC, VERSION, self._lane.number, flags, self._producer, self._nonce)

    def receive(self, message: bytes | bytearray | memoryview) -> bytes | None:
        """Take the server's next message of `expects` bytes.

        ``None`` before `done` means that `server` is not the producer that was asked for: leave.

        Raises:
            VersionMismatch: the server speaks another version.
            AuthenticationError: one side has no secret, or a wrong one.
            ProtocolError: this is not a dray server.
        """
        if self.server is None:
            return self._challenge(message)
        self._welcome(message)
        return None

    def _challenge(self, message: bytes | bytearray | memoryview) -> bytes | None:
        magic, version, verdict, flags, producer, nonce, theirs, slots, slot_bytes, max_leases, readers = (
            CHALLENGE.unpack(message)
        )
        if magic != MAGIC:
            raise ProtocolError(f"the peer does not speak this protocol: it begins with {bytes(magic)!r}")
        if version != VERSION or verdict == Verdict.VERSION:
            raise VersionMismatch(f"the server speaks version {version}, this client version {VERSION}")
        if verdict != Verdict.WELCOME:
            raise ProtocolError(f"the server refused HELLO: {_verdict(verdict)}")
        if not (slots and slot_bytes and max_leases and 1 <= readers <= MAX_READERS):
            raise ProtocolError(
                f"the server speaks of {slots} slots of {slot_bytes} bytes, {max_leases} leases, {readers} readers"
            )
        self.server = ServerIdentity(producer, slots, slot_bytes, max_leases, readers)
        if self._producer not in (ANY_PRODUCER, producer):
            # Before its proof is looked at: the address may be another job's by now, with another secret.
            return None
        if bool(flags & HelloFlag.SECRET) != (self._secret is not None):
            missing = "this client" if self._secret is None else "the server"
            raise AuthenticationError(f"{missing} has no secret, the other side has one")
        answer = NO_PROOF
        if self._secret is not None:
            nonces = self._nonce + nonce
            expected = proof(self._secret, b"server", self._lane, nonces, producer)
            if not hmac.compare_digest(expected, theirs):
                raise AuthenticationError("the server's proof of the secret is wrong")
            answer = proof(self._secret, b"client", self._lane, nonces, producer)
        self.expects = WELCOME.size
        return PROOF.pack(answer)

    def _welcome(self, message: bytes | bytearray | memoryview) -> None:
        magic, verdict = WELCOME.unpack(message)
        if magic != MAGIC:
            raise ProtocolError(f"WELCOME begins with {bytes(magic)!r}")
        if verdict == Verdict.DENIED:
            raise AuthenticationError("the server refused this client's proof of the secret")
        if verdict != Verdict.WELCOME:
            raise ProtocolError(f"the server refused the connection: {_verdict(verdict)}")
        self.done = True


class ServerHandshake:
    """The server's side. Feed it each of the client's messages; it returns what to send next.

    `verdict` says how it went: anything but ``WELCOME`` means send the answer, then close.
    """

    def __init__(self, lane: LaneTraits, identity: ServerIdentity, secret: bytes | None = None) -> None:
        self._lane = lane
        self._identity = identity
        self._secret = secret
        self._nonces = b""
        self._unproven = False
        self.expects = HELLO.size
        self.verdict = Verdict.WELCOME
        self.done = False

    @property
    def unproven(self) -> bool:
        """The client has seen our proof and sent none of its own: if it leaves now, the secrets differ."""
        return self._unproven

    def receive(self, message: bytes | bytearray | memoryview) -> bytes:
        """Take the client's next message of `expects` bytes; never raises on what a client sends."""
        return self._proof(message) if self._nonces else self._hello(message)

    def _hello(self, message: bytes | bytearray | memoryview) -> bytes:
        magic, version, lane, flags, expected, nonce = HELLO.unpack(message)
        if magic != MAGIC or lane != self._lane.number:
            self.verdict = Verdict.MALFORMED
        elif version != VERSION:
            self.verdict = Verdict.VERSION
        mine = os.urandom(NONCE_BYTES)
        self._nonces = nonce + mine
        guarded = self._secret is not None or flags & HelloFlag.SECRET
        self._unproven = bool(guarded) and expected in (ANY_PRODUCER, self._identity.producer)
        self.expects = PROOF.size
        answer = NO_PROOF
        if self._secret is not None and flags & HelloFlag.SECRET:
            answer = proof(self._secret, b"server", self._lane, self._nonces, self._identity.producer)
        who = self._identity
        secret = HelloFlag.NONE if self._secret is None else HelloFlag.SECRET
        return CHALLENGE.pack(
            MAGIC, VERSION, self.verdict, secret, who.producer, mine, answer,
            who.slots, who.slot_bytes, who.max_leases, who.readers,
        )  # fmt: skip

    def _proof(self, message: bytes | bytearray | memoryview) -> bytes:
        (theirs,) = PROOF.unpack(message)
        self._unproven = False
        if self._secret is not None:
            expected = proof(self._secret, b"client", self._lane, self._nonces, self._identity.producer)
            if not hmac.compare_digest(expected, theirs):
                self.verdict = Verdict.DENIED
        elif theirs != NO_PROOF:
            self.verdict = Verdict.DENIED
        self.done = self.verdict is Verdict.WELCOME
        return WELCOME.pack(MAGIC, self.verdict)


def _verdict(number: int) -> str:
    return Verdict(number).name.lower() if number in frozenset(Verdict) else f"verdict {number}"
