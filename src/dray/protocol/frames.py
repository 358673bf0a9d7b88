"""The frames: every byte that dray puts on a connection, besides payloads, is laid out here.

All integers are little-endian. After the handshake (`handshake.py`) every message is one 64-byte frame:

```
 0    1      2        3       4        8          16         24       32         40      48    56       64
 ┌────┬──────┬────────┬───────┬────────┬──────────┬──────────┬────────┬──────────┬───────┬─────┬────────┐
 │kind│status│ reader │ flags │ slot   │ request  │ sequence │ nbytes │ checksum │ acked │ tag │ offset │
 │ u8 │ u8   │ u8     │ u8    │ u32    │ u64      │ u64      │ u64    │ u64      │ u64   │ u64 │ u64    │
 └────┴──────┴────────┴───────┴────────┴──────────┴──────────┴────────┴──────────┴───────┴─────┴────────┘
```

READ, CONSUME and STAT are requests; each is answered by one STATUS with the same request id, in order. ACK is
not answered: STATUS frames count the ACKs processed so far in `acked`. Fields a kind does not use are zero. In
READ `nbytes` is the size that the reference says, or 0: a payload of another size is refused with ERROR. READ with
flag INLINE has a small payload follow its STATUS as a message, on every lane. On the shm lane, where a payload
stays in its slot, `checksum` of STATUS says when it was committed, in nanoseconds of the ring's clock.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from dray.errors import ProtocolError

VERSION = 1
FRAME = struct.Struct("<BBBBI QQQQQQQ")
FRAME_BYTES = FRAME.size

MAX_TEXT_BYTES = 64 * 1024
"""Longest text after STATUS: an error message, or the answer to STAT."""


class Kind(enum.IntEnum):
    """What a frame is."""

    READ = 1
    STATUS = 2
    ACK = 3
    CONSUME = 4
    STAT = 5


class Status(enum.IntEnum):
    """How a request went."""

    OK = 0
    STALE = 1
    ERROR = 2
    BUSY = 3
    DENIED = 4


class Flag:
    """What else a frame says. Plain integers: an `enum.Flag` runs Python code for every ``&``."""

    NONE: Final = 0
    CONSUMED: Final = 1  # ACK: the reader is done with the payload for good; otherwise the lease is returned
    CHECKSUM: Final = 2  # STATUS: `checksum` holds the payload's xxh3-64
    TEXT: Final = 4  # STATUS: `nbytes` bytes of UTF-8 text follow on the frame channel, and no payload
    INLINE: Final = 8  # READ: the payload is to follow its STATUS on the frame channel, copied out of its slot


class Frame(NamedTuple):
    """One frame, unpacked. Field order is the wire's."""

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


@dataclass(frozen=True, slots=True)
class Payload:
    """A payload to be sent as one message; `tag` is where the client expects it."""

    view: memoryview
    tag: int


Outgoing: TypeAlias = bytes | Payload
"""What a stream sends."""

_STATUSES = frozenset(map(int, Status))
_FORBIDDEN_FLAGS = {
    int(kind): ~allowed
    for kind, allowed in {
        Kind.READ: Flag.INLINE,
        Kind.STATUS: Flag.CHECKSUM | Flag.TEXT,
        Kind.ACK: Flag.CONSUMED,
        Kind.CONSUME: Flag.NONE,
        Kind.STAT: Flag.NONE,
    }.items()
}
USUAL: Final = frozenset(
    (kind, int(Status.OK), flags)
    for kind, forbidden in _FORBIDDEN_FLAGS.items()
    for flags in range(16)
    if not flags & (forbidden | Flag.TEXT)
)
"""What `check` need not be asked: (kind, status, flags) of frames that nothing is wrong with."""


def parse(message: bytes | bytearray | memoryview) -> Frame:
    """Read one frame from exactly 64 untrusted bytes.

    Raises:
        ProtocolError: wrong size, unknown kind, status or flag.
    """
    if len(message) != FRAME_BYTES:
        raise ProtocolError(f"a frame has {FRAME_BYTES} bytes, got {len(message)}")
    # `Frame(…)` does the same, by way of a function in Python.
    frame: Frame = tuple.__new__(Frame, FRAME.unpack(message))
    if (frame[0], frame[1], frame[3]) not in USUAL:
        check(frame.kind, frame.status, frame.flags, frame.nbytes)
    return frame


def fields(messages: bytes | bytearray | memoryview) -> Iterator[tuple[int, ...]]:
    """The fields of frames that lie one behind the other, unpacked and not yet looked at by `check`.

    Raises:
        ProtocolError: there is part of a frame.
    """
    if len(messages) % FRAME_BYTES:
        raise ProtocolError(f"a frame has {FRAME_BYTES} bytes, got {len(messages)}")
    return FRAME.iter_unpack(messages)


def check(kind: int, status: int, flags: int, nbytes: int) -> None:
    """Refuse what no frame may say.

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
    if flags & Flag.TEXT and nbytes > MAX_TEXT_BYTES:
        raise ProtocolError(f"a text has at most {MAX_TEXT_BYTES} bytes, announced were {nbytes}")
