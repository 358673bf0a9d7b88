"""The client's end of one connection as a state machine: requests become bytes, bytes become events. No I/O.

A driver in `transport` sends what `request` and `ack` return, and gives the server's messages, each of `expects`
bytes, to `receive`. Answers come in the order of the requests. What follows a STATUS as a message:

| request | OK | ERROR | other |
|---|---|---|---|
| READ with INLINE | the payload | a text, if announced | nothing |
| READ with a body | on a tagged lane, the sizes of the payload's messages | a text, if announced | nothing |
| READ, CONSUME | nothing | a text, if announced | nothing |
| STAT, DESCRIBE | a text, if announced | a text, if announced | a text, if announced |
| SUBSCRIBE | nothing; with WORDS, a descriptor came with STATUS | a text, if announced | nothing |

UNSELECTABLE is followed as ERROR is. A payload or text of no bytes is no message. The payload of a READ without
INLINE does not pass through here. OK, and STALE for CONSUME, become an `Answer`, everything else a `Refusal`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from dray.errors import (
    DrayError,
    ProtocolError,
    ReaderIdError,
    SelectionError,
    ServerBusy,
    SlotError,
    StaleSlotError,
)
from dray.identifiers import MAX_READERS
from dray.protocol.frames import (
    FRAME,
    FRAME_BYTES,
    MAX_ADDED_BYTES,
    VALID_HEADS,
    Flag,
    Frame,
    Kind,
    Status,
    check,
)
from dray.text import printable

STATUS: Final = "STATUS"
TEXT: Final = "the text after STATUS"
PAYLOAD: Final = "the payload"
SIZES: Final = "the sizes of the payload's messages"

MAX_PAYLOAD_MESSAGES: Final = 1 << 15
"""Limit on the messages of one payload: more than it can have tensors and ranges of rows."""

_STATUS, _ACK, _READ = int(Kind.STATUS), int(Kind.ACK), int(Kind.READ)
_DESCRIPTIONS: Final = frozenset((Kind.STAT, Kind.DESCRIBE))
_TEXT: Final = Flag.TEXT
_RARE: Final = Flag.TEXT | Flag.WORDS
_BODY: Final = Flag.BODY
_WITH_TEXT: Final = frozenset((Status.ERROR, Status.UNSELECTABLE))


class Request(NamedTuple):
    """One request of a client."""

    kind: Kind
    request: int
    slot: int = 0
    sequence: int = 0
    reader: int = 0
    nbytes: int = 0
    tag: int = 0
    flags: int = Flag.NONE


class Answer(NamedTuple):
    """The server has carried out a request.

    Attributes:
        request: the request.
        frame: its STATUS; for a READ without a body it has the size that the request has.
        body: the text, inline payload or sizes after it, else empty; valid as long as the message is.
    """

    request: Request
    frame: Frame
    body: bytes | bytearray | memoryview


_answer: Callable[[type[Answer], tuple[Any, ...]], Answer] = tuple.__new__  # `Answer(…)` is a function in Python


class Refusal(NamedTuple):
    """The server has not carried out a request, for the reason in `error`; the connection stays usable."""

    request: Request
    frame: Frame
    error: DrayError


Event: TypeAlias = Answer | Refusal


class ClientSession:
    """The client's end of one connection, after the handshake.

    Args:
        endpoint: the address that errors name.
        readers: reader ids of the ring, for errors.
        tagged: payloads are tagged messages.

    Attributes:
        expects: bytes of the server's next message.
        awaits: what that message is: `STATUS`, `TEXT`, `PAYLOAD` or `SIZES`.
    """

    def __init__(self, endpoint: str | None = None, readers: int = MAX_READERS, *, tagged: bool = False) -> None:
        self._tagged = tagged
        self.expects = FRAME_BYTES
        self.awaits = STATUS
        self._endpoint = endpoint
        self._readers = readers
        self._next = 0
        self._pending: deque[Request] = deque()
        self._incomplete: tuple[Request, Frame] | None = None
        self._acks = 0
        self._unconfirmed: deque[tuple[int, Request]] = deque()

    @property
    def pending(self) -> int:
        """Requests without an answer so far."""
        return len(self._pending) + (self._incomplete is not None)

    @property
    def unconfirmed(self) -> list[Request]:
        """Reads whose ACK(consumed) no answer has confirmed yet, oldest first."""
        return [request for _, request in tuple(self._unconfirmed)]  # its thread may be changing it

    def request(
        self,
        kind: Kind,
        slot: int = 0,
        sequence: int = 0,
        reader: int = 0,
        *,
        nbytes: int = 0,
        tag: int = 0,
        flags: int = Flag.NONE,
        body: bytes = b"",
    ) -> bytes:
        """The frame of a new request, and its body; the request counts as pending from now on."""
        if body:
            body += b" " * (-len(body) % FRAME_BYTES)
            flags |= _BODY
        number = self._next
        self._next = number + 1
        # `Request(…)` does the same with one more call of a Python function.
        self._pending.append(tuple.__new__(Request, (kind, number, slot, sequence, reader, nbytes, tag, flags)))
        head = FRAME.pack(kind, 0, reader, flags, slot, number, sequence, nbytes, 0, 0, tag, len(body))
        return head + body if body else head

    def receive(self, message: bytes | bytearray | memoryview) -> Event | None:
        """Process the server's next message; the event that it completes, or None if more of it follows.

        Raises:
            ProtocolError: the server may not send this message now; the connection must be aborted.
        """
        if len(message) != self.expects:
            raise ProtocolError(f"{self.awaits} has {self.expects} bytes, got {len(message)}")
        if self._incomplete is not None:
            request, frame = self._incomplete
            self._incomplete = None
            self.expects, self.awaits = FRAME_BYTES, STATUS
            return (
                self._refusal(request, frame, message)
                if frame.status
                else _answer(Answer, (request, frame, message))
            )
        frame = tuple.__new__(Frame, FRAME.unpack(message))
        kind, status, _, flags, slot, number, sequence, nbytes, _, acked, _, count = frame
        if (kind, status, flags) not in VALID_HEADS:
            check(kind, status, flags, nbytes)
        if kind != _STATUS or not self._pending:
            raise ProtocolError(f"the server sent {Kind(kind).name} where no STATUS was due")
        request = self._pending.popleft()
        kind, expected, expected_slot, expected_sequence, _, expected_nbytes, _, asked = request
        if number != expected or slot != expected_slot or sequence != expected_sequence:
            raise ProtocolError(
                f"STATUS names request {number}, slot {slot}, sequence {sequence}; expected was "
                f"request {expected}, slot {expected_slot}, sequence {expected_sequence}"
            )
        if acked > self._acks:
            raise ProtocolError(f"STATUS confirms {acked} ACKs, of which {self._acks} were sent")
        unconfirmed = self._unconfirmed
        while unconfirmed and unconfirmed[0][0] <= acked:
            unconfirmed.popleft()
        follows = 0
        if flags & _RARE:
            if flags & Flag.WORDS and (status or kind != Kind.SUBSCRIBE):
                raise ProtocolError(f"a descriptor came with {Status(status).name} of {request.kind.name}")
            if flags & _TEXT:
                if status not in _WITH_TEXT and kind not in _DESCRIPTIONS:
                    raise ProtocolError(f"a text follows {Status(status).name} of {request.kind.name}")
                follows, awaits = nbytes, TEXT
        elif kind == _READ and not status and asked & _BODY:
            follows, awaits = self._check_part(expected_nbytes, nbytes, count), SIZES
        elif kind == _READ and not status:
            if nbytes != expected_nbytes:
                raise ProtocolError(
                    f"the payload has {nbytes} bytes, {expected_nbytes} according to its reference",
                    endpoint=self._endpoint,
                )
            if asked:  # INLINE
                follows, awaits = nbytes, PAYLOAD
        if follows:
            self._incomplete = request, frame
            self.expects, self.awaits = follows, awaits
            return None
        if status and not (status == Status.STALE and kind == Kind.CONSUME):
            return self._refusal(request, frame, b"")
        return _answer(Answer, (request, frame, b""))

    def _check_part(self, whole: int, nbytes: int, count: int) -> int:
        """The bytes of the sizes that follow STATUS."""
        if nbytes > whole + MAX_ADDED_BYTES:
            raise ProtocolError(
                f"the part of a payload has {nbytes} bytes, the whole {whole}", endpoint=self._endpoint
            )
        if not self._tagged:
            return 0
        if not 0 < count <= MAX_PAYLOAD_MESSAGES:
            raise ProtocolError(f"a payload comes in {count} messages", endpoint=self._endpoint)
        return 8 * count

    def ack(self, request: Request, consumed: bool) -> bytes:
        """The ACK for a READ that was answered OK."""
        self._acks += 1
        if consumed:
            self._unconfirmed.append((self._acks, request))
        _, number, slot, sequence, reader, _, _, _ = request
        return FRAME.pack(
            _ACK, 0, reader, Flag.CONSUMED if consumed else Flag.NONE, slot, number, sequence, 0, 0, 0, 0, 0
        )

    def forget(self, request: Request) -> None:
        """Remove a payload that will be read again from `unconfirmed`."""
        self._unconfirmed = deque(entry for entry in self._unconfirmed if entry[1] is not request)

    def _refusal(self, request: Request, frame: Frame, body: bytes | bytearray | memoryview) -> Refusal:
        where: dict[str, Any] = {"endpoint": self._endpoint, "slot": request.slot, "sequence": request.sequence}
        error: DrayError
        match frame.status:
            case Status.STALE:
                error = StaleSlotError("the payload was consumed or overwritten", **where)
            case Status.BUSY:
                error = ServerBusy("the lease limit of this connection is reached", **where)
            case Status.DENIED:
                error = ReaderIdError(
                    f"reader id {request.reader} is denied: this ring's are 0 to {self._readers - 1}", **where
                )
            case Status.UNSELECTABLE if request.flags & _BODY:
                error = SelectionError(printable(str(body, "utf-8", "replace")), **where)
            case _:
                reason = printable(str(body, "utf-8", "replace")) or "no reason given"
                error = SlotError(f"the server answered with an error: {reason}", **where)
        return Refusal(request, frame, error)
