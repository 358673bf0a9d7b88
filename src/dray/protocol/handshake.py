"""The handshake: lane, version, producer, and on both sides a proof of the secret.

```
client                                          server
  HELLO(version, lane, producer, nonce) ──────►
        ◄────── CHALLENGE(verdict, version, producer, nonce, proof, ring)
  PROOF(proof) ───────────────────────────────►
        ◄────── WELCOME(verdict)                on the shm lane it carries the segment's descriptor
```

On the shm lane from version 2 on, a client that wants direct leases sets `DIRECT` in HELLO. If CHALLENGE has it as
well, ATTACH follows PROOF in the same message, with a pidfd of the client. WELCOME has `ATTACHED` if the server
has agreed; then it carries the descriptors of `dray.ring.direct`, in the order of docs/reference/protocol.md.

On the other lanes, a client that may send READs with a body sets `BODIES` in HELLO; it may if CHALLENGE has it as
well.

A client offers its newest version. A server that speaks that version answers in it; otherwise it answers with
the verdict VERSION and its own newest version, and the client may connect again with that.

A proof is HMAC-SHA256(secret, role ‖ version ‖ lane ‖ client nonce ‖ server nonce ‖ producer id). The role keeps
a proof from being sent back to its sender. Without a secret, proofs are zero. A proof authenticates the peer; what
follows is neither encrypted nor signed.
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
from dray.protocol.frames import MIN_VERSION, VERSION

MAGIC = b"DRAY"
NONCE_BYTES = 32
PROOF_BYTES = 32
NO_PROOF = bytes(PROOF_BYTES)
MIN_SECRET_BYTES = 16
"""A client receives the server's proof before it sends its own, and can try secrets against it offline."""

ANY_PRODUCER = bytes(PRODUCER_ID_BYTES)
_SECRET_BYTES = 32

#                     magic version lane flags producer nonce
HELLO = struct.Struct("<4sHBB16s32s8x")
#                         magic version verdict flags producer nonce proof slots slot_bytes max_leases readers
CHALLENGE = struct.Struct("<4sHBB16s32s32sQQIB19x")
PROOF = struct.Struct(f"<{PROOF_BYTES}s")
#                        kernel reader
ATTACH = struct.Struct("<32sB31x")
#                        magic verdict flags
WELCOME = struct.Struct("<4sBB2x")

DIRECT_VERSION = 2
"""The oldest version with ATTACH."""

BODIES_VERSION = 2
"""The oldest version in which a READ may have a body."""


_WELCOME_FLAGS = 3


class LaneTraits(Protocol):
    """The properties of a lane that the protocol depends on; `dray.transport.lanes.base.Lane` has them.

    Attributes:
        number: its number in HELLO.
        in_band: payloads travel over the connection.
        tagged: a READ carries the tag under which its payload arrives.
    """

    number: int
    in_band: bool
    tagged: bool


class Verdict(enum.IntEnum):
    """The server's answer to HELLO and to PROOF."""

    WELCOME = 0
    VERSION = 1
    DENIED = 2
    MALFORMED = 3


class HelloFlag(enum.IntFlag):
    """Flags of HELLO and CHALLENGE."""

    NONE = 0
    SECRET = 1
    DIRECT = 2
    BODIES = 4


class WelcomeFlag(enum.IntFlag):
    """Flags of WELCOME."""

    NONE = 0
    ATTACHED = 1
    """The client may lease directly; the descriptors for that have come with the message."""
    NEWEST = 2
    """The ring keeps only the newest payload, and nothing is consumed there."""


@dataclass(frozen=True, slots=True)
class AttachRequest:
    """A client's request for direct leases.

    Attributes:
        kernel: a digest that only processes under one kernel have in common.
        reader: the client's reader id.
    """

    kernel: bytes
    reader: int


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """The ring behind a server, as CHALLENGE describes it."""

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


def proof(secret: bytes, role: bytes, *, version: int, lane: LaneTraits, nonces: bytes, producer: bytes) -> bytes:
    """HMAC-SHA256 over everything that both sides know of this handshake."""
    return hmac.digest(secret, role + bytes([version, lane.number]) + nonces + producer, hashlib.sha256)


