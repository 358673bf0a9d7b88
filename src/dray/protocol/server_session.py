"""The server's end of one connection as a state machine: bytes in, events out; answers in, bytes out. No I/O.

`receive` takes messages of the client and returns what has happened. Requests wait in `requests`. Each of the
methods `grant`, `grant_part`, `copy`, `refuse`, `fail`, `answer` answers the oldest of them, so answers have the
order of the requests. `pop_outgoing` returns the bytes and payloads to send.

The session checks everything that the protocol demands of a client. It knows neither the ring nor the leases:
whether a payload is there, and what an acknowledgement ends, is for its user to find out and to do.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from dray.errors import ProtocolError
from dray.protocol.frames import (
    FRAME,
    FRAME_BYTES,
    MAX_BODY_BYTES,
    MAX_TEXT_BYTES,
    VALID_HEADS,
    VERSION,
    Flag,
    Kind,
    Outgoing,
    Payload,
    Status,
    check,
)
from dray.protocol.handshake import (
    AttachRequest,
    LaneTraits,
    ServerHandshake,
    ServerIdentity,
    Verdict,
    WelcomeFlag,
)
from dray.protocol.streams import ConsumerEvent, consumer_events

MAX_PENDING = 4096
"""Limit of the requests of one connection without an answer, and of its inline payloads without an ACK."""

MAX_INLINE_BYTES = 16 * 1024
"""Size limit of a payload that a READ with the flag INLINE asks for."""

NO_BYTES: Final = memoryview(b"")

_READ, _ACK, _STATUS = map(int, (Kind.READ, Kind.ACK, Kind.STATUS))
_REQUESTS: Final = frozenset(map(int, (Kind.READ, Kind.CONSUME, Kind.STAT, Kind.DESCRIBE, Kind.SUBSCRIBE)))
_OK = int(Status.OK)
_CHECKSUM, _INLINE, _BODY = Flag.CHECKSUM, Flag.INLINE, Flag.BODY


class Established(NamedTuple):
    """The handshake is complete: requests follow.

    Attributes:
        version: the version that both sides speak.
        attach: the client's request for direct leases, to which `ServerSession.welcome` is the answer.
    """

    version: int
    attach: AttachRequest | None = None


class Refused(NamedTuple):
    """The handshake has failed. The session accepts nothing more; its answer is still to be sent."""

    verdict: Verdict


class Acknowledgement(NamedTuple):
    """The client ends a read.

    Attributes:
        of: ``"lease"``: a read that was granted. ``"copy"``: one that was answered inline. ``"late"``: one that
            this connection does not know (any more).
        request: the id of the READ.
        payload: (slot, sequence, reader).
        consumed: the reader has consumed the payload; otherwise it can be read again.
    """

    of: Literal["lease", "copy", "late"]
    request: int
    payload: tuple[int, int, int]
    consumed: bool


class Violation(NamedTuple):
    """The client has broken the protocol; the connection must be aborted. No event follows."""

    error: ProtocolError


Event: TypeAlias = Established | Refused | Acknowledgement | ConsumerEvent | Violation


class ServerSession:
    """The server's end of one connection.

    Args:
        lane: the lane of the connection.
        identity: the ring, as the handshake describes it.
        secret: the job's secret, if it has one.
        newest: the newest protocol version to speak.
        direct: direct leases are offered.

    Attributes:
        established: the handshake is complete.
        closing: no answer follows those that `pop_outgoing` has still to return.
        expects: the size of the client's next message in bytes.
        requests: the requests without an answer, oldest first; each has the fields of a `Frame`.
        body_bytes: bytes of their bodies, and of one that has come in part.
        subscribed: the client has subscribed to the stream: no request follows, see `dray.protocol.streams`.
        sending: ids of the reads whose payload `pop_outgoing` has returned and that is not `flushed`.
    """

    def __init__(
        self,
        lane: LaneTraits,
        identity: ServerIdentity,
        *,
        secret: bytes | None = None,
        newest: int = VERSION,
        direct: bool = False,
    ) -> None:
        self._in_band = lane.in_band
        self._tagged = lane.tagged
        self._readers, self._slots, self._max_leases = identity.readers, identity.slots, identity.max_leases
        self._handshake = ServerHandshake(lane, identity, secret, newest, direct=direct)
        self._outgoing: list[Outgoing] = []
        self._granted: dict[int, tuple[int, int, int]] = {}
        self._copied: dict[int, tuple[int, int, int]] = {}
        self._acks = 0
        self._answered_ok = 0
        self.requests: deque[tuple[int, ...]] = deque()
        self._bodies: deque[bytes] = deque()  # of those of the requests that have one
        self._incomplete: tuple[tuple[int, ...], bytearray] | None = None  # a READ and what has come of its body
        self.body_bytes = 0
        self.sending: set[int] = set()
        self.established = False
        self.subscribed = False
        self.closing = False
        self.expects = self._handshake.expects

    @property
    def busy(self) -> bool:
        """A request has no answer, an answer has not left, or an inline payload is not acknowledged."""
        return bool(self.requests or self._outgoing or self.sending or self._copied)

    @property
    def unproven(self) -> bool:
        """The client has received the server's proof and sent none: if it disconnects now, the secrets differ."""
        return self._handshake.unproven

    @property
    def expects_descriptor(self) -> bool:
        """A descriptor comes with the client's next message."""
        return self._handshake.attaching and not (self.established or self.closing)

    # --- in ---------------------------------------------------------------------------------------------------

    def receive(self, messages: bytes | bytearray | memoryview) -> list[Event]:
        """What the client's next message, of `expects` bytes, means; new requests are added to `requests`.

        Once `established`, several messages may be passed together. While `closing`, messages are ignored.
        """
        if self.closing:
            return []
        if not self.established:
            return self._shake_hands(messages)
        if self.subscribed:
            return self._receive_of_consumer(messages)
        events: list[Event] = []
        requests, copied, new, incomplete = self.requests, self._copied, tuple.__new__, self._incomplete
        acks, answered = self._acks, self._answered_ok
        try:
            if len(messages) % FRAME_BYTES:
                raise ProtocolError(f"a frame has {FRAME_BYTES} bytes, got {len(messages)}")
            for fields in FRAME.iter_unpack(messages):
                if incomplete is not None:
                    incomplete = self._receive_body(FRAME.pack(*fields))
                    continue
                kind, status, reader, flags, slot, request, sequence, nbytes, _, _, _, size = fields
                if (kind, status, flags) not in VALID_HEADS:
                    check(kind, status, flags, nbytes)
                if kind == _ACK:
                    acks += 1
                    if acks > answered:
                        raise ProtocolError(f"{acks} ACKs came for {answered} READs that were answered OK")
                    payload = slot, sequence, reader
                    if copied.get(request) == payload:
                        del copied[request]
                        of = "copy"
                    else:
                        of = self._end_read(request, payload)
                    events.append(new(Acknowledgement, (of, request, payload, flags != 0)))
                elif kind not in _REQUESTS:
                    raise ProtocolError(f"a client that has not subscribed sent {Kind(kind).name}")
                elif len(requests) >= MAX_PENDING:
                    raise ProtocolError(f"more than {MAX_PENDING} requests are unanswered on one connection")
                elif flags & _BODY:
                    incomplete = self._begin_body(fields, size)
                else:
                    requests.append(fields)
        except ProtocolError as error:
            events.append(Violation(error))
        self._acks = acks
        return events

    def _begin_body(self, request: tuple[int, ...], size: int) -> tuple[tuple[int, ...], bytearray]:
        if not self._handshake.bodies:
            raise ProtocolError("a READ has a body, which the handshake has not agreed on")
        if not 0 < size <= MAX_BODY_BYTES or size % FRAME_BYTES:
            raise ProtocolError(
                f"the body of a READ has {size} bytes; it must have a multiple of {FRAME_BYTES}, "
                f"{MAX_BODY_BYTES} at most"
            )
        self._incomplete = request, bytearray()
        return self._incomplete

    def _receive_body(self, part: bytes) -> tuple[tuple[int, ...], bytearray] | None:
        """The READ whose body is not complete; None if it is now."""
        assert self._incomplete is not None
        request, body = self._incomplete
        body += part
        self.body_bytes += len(part)
        if len(body) == request[-1]:
            self.requests.append(request)
            self._bodies.append(bytes(body))
            self._incomplete = None
        return self._incomplete

    def _receive_of_consumer(self, messages: bytes | bytearray | memoryview) -> list[Event]:
        try:
            return list(consumer_events(messages))
        except ProtocolError as error:
            return [Violation(error)]

    def _shake_hands(self, message: bytes | bytearray | memoryview) -> list[Event]:
        handshake = self._handshake
        if answer := handshake.receive(message):
            self._outgoing.append(answer)
        self.expects = handshake.expects
        if handshake.done:
            self.established = True
            self.expects = FRAME_BYTES
            return [Established(handshake.version, handshake.attach)]
        if handshake.verdict is not Verdict.WELCOME:
            self.closing = True
            return [Refused(handshake.verdict)]
        return []

    def welcome(self, flags: WelcomeFlag) -> None:
        """Answer a request for direct leases."""
        self._outgoing.append(self._handshake.welcome(flags))

    def _end_read(self, request: int, payload: tuple[int, int, int]) -> Literal["lease", "late"]:
        if request in self.sending:
            raise ProtocolError(f"request {request} was acknowledged before its payload was sent")
        read = self._granted.get(request) or self._copied.get(request)
        if read is None:
            return "late"
        if read != payload:
            raise ProtocolError(f"ACK of request {request} names another slot, sequence or reader")
        del self._granted[request]
        return "lease"

    # --- answers to the oldest request ------------------------------------------------------------------------

    def refusal(self) -> Status | None:
        """The refusal that the oldest request, a READ or a CONSUME, gets whatever the ring holds; None if none.

        Raises:
            ProtocolError: no client may send this request; the connection must be aborted.
        """
        kind, _, reader, flags, slot, request, _, _, _, _, tag, _ = self.requests[0]
        if reader >= self._readers:
            return Status.DENIED
        if slot >= self._slots:
            return Status.STALE
        if kind != _READ or flags & _INLINE:
            return None
        if len(self._granted) >= self._max_leases:
            return Status.BUSY
        if request in self._granted or request in self._copied:
            raise ProtocolError(f"request id {request} is used twice")
        if self._tagged and not tag:
            raise ProtocolError("a READ on the ucx lane has no tag, and is not inline")
        return None

    @property
    def body(self) -> bytes:
        """The body of the oldest request, which has one."""
        return self._bodies[0]

    def grant(self, view: memoryview, nbytes: int, offset: int, *, flags: int = 0, checksum: int = 0) -> None:
        """Answer a READ: the client has a lease until it sends ACK.

        Args:
            view: the payload; it is read until `flushed`, and only where payloads travel over the connection.
            nbytes: its size.
            offset: its place in the segment.
            flags: `Flag.CHECKSUM` if `checksum` is one.
            checksum: the payload's checksum.
        """
        _, _, reader, _, slot, request, sequence, _, _, _, tag, _ = self.requests.popleft()
        self._granted[request] = slot, sequence, reader
        self._answered_ok += 1
        outgoing = self._outgoing
        outgoing.append(
            FRAME.pack(
                _STATUS, _OK, reader, flags, slot, request, sequence, nbytes, checksum, self._acks, tag, offset
            )
        )
        if self._in_band and nbytes:
            self.sending.add(request)
            outgoing.append(Payload(view, tag))
        elif self._tagged:
            outgoing.append(Payload(NO_BYTES, tag))

    def grant_part(self, views: Sequence[memoryview], nbytes: int, *, flags: int = 0, checksum: int = 0) -> None:
        """Answer a READ with a body: `grant` for a part of the payload, whose bytes lie in several places.

        Where payloads are tagged messages, each view is one; their sizes follow STATUS as a message.

        Args:
            views: the part; they are read until `flushed`.
            nbytes: the size of all of them.
            flags, checksum: as for `grant`.
        """
        request = self._pop_request()
        _, _, reader, _, slot, number, sequence, _, _, _, tag, _ = request
        self._granted[number] = slot, sequence, reader
        self._answered_ok += 1
        count = len(views) if self._tagged else 0
        self._outgoing.append(
            FRAME.pack(
                _STATUS, _OK, reader, flags, slot, number, sequence, nbytes, checksum, self._acks, tag, count
            )
        )
        if count:
            self._outgoing.append(struct.pack(f"<{count}Q", *[view.nbytes for view in views]))
        self.sending.add(number)
        self._outgoing += [Payload(view, tag) for view in views]

    def copy(self, payload: bytes, checksum: int | None) -> None:
        """Answer an inline READ with the payload and, unless it is None, its checksum.

        Raises:
            ProtocolError: no client may send this request; the connection must be aborted.
        """
        _, _, reader, _, slot, request, sequence, _, _, _, tag, _ = self.requests.popleft()
        copied, outgoing = self._copied, self._outgoing
        if request in copied or request in self._granted:
            raise ProtocolError(f"request id {request} is used twice")
        if len(copied) >= MAX_PENDING:
            raise ProtocolError(f"{MAX_PENDING} inline payloads wait for their ACK already")
        copied[request] = slot, sequence, reader
        self._answered_ok += 1
        nbytes = len(payload)
        flags, checksum = (0, 0) if checksum is None else (_CHECKSUM, checksum)
        outgoing.append(
            FRAME.pack(_STATUS, _OK, reader, flags, slot, request, sequence, nbytes, checksum, self._acks, tag, 0)
        )
        outgoing.append(payload)

    def subscribe(self, words: bool) -> None:
        """Answer a SUBSCRIBE; with `words`, a descriptor goes with the message."""
        request = self.requests.popleft()
        if self.requests or self._incomplete is not None:
            raise ProtocolError("requests follow SUBSCRIBE")
        self.subscribed = True
        self._append_status(request, Status.OK, flags=Flag.WORDS if words else Flag.NONE)

    def push(self, frame: bytes) -> None:
        """Send a frame of the stream to a consumer that has subscribed."""
        self._outgoing.append(frame)

    def refuse(self, status: Status) -> None:
        """Answer a READ, a CONSUME or a SUBSCRIBE with a status alone."""
        request = self._pop_request()
        self._append_status(request, status)
        self._append_empty_payload(request)

    def answer(self, text: str | None = None) -> None:
        """Answer a CONSUME, or with a text a STAT or a DESCRIBE, with OK."""
        request = self.requests.popleft()
        self._append_status(request, Status.OK, text)

    def fail(self, text: str, status: Status = Status.ERROR) -> None:
        """Answer with ERROR, or another status with a text, and a sentence that names the cause."""
        request = self._pop_request()
        self._append_status(request, status, text)
        self._append_empty_payload(request)

    def fail_all(self, text: str) -> None:
        """Answer with ERROR, and give the other requests no answer: the connection ends."""
        self.fail(text)
        self._clear_requests()
        self.closing = True

    def _pop_request(self) -> tuple[int, ...]:
        request = self.requests.popleft()
        if request[0] == _READ and request[3] & _BODY:
            self.body_bytes -= len(self._bodies.popleft())
        return request

    def _clear_requests(self) -> None:
        self.requests.clear()
        self._bodies.clear()
        self._incomplete, self.body_bytes = None, 0

    def _append_status(
        self, request: tuple[int, ...], status: Status, text: str | None = None, flags: int = Flag.NONE
    ) -> None:
        encoded = b"" if text is None else text.encode()[:MAX_TEXT_BYTES]
        if text is not None:
            flags |= Flag.TEXT
        _, _, reader, _, slot, number, sequence, _, _, _, _, _ = request
        self._outgoing.append(
            FRAME.pack(_STATUS, status, reader, flags, slot, number, sequence, len(encoded), 0, self._acks, 0, 0)
        )
        if text is not None:
            self._outgoing.append(encoded)

    def _append_empty_payload(self, request: tuple[int, ...]) -> None:
        """On a tagged lane the client has already posted its receive for the payload of a READ without a body."""
        kind, _, _, flags, _, _, _, _, _, _, tag, _ = request
        if self._tagged and kind == _READ and tag and not flags:
            self._outgoing.append(Payload(NO_BYTES, tag))

    # --- out --------------------------------------------------------------------------------------------------

    def pop_outgoing(self) -> list[Outgoing]:
        """What to send next, in order. Call `flushed` when all of it has left."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def flushed(self) -> None:
        """All that `pop_outgoing` has returned has left: no slot is read any more for sending."""
        self.sending.clear()

    def close(self) -> None:
        """Give no more answers. Twice is fine."""
        self.closing = True
        self._clear_requests()
        self.sending.clear()
        self._outgoing.clear()
        self._granted.clear()
        self._copied.clear()
