"""The two ends of one connection as state machines: messages in, answers out, no I/O.

A driver in `transport` reads `expects` bytes, hands them to `receive`, and sends what `take` returns. The server's
end owns the leases of its connection: each READ it answers with STATUS(ok) has one lease, which ends exactly once,
by the reader's ACK or in `close`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dray.errors import (
    AuthenticationError,
    BufferClosedError,
    DrayError,
    ProtocolError,
    ServerBusy,
    SlotError,
    StaleSlotError,
)
from dray.telemetry import Counters
from dray.wire.frames import FRAME, FRAME_BYTES, MAX_TEXT_BYTES, Flag, Frame, Kind, Status, parse
from dray.wire.handshake import Lane, ServerHandshake, ServerIdentity, Verdict

MAX_PENDING = 4096
"""Requests a client may have unanswered on one connection; more is a protocol error."""

NO_BYTES = memoryview(b"")
"""On the ucx lane a client posts its receive before it asks, so every READ gets one tagged message, if empty."""

MAX_INLINE_BYTES = 16 * 1024
"""On the ucx lane a READ without a tag has a payload of up to this size sent with its STATUS, in one message."""

BATCH_BYTES = 256 * 1024
"""Payloads that are handed to the stream together, to be sent in one go."""


class LeaseLike(Protocol):
    """What the session needs of a lease: `buffer` is the payload, `offset` its place in the segment."""

    @property
    def slot(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def reader(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def buffer(self) -> memoryview: ...
    @property
    def offset(self) -> int: ...


class LeaseSource(Protocol):
    """What the session needs of a ring; see `dray.buffer.SharedRingBuffer`."""

    def read_raw(self, slot: int, sequence: int, reader: int = 0) -> LeaseLike: ...
    def mark_consumed(self, lease: Any) -> bool: ...
    def release_reading(self, lease: Any) -> bool: ...
    def consume(self, slot: int, sequence: int, reader: int = 0) -> bool: ...
    def checksum(self, slot: int, sequence: int, compute: Callable[[memoryview], int]) -> int: ...


@dataclass(frozen=True, slots=True)
class Payload:
    """A payload to be sent as one message; `tag` is where the client expects it."""

    view: memoryview
    tag: int


Outgoing = bytes | Payload


class ServerSession:
    """The server's end of one connection.

    Args:
        lane: how the bytes of this connection travel.
        ring: where the payloads are.
        identity: what the handshake tells of the ring.
        secret: the job's secret, if it has one.
        checksum: computes a payload's checksum, or ``None`` to send none.
        describe: the text that answers STAT.
        counters: where this session counts.

    Attributes:
        established: the handshake is over and the client may ask.
        expects: bytes of the client's next message.
        closing: no answer follows those that `take` has still to give.
    """

    def __init__(
        self,
        lane: Lane,
        ring: LeaseSource,
        identity: ServerIdentity,
        *,
        secret: bytes | None = None,
        checksum: Callable[[memoryview], int] | None = None,
        describe: Callable[[], str] = lambda: "{}",
        counters: Counters | None = None,
    ) -> None:
        self._lane = lane
        self._ring = ring
        self._identity = identity
        self._checksum = checksum
        self._describe = describe
        self._counters = counters or Counters()
        self._handshake = ServerHandshake(lane, identity, secret)
        self._requests: deque[Frame] = deque()
        self._outgoing: list[Outgoing] = []
        self._leases: dict[int, LeaseLike] = {}
        self._sending: set[int] = set()
        self._acked = 0
        self.established = False
        self.expects = self._handshake.expects
        self.closing = False

    @property
    def leases(self) -> int:
        """Leases alive on this connection; one that has any is not idle."""
        return len(self._leases)

    @property
    def busy(self) -> bool:
        """A request is waiting for its answer, or an answer is on its way out."""
        return bool(self._requests or self._outgoing or self._sending)

    def receive(self, message: bytes | bytearray | memoryview) -> None:
        """Take the client's next message, of exactly `expects` bytes; after a refusal, do nothing with it.

        Raises:
            ProtocolError: the message is not one a client may send now; the connection must be aborted.
        """
        if self.closing:
            return
        if not self.established:
            self._shake(message)
            return
        frame = parse(message)
        if frame.kind == Kind.ACK:
            self._ack(frame)
        elif frame.kind == Kind.STATUS:
            raise ProtocolError("a client sent STATUS")
        elif len(self._requests) >= MAX_PENDING:
            raise ProtocolError(f"more than {MAX_PENDING} requests are unanswered on one connection")
        else:
            self._requests.append(frame)

    def take(self) -> list[Outgoing]:
        """What to send next, in order. Call `flushed` when all of it is out, then `take` again."""
        if self._sending or not (self._requests or self._outgoing):
            return []
        taken, self._outgoing = self._outgoing, []
        batch = 0
        while self._requests and not self.closing and batch < BATCH_BYTES:
            batch += self._answer(self._requests.popleft(), taken)
        return taken

    def flushed(self) -> None:
        """All that `take` returned has left: nothing reads those slots for sending any more."""
        self._sending.clear()

    def close(self) -> None:
        """Return every lease. The stream must no longer read from their slots. May be called twice."""
        if self._handshake.unproven and not self.closing:
            self._counters.add("auth_failures")
        self.closing = True
        self._sending.clear()
        self._requests.clear()
        self._outgoing.clear()
        leases, self._leases = self._leases, {}
        for lease in leases.values():
            self._ring.release_reading(lease)

    # --- what each message does -------------------------------------------------------------------------------

    def _shake(self, message: bytes | bytearray | memoryview) -> None:
        self._outgoing.append(self._handshake.receive(message))
        self.established = self._handshake.done
        self.expects = FRAME_BYTES if self.established else self._handshake.expects
        verdict = self._handshake.verdict
        if verdict is not Verdict.WELCOME:
            self.closing = True
            self._counters.add("auth_failures" if verdict is Verdict.DENIED else "malformed")

    def _ack(self, frame: Frame) -> None:
        if frame.request in self._sending:
            raise ProtocolError(f"request {frame.request} was acknowledged before its payload was sent")
        self._acked += 1
        lease = self._leases.get(frame.request)
        consumed = frame.flags & Flag.CONSUMED
        if lease is None:
            self._counters.add("late_acks")
            if consumed and frame.reader < self._identity.readers and frame.slot < self._identity.slots:
                with contextlib.suppress(BufferClosedError):
                    self._ring.consume(frame.slot, frame.sequence, frame.reader)
            return
        if (lease.slot, lease.sequence, lease.reader) != (frame.slot, frame.sequence, frame.reader):
            raise ProtocolError(f"ACK of request {frame.request} names another slot, sequence or reader")
        del self._leases[frame.request]
        if consumed:
            self._ring.mark_consumed(lease)
        else:
            self._ring.release_reading(lease)
        self._counters.add("acks_consumed" if consumed else "acks_returned")

    def _answer(self, request: Frame, taken: list[Outgoing]) -> int:
        """Append the answer to one request; the number of payload bytes in it."""
        nbytes = 0
        try:
            if request.kind == Kind.READ:
                nbytes = self._read(request, taken)
            elif request.kind == Kind.CONSUME:
                taken.append(self._status(request, self._consume(request)))
            else:
                self._say(request, Status.OK, self._describe(), taken)
        except BufferClosedError as error:
            self.closing = True
            self._say(request, Status.ERROR, str(error), taken)
        if request.tag and not nbytes and request.kind == Kind.READ and self._lane is Lane.UCX:
            taken.append(Payload(NO_BYTES, request.tag))
        return nbytes

    def _consume(self, request: Frame) -> Status:
        if request.reader >= self._identity.readers:
            return Status.DENIED
        known = request.slot < self._identity.slots and self._ring.consume(
            request.slot, request.sequence, request.reader
        )
        self._counters.add("consumed" if known else "consumed_stale")
        return Status.OK if known else Status.STALE

    def _read(self, request: Frame, taken: list[Outgoing]) -> int:
        refused = self._refusal(request)
        if refused is not None:
            self._counters.add(refused.name.lower())
            taken.append(self._status(request, refused))
            return 0
        try:
            lease = self._ring.read_raw(request.slot, request.sequence, request.reader)
        except StaleSlotError:
            self._counters.add("stale")
            taken.append(self._status(request, Status.STALE))
            return 0
        except BufferClosedError:
            raise
        except SlotError as error:
            self._counters.add("error")
            self._say(request, Status.ERROR, str(error), taken)
            return 0
        inline = self._lane is Lane.UCX and not request.tag
        unfit = ""
        if request.nbytes not in (0, lease.nbytes):
            unfit = f"the payload has {lease.nbytes} bytes, the reference says {request.nbytes}"
        elif inline and lease.nbytes > MAX_INLINE_BYTES:
            unfit = f"a payload of {lease.nbytes} bytes needs a tag"
        if unfit:
            self._ring.release_reading(lease)
            self._counters.add("error")
            self._say(request, Status.ERROR, unfit, taken)
            return 0
        self._leases[request.request] = lease
        in_band = self._lane is not Lane.SHM and lease.nbytes > 0
        # Taken before STATUS(ok) is said: the ring may be closed by another thread at any moment.
        view = lease.buffer if in_band else NO_BYTES
        flags, checksum = 0, 0
        if self._checksum is not None and lease.nbytes:
            flags, checksum = (
                Flag.CHECKSUM,
                self._ring.checksum(lease.slot, lease.sequence, self._checksum),
            )
        taken.append(
            FRAME.pack(
                Kind.STATUS, Status.OK, request.reader, flags, lease.slot, request.request, lease.sequence,
                lease.nbytes, checksum, self._acked, request.tag, lease.offset,
            )
        )  # fmt: skip
        self._counters.add_all({"reads": 1, "bytes": lease.nbytes})
        if not in_band:
            return 0
        if inline:
            taken.append(bytes(view))
            return lease.nbytes
        taken.append(Payload(view, request.tag))
        self._sending.add(request.request)
        return lease.nbytes

    def _refusal(self, request: Frame) -> Status | None:
        if request.reader >= self._identity.readers:
            return Status.DENIED
        if request.slot >= self._identity.slots:
            return Status.STALE
        if len(self._leases) >= self._identity.max_leases:
            return Status.BUSY
        if request.request in self._leases:
            raise ProtocolError(f"request id {request.request} is used twice")
        return None

    def _status(self, request: Frame, status: Status, flags: int = 0, nbytes: int = 0) -> bytes:
        return Frame(
            Kind.STATUS, status, request.reader, flags, request.slot, request.request, request.sequence,
            nbytes, 0, self._acked,
        ).pack()  # fmt: skip

    def _say(self, request: Frame, status: Status, text: str, taken: list[Outgoing]) -> None:
        encoded = text.encode()[:MAX_TEXT_BYTES]
        taken.append(self._status(request, status, Flag.TEXT, len(encoded)))
        taken.append(encoded)


class Request(NamedTuple):
    """One request of a client, as it waits for its answer."""

    kind: Kind
    request: int
    slot: int = 0
    sequence: int = 0
    reader: int = 0
    nbytes: int = 0
    tag: int = 0

    def pack(self) -> bytes:
        """The request's frame."""
        return FRAME.pack(
            self.kind, 0, self.reader, 0, self.slot, self.request, self.sequence, self.nbytes, 0, 0, self.tag, 0
        )