class ClientHandshake:
    """The client's side: `hello` is sent first, `receive` gets each message of the server.

    Args:
        lane: the lane of the connection.
        producer: the producer that is expected.
        secret: the job's secret, if it has one.
        version: the version to offer.
        attach: the request for direct leases, if they are wanted.

    Attributes:
        server: the ring behind the server, after CHALLENGE.
        expects: the size of the server's next message in bytes.
        done: the server has accepted the client.
        attaching: the answer to CHALLENGE asks for direct leases, and needs a pidfd of this process with it.
        welcome: the flags of WELCOME.
        bodies: READs may have a body.
    """

    def __init__(
        self,
        lane: LaneTraits,
        producer: bytes = ANY_PRODUCER,
        secret: bytes | None = None,
        version: int = VERSION,
        *,
        attach: AttachRequest | None = None,
    ) -> None:
        self._lane = lane
        self._secret = secret
        self._producer = producer
        self._attach = None if lane.in_band or version < DIRECT_VERSION else attach
        self.attaching = False
        self.welcome = WelcomeFlag.NONE
        self.bodies = lane.in_band and version >= BODIES_VERSION
        self._version = version
        self._nonce = os.urandom(NONCE_BYTES)
        self.server: ServerIdentity | None = None
        self.expects = CHALLENGE.size
        self.done = False

    def hello(self) -> bytes:
        """The first message of the connection."""
        flags = HelloFlag.SECRET if self._secret is not None else HelloFlag.NONE
        if self._attach is not None:
            flags |= HelloFlag.DIRECT
        if self.bodies:
            flags |= HelloFlag.BODIES
        return HELLO.pack(MAGIC, self._version, self._lane.number, flags, self._producer, self._nonce)

    def receive(self, message: bytes | bytearray | memoryview) -> bytes | None:
        """The answer to the server's next message, of `expects` bytes; ``None`` if there is none.

        ``None`` before `done` means that `server` is not the expected producer: the client must disconnect.

        Raises:
            VersionMismatch: the server does not speak the version that was offered.
            AuthenticationError: one side has no secret, or a wrong one.
            ProtocolError: the peer is not a dray server.
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
        if version != self._version or verdict == Verdict.VERSION:
            raise VersionMismatch(
                f"the server speaks version {version}, this client version {self._version}", version=version
            )
        if verdict != Verdict.WELCOME:
            raise ProtocolError(f"the server refused HELLO: {_verdict(verdict)}")
        if not (slots and slot_bytes and max_leases and 1 <= readers <= MAX_READERS):
            raise ProtocolError(
                f"CHALLENGE announces {slots} slots of {slot_bytes} bytes, {max_leases} leases, {readers} readers"
            )
        self.server = ServerIdentity(producer, slots, slot_bytes, max_leases, readers)
        self.bodies = self.bodies and bool(flags & HelloFlag.BODIES)
        if self._producer not in (ANY_PRODUCER, producer):
            # Before the proof is checked: the address may belong to another job by now, with another secret.
            return None
        if bool(flags & HelloFlag.SECRET) != (self._secret is not None):
            missing = "this client" if self._secret is None else "the server"
            raise AuthenticationError(f"{missing} has no secret, the other side has one")
        answer = NO_PROOF
        if self._secret is not None:
            if not hmac.compare_digest(self._proof(b"server", nonce, producer), theirs):
                raise AuthenticationError("the server's proof of the secret is wrong")
            answer = self._proof(b"client", nonce, producer)
        self.expects = WELCOME.size
        if self._attach is None or not flags & HelloFlag.DIRECT:
            return PROOF.pack(answer)
        self.attaching = True
        return PROOF.pack(answer) + ATTACH.pack(self._attach.kernel, self._attach.reader)

    def _proof(self, role: bytes, nonce: bytes, producer: bytes) -> bytes:
        assert self._secret is not None
        return proof(
            self._secret,
            role,
            version=self._version,
            lane=self._lane,
            nonces=self._nonce + nonce,
            producer=producer,
        )

    def _welcome(self, message: bytes | bytearray | memoryview) -> None:
        magic, verdict, flags = WELCOME.unpack(message)
        if magic != MAGIC:
            raise ProtocolError(f"WELCOME begins with {bytes(magic)!r}")
        if verdict == Verdict.DENIED:
            raise AuthenticationError("the server refused this client's proof of the secret")
        if verdict != Verdict.WELCOME:
            raise ProtocolError(f"the server refused the connection: {_verdict(verdict)}")
        self.welcome = WelcomeFlag(flags & _WELCOME_FLAGS)
        if self.welcome & WelcomeFlag.ATTACHED and not self.attaching:
            raise ProtocolError("the server grants direct leases that were not asked for")
        self.done = True


class ServerHandshake:
    """The server's side: `receive` gets each message of the client and returns the answer.

    Args:
        lane: the lane of the connection.
        identity: the ring behind the server.
        secret: the job's secret, if it has one.
        newest: the newest version to speak; every older one from `MIN_VERSION` on is spoken as well.
        direct: direct leases are offered.

    Attributes:
        expects: the size of the client's next message in bytes.
        attach: the client's request for direct leases; a pidfd has come with its message.
        attaching: that message is expected next.
        bodies: READs may have a body.
        version: the version that the client has offered, or `newest`.
        verdict: after any verdict but ``WELCOME`` the answer is sent, then the connection ends.
        done: the client is accepted.
        unproven: the client has received the server's proof and has not sent its own. If it disconnects now, the
            secrets differ.
    """

    def __init__(
        self,
        lane: LaneTraits,
        identity: ServerIdentity,
        secret: bytes | None = None,
        newest: int = VERSION,
        *,
        direct: bool = False,
    ) -> None:
        self._lane = lane
        self._identity = identity
        self._secret = secret
        self._direct = direct and not lane.in_band
        self._nonces = b""
        self.attach: AttachRequest | None = None
        self.attaching = self.bodies = False
        self.expects = HELLO.size
        self.version = newest
        self.verdict = Verdict.WELCOME
        self.done = False
        self.unproven = False

    def receive(self, message: bytes | bytearray | memoryview) -> bytes:
        """The answer to the client's next message, of `expects` bytes; empty if `welcome` makes it.

        No message raises an exception.
        """
        return self._check_proof(message) if self._nonces else self._hello(message)

    def _hello(self, message: bytes | bytearray | memoryview) -> bytes:
        magic, version, lane, flags, expected, nonce = HELLO.unpack(message)
        who = self._identity
        if magic != MAGIC:
            self.verdict = Verdict.MALFORMED
        elif not MIN_VERSION <= version <= self.version:
            self.verdict = Verdict.VERSION
        else:
            self.version = version
            if lane != self._lane.number:
                self.verdict = Verdict.MALFORMED
        mine = os.urandom(NONCE_BYTES)
        self._nonces = nonce + mine
        guarded = self._secret is not None or flags & HelloFlag.SECRET
        self.unproven = bool(
            self.verdict is Verdict.WELCOME and guarded and expected in (ANY_PRODUCER, who.producer)
        )
        self.attaching = bool(
            self._direct
            and self.verdict is Verdict.WELCOME
            and flags & HelloFlag.DIRECT
            and version >= DIRECT_VERSION
        )
        self.bodies = bool(
            self._lane.in_band
            and self.verdict is Verdict.WELCOME
            and flags & HelloFlag.BODIES
            and version >= BODIES_VERSION
        )
        self.expects = PROOF.size + (ATTACH.size if self.attaching else 0)
        answer = self._proof(b"server") if self._secret is not None and flags & HelloFlag.SECRET else NO_PROOF
        ours = HelloFlag.NONE if self._secret is None else HelloFlag.SECRET
        if self.attaching:
            ours |= HelloFlag.DIRECT
        if self.bodies:
            ours |= HelloFlag.BODIES
        return CHALLENGE.pack(
            MAGIC, self.version, self.verdict, ours, who.producer, mine, answer,
            who.slots, who.slot_bytes, who.max_leases, who.readers,
        )  # fmt: skip

    def _check_proof(self, message: bytes | bytearray | memoryview) -> bytes:
        (theirs,) = PROOF.unpack_from(message)
        self.unproven = False
        expected = NO_PROOF if self._secret is None else self._proof(b"client")
        if not hmac.compare_digest(expected, theirs):
            self.verdict = Verdict.DENIED
        self.done = self.verdict is Verdict.WELCOME
        if self.done and self.attaching:
            self.attach = AttachRequest(*ATTACH.unpack_from(message, PROOF.size))
            return b""
        return WELCOME.pack(MAGIC, self.verdict, 0)

    def welcome(self, flags: WelcomeFlag) -> bytes:
        """The answer to a client with an `attach` request."""
        return WELCOME.pack(MAGIC, Verdict.WELCOME, flags)

    def _proof(self, role: bytes) -> bytes:
        assert self._secret is not None
        return proof(
            self._secret,
            role,
            version=self.version,
            lane=self._lane,
            nonces=self._nonces,
            producer=self._identity.producer,
        )


def _verdict(number: int) -> str:
    return Verdict(number).name.lower() if number in frozenset(Verdict) else f"verdict {number}"
