"""Frames: the layout of every message after the handshake.

All integers are little-endian. A message is one 64-byte frame:

```
 0    1      2        3       4        8          16         24       32         40      48    56       64
 ┌────┬──────┬────────┬───────┬────────┬──────────┬──────────┬────────┬──────────┬───────┬─────┬────────┐
 │kind│status│ reader │ flags │ slot   │ request  │ sequence │ nbytes │ checksum │ acked │ tag │ offset │
 │ u8 │ u8   │ u8     │ u8    │ u32    │ u64      │ u64      │ u64    │ u64      │ u64   │ u64 │ u64    │
 └────┴──────┴────────┴───────┴────────┴──────────┴──────────┴────────┴──────────┴───────┴─────┴────────┘
```

READ, CONSUME, STAT, DESCRIBE and SUBSCRIBE are requests. One STATUS with the same request id answers each, in
order. ACK has no answer: `acked` of STATUS counts the ACKs processed so far. A READ may have a body: the text of a
selection, padded with spaces to whole frames, whose size is in `offset`. After SUBSCRIBE a connection carries
the frames of `dray.protocol.streams` only. Fields that a kind does not use are zero. docs/reference/protocol.md
explains every field.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple, TypeAlias

from dray.errors import ProtocolError

VERSION = 2
"""The newest version of the protocol, which a client offers first."""

MIN_VERSION = 1
"""The oldest version that is still spoken. Versions 1 and 2 have the same messages."""

FRAME = struct.Struct("<BBBBI QQQQQQQ")
FRAME_BYTES = FRAME.size

MAX_TEXT_BYTES = 64 * 1024
"""Size limit of the text after STATUS: an error message, or the answer to STAT."""

MAX_BODY_BYTES = 64 * 1024
"""Size limit of the body of a READ."""

MAX_ADDED_BYTES = (4 << 20) + 8
"""How much larger than the whole payload the answer to a READ with a body can be: it has a header of its own."""


class Kind(enum.IntEnum):
    """The kind of a frame."""

    READ = 1
    STATUS = 2
    ACK = 3
    CONSUME = 4
    STAT = 5
    DESCRIBE = 6
    SUBSCRIBE = 7
    GIVE = 8
    END = 9
    CREDIT = 10
    BEGIN = 11
    RETURN = 12


class Status(enum.IntEnum):
    """The result of a request."""

    OK = 0
    STALE = 1
    ERROR = 2
    BUSY = 3
    DENIED = 4
    UNSELECTABLE = 5


class Flag:
    """Flags of a frame. Plain integers, because an `enum.Flag` runs Python code for every ``&``."""

    NONE: Final = 0
    CONSUMED: Final = 1  # ACK: the payload is consumed; otherwise the lease is released
    CHECKSUM: Final = 2  # STATUS: `checksum` holds the payload's xxh3-64
    TEXT: Final = 4  # STATUS: `nbytes` bytes of UTF-8 text follow as a message, and no payload
    INLINE: Final = 8  # READ: the payload shall follow its STATUS as a message
    WORDS: Final = 16  # STATUS of SUBSCRIBE: a descriptor of `dray.ring.stream_words` came with the message
    BEGUN: Final = 32  # RETURN: the consumer's program had the payload
    DRAINING: Final = 64  # END: the end follows once everything is consumed; nothing more is put
    BODY: Final = 128  # READ: `offset` bytes follow, which select a part of the payload


class Frame(NamedTuple):
    """One frame, unpacked. The fields have the order of the bytes."""

    kind: int
    status: int = 0
    reader: int = 0
    flags: int = 0
    slot: int = 0
    request: int = 0
    sequence: int = 0
    nbytes: int = 0
    checksum: int = 0
    acked: int = 0
    tag: int = 0
    offset: int = 0

    def pack(self) -> bytes:
        """The frame's 64 bytes."""
        return FRAME.pack(*self)


class Payload(NamedTuple):
    """A payload to be sent as one message, under the tag that the client has named."""

    view: memoryview
    tag: int


Outgoing: TypeAlias = bytes | Payload
"""What a stream sends: a message or a payload."""

_STATUSES = frozenset(map(int, Status))
_FORBIDDEN_FLAGS = {
    int(kind): ~allowed
    for kind, allowed in {
        Kind.READ: Flag.INLINE | Flag.BODY,
        Kind.STATUS: Flag.CHECKSUM | Flag.TEXT | Flag.WORDS,
        Kind.ACK: Flag.CONSUMED,
        Kind.CONSUME: Flag.NONE,
        Kind.STAT: Flag.NONE,
        Kind.DESCRIBE: Flag.NONE,
        Kind.SUBSCRIBE: Flag.NONE,
        Kind.GIVE: Flag.NONE,
        Kind.END: Flag.DRAINING,
        Kind.CREDIT: Flag.NONE,
        Kind.BEGIN: Flag.NONE,
        Kind.RETURN: Flag.BEGUN,
    }.items()
}
VALID_HEADS: Final = frozenset(
    (kind, int(Status.OK), flags)
    for kind, forbidden in _FORBIDDEN_FLAGS.items()
    for flags in range(256)
    if not flags & (forbidden | Flag.TEXT) and flags != Flag.INLINE | Flag.BODY
)
"""(kind, status, flags) of valid frames without a text. Other frames need `check`."""


def parse(message: bytes | bytearray | memoryview) -> Frame:
    """Read one frame from exactly 64 untrusted bytes.

    Raises:
        ProtocolError: wrong size, unknown kind, status or flag.
    """
    if len(message) != FRAME_BYTES:
        raise ProtocolError(f"a frame has {FRAME_BYTES} bytes, got {len(message)}")
    # `Frame(…)` would call a function in Python.
    frame: Frame = tuple.__new__(Frame, FRAME.unpack(message))
    if (frame[0], frame[1], frame[3]) not in VALID_HEADS:
        check(frame.kind, frame.status, frame.flags, frame.nbytes)
    return frame


def check(kind: int, status: int, flags: int, nbytes: int) -> None:
    """Refuse a frame that no peer may send.

    Raises:
        ProtocolError: unknown kind, status or flag, or a text that is too long.
    """
    forbidden = _FORBIDDEN_FLAGS.get(kind)
    if forbidden is None:
        raise ProtocolError(f"unknown frame kind {kind}")
    if status not in _STATUSES:
        raise ProtocolError(f"unknown status {status}")
    if flags & forbidden:
        raise ProtocolError(f"unknown flags {flags:#x} in a {Kind(kind).name} frame")
    if flags == Flag.INLINE | Flag.BODY:
        raise ProtocolError("a READ with a body cannot be inline")
    if flags & Flag.TEXT and nbytes > MAX_TEXT_BYTES:
        raise ProtocolError(f"a text has at most {MAX_TEXT_BYTES} bytes, {nbytes} were announced")