class ClientSession:
    """The client's end of one connection, after the handshake: numbers requests and matches answers."""

    def __init__(self) -> None:
        self._next = 0
        self._pending: deque[Request] = deque()
        self._acks = 0
        self._unconfirmed: deque[tuple[int, Request]] = deque()

    @property
    def pending(self) -> int:
        """Requests without an answer so far."""
        return len(self._pending)

    @property
    def unconfirmed(self) -> list[Request]:
        """Reads whose ACK(consumed) no answer has confirmed yet, oldest first."""
        return [request for _, request in tuple(self._unconfirmed)]  # its thread may go on meanwhile

    def request(
        self, kind: Kind, slot: int = 0, sequence: int = 0, reader: int = 0, nbytes: int = 0, tag: int = 0
    ) -> Request:
        """A new request, already counted as waiting for its answer."""
        request = Request(kind, self._next, slot, sequence, reader, nbytes, tag)
        self._next += 1
        self._pending.append(request)
        return request

    def receive(self, message: bytes | bytearray | memoryview) -> tuple[Request, Frame]:
        """Match a STATUS with the oldest request.

        Raises:
            ProtocolError: it answers another one; the connection must be aborted.
        """
        frame = parse(message)
        if frame.kind != Kind.STATUS or not self._pending:
            raise ProtocolError(f"the server sent {Kind(frame.kind).name} where no STATUS was due")
        request = self._pending.popleft()
        if (frame.request, frame.slot, frame.sequence) != (request.request, request.slot, request.sequence):
            raise ProtocolError(
                f"STATUS names request {frame.request}, slot {frame.slot}, sequence {frame.sequence}; awaited was "
                f"request {request.request}, slot {request.slot}, sequence {request.sequence}"
            )
        if frame.flags & Flag.TEXT and frame.status != Status.ERROR and request.kind != Kind.STAT:
            raise ProtocolError(f"a text follows {Status(frame.status).name} of {request.kind.name}")
        while self._unconfirmed and self._unconfirmed[0][0] <= frame.acked:
            self._unconfirmed.popleft()
        return request, frame

    def forget(self, request: Request) -> None:
        """Take a payload that will be read again out of `unconfirmed`."""
        self._unconfirmed = deque(entry for entry in self._unconfirmed if entry[1] is not request)

    def ack(self, request: Request, consumed: bool) -> bytes:
        """The ACK for a READ that was answered OK."""
        self._acks += 1
        if consumed:
            self._unconfirmed.append((self._acks, request))
        flags = Flag.CONSUMED if consumed else Flag.NONE
        return FRAME.pack(
            Kind.ACK, 0, request.reader, flags, request.slot, request.request, request.sequence, 0, 0, 0, 0, 0
        )


def refusal(request: Request, frame: Frame, text: str, endpoint: str) -> DrayError:
    """The error that stands for an answer other than OK."""
    where: dict[str, Any] = {"endpoint": endpoint, "slot": request.slot, "sequence": request.sequence}
    match frame.status:
        case Status.STALE:
            return StaleSlotError("the payload was consumed or overwritten", **where)
        case Status.BUSY:
            return ServerBusy("the lease limit of this connection is reached", **where)
        case Status.DENIED:
            return AuthenticationError(f"reader id {request.reader} is not one of this ring's readers", **where)
        case _:
            return SlotError(f"the server answered with an error: {text or 'no reason given'}", **where)
