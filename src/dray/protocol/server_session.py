"""The server's end of one connection as a state machine: messages in, answers out, no I/O.

A driver in `transport` reads `expects` bytes, hands them to `receive`, and sends what `take` returns. The server's
end owns the leases of its connection: each READ it answers with STATUS(ok) has one lease, which ends exactly once,
by the reader's ACK or in `close`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    ProtocolError,
    SlotError,
    StaleSlotError,
)
from dray.identifiers import Wanted
from dray.protocol.contract import LeaseLike, LeaseSource
from dray.protocol.frames import (
    FRAME,
    FRAME_BYTES,
    MAX_TEXT_BYTES,
    USUAL,
    Flag,
    Frame,
    Kind,
    Outgoing,
    Payload,
    Status,
    check,
    fields,
)
from dray.protocol.handshake import LaneTraits, ServerHandshake, ServerIdentity, Verdict

MAX_PENDING = 4096
"""Requests a client may have unanswered on one connection; more is a protocol error."""

NO_BYTES = memoryview(b"")
"""On the ucx lane a client posts its receive before it asks, so every READ gets one tagged message, if empty."""

MAX_INLINE_BYTES = 16 * 1024
"""A READ with INLINE may ask for payloads of up to this size."""

BATCH_BYTES = 8 << 20
"""Payloads that are handed to the stream together: what it can send one behind the other without a pause."""

COPY_WEIGHT = 32
"""An inline payload takes so many times its size of a batch: until it is sent, it is in memory twice."""

REQUEST_WEIGHT = BATCH_BYTES >> 10
"""The least that an answer takes of a batch, whatever its payload. STAT costs the most and takes a whole one."""

_READ, _ACK, _STATUS = map(int, (Kind.READ, Kind.ACK, Kind.STATUS))
_OK = int(Status.OK)


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
        lane: LaneTraits,
        ring: LeaseSource,
        identity: ServerIdentity,
        *,
        secret: bytes | None = None,
        checksum: Callable[[memoryview | bytes], int] | None = None,
        describe: Callable[[], str] = lambda: "{}",
        counters: Counters | None = None,
    ) -> None:
        self._in_band = lane.in_band
        self._tagged = lane.tagged
        self._ring = ring
        self._readers, self._slots, self._max_leases = identity.readers, identity.slots, identity.max_leases
        self._checksum = checksum
        self._describe = describe
        self._counters = counters or Counters()
        self._handshake = ServerHandshake(lane, identity, secret)
        self._requests: deque[tuple[int, ...]] = deque()
        self._outgoing: list[Outgoing] = []
        self._leases: dict[int, LeaseLike] = {}
        self._copied: dict[int, Wanted] = {}
        self._sending: set[int] = set()
        self._acked = 0
        self._granted = 0
        self._tally: defaultdict[str, int] = defaultdict(int)
        self.established = False
        self.expects = self._handshake.expects
        self.closing = False

    @property
    def leases(self) -> int:
        """Leases alive on this connection; one that has any is not idle."""
        return len(self._leases)

    @property
    def leased(self) -> list[tuple[int, int]]:
        """(slot, sequence number) of each payload that is leased on this connection."""
        return [(lease.slot, lease.sequence) for lease in self._leases.values()]

    @property
    def unanswered(self) -> int:
        """Requests that wait for their answer."""
        return len(self._requests)

    @property
    def sending_bytes(self) -> int:
        """Bytes of the leased payloads that the stream has not sent to their end."""
        return sum(self._leases[request].nbytes for request in self._sending)

    @property
    def busy(self) -> bool:
        """A request waits for its answer, an answer is on its way out, or an inline one is not acknowledged."""
        return bool(self._requests or self._outgoing or self._sending or self._copied)

    def receive(self, messages: bytes | bytearray | memoryview) -> None:
        """Take the client's next message, of exactly `expects` bytes; after a refusal, do nothing with it.

        Once `established`, any number of messages may be given together.

        Raises:
            ProtocolError: a message is not one a client may send now; the connection must be aborted.
        """
        if self.closing:
            return
        if not self.established:
            self._shake(messages)
            return
        requests = self._requests
        consumed: list[Wanted] = []
        try:
            for frame in fields(messages):
                kind, status, reader, flags, slot, request, sequence, nbytes, _, _, _, _ = frame
                if (kind, status, flags) not in USUAL:
                    check(kind, status, flags, nbytes)
                if kind == _ACK:
                    self._ack(request, (slot, sequence, reader), flags, consumed)
                elif kind == _STATUS:
                    raise ProtocolError("a client sent STATUS")
                elif len(requests) >= MAX_PENDING:
                    raise ProtocolError(f"more than {MAX_PENDING} requests are unanswered on one connection")
                else:
                    requests.append(frame)
        finally:
            if consumed:
                with contextlib.suppress(BufferClosedError):
                    self._ring.consume_many(consumed)
            self._count()

    def take(self) -> list[Outgoing]:
        """What to send next, in order. Call `flushed` when all of it is out, then `take` again."""
        if self._sending or not (self._requests or self._outgoing):
            return []
        taken, self._outgoing = self._outgoing, []
        batch = 0
        while self._requests and not self.closing and batch < BATCH_BYTES:
            batch += self._answer(taken)
        self._count()  # before anybody can have seen the answers
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
        self._copied.clear()
        leases, self._leases = self._leases, {}
        for lease in leases.values():
            lease.release()

    def _count(self) -> None:
        """Add what was tallied to the counters, which other threads use as well."""
        if self._tally:
            self._counters.add_all(self._tally)
            self._tally.clear()

    # --- what each message does -------------------------------------------------------------------------------

    def _shake(self, message: bytes | bytearray | memoryview) -> None:
        self._outgoing.append(self._handshake.receive(message))
        self.established = self._handshake.done
        self.expects = FRAME_BYTES if self.established else self._handshake.expects
        verdict = self._handshake.verdict
        if verdict is not Verdict.WELCOME:
            self.closing = True
            self._counters.add("auth_failures" if verdict is Verdict.DENIED else "malformed")

    def _ack(self, request: int, named: Wanted, flags: int, consumed: list[Wanted]) -> None:
        """End a read; what was copied, or is leased no more, joins `consumed` if it is."""
        self._acked += 1
        if self._acked > self._granted:
            raise ProtocolError(f"{self._acked} ACKs came for {self._granted} READs that were answered OK")
        copied = self._copied.pop(request, None)
        if copied is None:
            self._end_lease(request, named, flags, consumed)
            return
        if copied != named:
            raise ProtocolError(f"ACK of request {request} names another slot, sequence or reader")
        if flags & Flag.CONSUMED:
            self._tally["acks_consumed"] += 1
            consumed.append(named)
        else:
            self._tally["acks_returned"] += 1

    def _end_lease(self, request: int, named: Wanted, flags: int, consumed: list[Wanted]) -> None:
        if request in self._sending:
            raise ProtocolError(f"request {request} was acknowledged before its payload was sent")
        lease = self._leases.get(request)
        if lease is None:
            self._tally["late_acks"] += 1
            slot, _, reader = named
            known = reader < self._readers and slot < self._slots
            if known and flags & Flag.CONSUMED:
                consumed.append(named)
            return
        if (lease.slot, lease.sequence, lease.reader) != named:
            raise ProtocolError(f"ACK of request {request} names another slot, sequence or reader")
        del self._leases[request]
        if flags & Flag.CONSUMED:
            self._tally["acks_consumed"] += 1
            lease.acknowledge()
        else:
            self._tally["acks_returned"] += 1
            lease.release()

    def _answer(self, taken: list[Outgoing]) -> int:
        """Append the answer to the oldest request, or the oldest inline ones; how much of a batch that takes."""
        frame = self._requests[0]
        read = frame[0] == _READ
        nbytes = 0
        try:
            if read and frame[3] & Flag.INLINE:
                return self._copy(taken)
            self._requests.popleft()
            if read:
                nbytes = self._read(frame, taken)
            elif frame[0] == Kind.CONSUME:
                request = Frame._make(frame)
                taken.append(self._status(request, self._consume(request)))
            else:
                self._say(Frame._make(frame), Status.OK, self._describe(), taken)
                return BATCH_BYTES
        except BufferClosedError as error:
            self.closing = True
            self._requests.clear()
            self._say(Frame._make(frame), Status.ERROR, str(error), taken)
        if read and not nbytes and self._tagged and frame[10]:
            taken.append(Payload(NO_BYTES, frame[10]))
        return max(nbytes, REQUEST_WEIGHT)

    def _consume(self, request: Frame) -> Status:
        if request.reader >= self._readers:
            return Status.DENIED
        known = request.slot < self._slots and self._ring.consume(request.slot, request.sequence, request.reader)
        self._tally["consumed" if known else "consumed_stale"] += 1
        return Status.OK if known else Status.STALE

    def _read(self, frame: tuple[int, ...], taken: list[Outgoing]) -> int:
        """Answer a READ with a lease, and on network lanes its payload."""
        _, _, reader, _, slot, request, sequence, size, _, _, tag, _ = frame
        leases = self._leases
        if reader >= self._readers or slot >= self._slots or len(leases) >= self._max_leases:
            return self._refuse(Frame._make(frame), self._refusal(reader, slot) or Status.BUSY, taken)
        if request in leases or request in self._copied:
            raise ProtocolError(f"request id {request} is used twice")
        if self._tagged and not tag:
            raise ProtocolError("a READ on the ucx lane has no tag, and is not inline")
        try:
            lease = self._ring.read_raw(slot, sequence, reader)
        except StaleSlotError:
            return self._refuse(Frame._make(frame), Status.STALE, taken)
        except BufferClosedError:
            raise
        except SlotError as error:
            return self._fail(Frame._make(frame), str(error), taken)
        nbytes = lease.nbytes
        if size != nbytes and size:
            lease.release()
            return self._fail(Frame._make(frame), _other_size(size, nbytes), taken)
        leases[request] = lease
        in_band = self._in_band and nbytes > 0
        # Taken before STATUS(ok) is said: the ring may be closed by another thread at any moment.
        view = lease.buffer if in_band else NO_BYTES
        flags, checksum = Flag.NONE, 0
        if not self._in_band:
            checksum = int(lease.committed_at * 1e9)
        elif self._checksum is not None and nbytes:
            flags, checksum = Flag.CHECKSUM, self._ring.checksum(slot, sequence, self._checksum)
        taken.append(
            FRAME.pack(
                _STATUS,
                _OK,
                reader,
                flags,
                slot,
                request,
                sequence,
                nbytes,
                checksum,
                self._acked,
                tag,
                lease.offset,
            )
        )
        self._granted += 1
        self._tally["reads"] += 1
        self._tally["bytes"] += nbytes
        if not in_band:
            return 0
        taken.append(Payload(view, tag))
        self._sending.add(request)
        return nbytes

    def _copy(self, taken: list[Outgoing]) -> int:
        """Answer the inline READs that are due, with copies of payloads whose slots need no lease from then on."""
        requests, copied, inline = self._requests, self._copied, Flag.INLINE
        due = []
        weight = 0
        while requests and weight < BATCH_BYTES and requests[0][0] == _READ and requests[0][3] & inline:
            due.append(requests.popleft())
            # A size of 0 asks for whatever size the payload has.
            weight += _copy_weight(min(due[-1][7] or MAX_INLINE_BYTES, MAX_INLINE_BYTES))
        found = self._ring.copy_many([(frame[4], frame[6], frame[2]) for frame in due], MAX_INLINE_BYTES)
        reads = nbytes = 0
        for frame, copy in zip(due, found, strict=True):
            _, _, reader, _, slot, request, sequence, size, _, _, tag, _ = frame
            if copy.__class__ is not tuple:
                self._refuse_copy(Frame._make(frame), copy, taken)
                continue
            payload, checksum = copy
            if size and size != len(payload):
                self._fail(Frame._make(frame), _other_size(size, len(payload)), taken)
                continue
            if len(copied) >= MAX_PENDING or request in copied or request in self._leases:
                raise ProtocolError(f"request id {request} is used twice, or {len(copied)} payloads wait for ACKs")
            flags = Flag.NONE
            if self._checksum is not None and payload:
                flags = Flag.CHECKSUM
                checksum = self._checksum(payload) if checksum is None else checksum
            copied[request] = slot, sequence, reader
            taken.append(
                FRAME.pack(
                    _STATUS, _OK, reader, flags, slot, request, sequence, len(payload), checksum or 0, self._acked,
                    tag, 0,
                )
            )  # fmt: skip
            taken.append(payload)
            reads += 1
            nbytes += len(payload)
        self._granted += reads
        self._tally["reads"] += reads
        self._tally["bytes"] += nbytes
        return _copy_weight(nbytes, len(due))

    def _refuse_copy(self, request: Frame, error: Any, taken: list[Outgoing]) -> None:
        refused = self._refusal(request.reader, request.slot)
        if refused is None and isinstance(error, StaleSlotError):
            refused = Status.STALE
        if refused is None:
            self._fail(request, str(error), taken)
        else:
            self._refuse(request, refused, taken)

    def _refusal(self, reader: int, slot: int) -> Status | None:
        if reader >= self._readers:
            return Status.DENIED
        return Status.STALE if slot >= self._slots else None

    def _refuse(self, request: Frame, status: Status, taken: list[Outgoing]) -> int:
        self._tally[status.name.lower()] += 1
        taken.append(self._status(request, status))
        return 0

    def _fail(self, request: Frame, why: str, taken: list[Outgoing]) -> int:
        self._tally["error"] += 1
        self._say(request, Status.ERROR, why, taken)
        return 0

    def _status(self, request: Frame, status: Status, flags: int = 0, nbytes: int = 0) -> bytes:
        return Frame(
            Kind.STATUS, status, request.reader, flags, request.slot, request.request, request.sequence,
            nbytes, 0, self._acked,
        ).pack()  # fmt: skip

    def _say(self, request: Frame, status: Status, text: str, taken: list[Outgoing]) -> None:
        encoded = text.encode()[:MAX_TEXT_BYTES]
        taken.append(self._status(request, status, Flag.TEXT, len(encoded)))
        taken.append(encoded)


def _copy_weight(nbytes: int, answers: int = 1) -> int:
    return answers * REQUEST_WEIGHT + COPY_WEIGHT * nbytes


def _other_size(said: int, nbytes: int) -> str:
    return f"the payload has {nbytes} bytes, the reference says {said}"
