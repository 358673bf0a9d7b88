"""The client's end of one connection, after the handshake, without I/O: requests, their answers, their ACKs."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from dray.errors import DrayError, ProtocolError, ReaderIdError, ServerBusy, SlotError, StaleSlotError
from dray.printable import printable
from dray.protocol.frames import FRAME, Flag, Frame, Kind, Status, parse

_STATUS, _ACK = int(Kind.STATUS), int(Kind.ACK)


class Request(NamedTuple):
    """One request of a client, as it waits for its answer."""

    kind: Kind
    request: int
    slot: int = 0
    sequence: int = 0
    reader: int = 0
    nbytes: int = 0
    tag: int = 0
    flags: int = Flag.NONE

    def pack(self) -> bytes:
        """The request's frame."""
        kind, number, slot, sequence, reader, nbytes, tag, flags = self
        return FRAME.pack(kind, 0, reader, flags, slot, number, sequence, nbytes, 0, 0, tag, 0)


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
        self,
        kind: Kind,
        slot: int = 0,
        sequence: int = 0,
        reader: int = 0,
        nbytes: int = 0,
        tag: int = 0,
        flags: int = Flag.NONE,
    ) -> Request:
        """A new request, already counted as waiting for its answer."""
        # `Request(…)` does the same, by way of a function in Python.
        request = tuple.__new__(Request, (kind, self._next, slot, sequence, reader, nbytes, tag, flags))
        self._next += 1
        self._pending.append(request)
        return request

    def receive(self, message: bytes | bytearray | memoryview) -> tuple[Request, Frame]:
        """Match a STATUS with the oldest request.

        Raises:
            ProtocolError: it answers another one, or confirms ACKs that were not sent; the connection must be
                aborted.
        """
        frame = parse(message)
        kind, status, _, flags, slot, number, sequence, _, _, acked, _, _ = frame
        if kind != _STATUS or not self._pending:
            raise ProtocolError(f"the server sent {Kind(kind).name} where no STATUS was due")
        request = self._pending.popleft()
        if number != request[1] or slot != request[2] or sequence != request[3]:
            raise ProtocolError(
                f"STATUS names request {number}, slot {slot}, sequence {sequence}; awaited was "
                f"request {request.request}, slot {request.slot}, sequence {request.sequence}"
            )
        if flags & Flag.TEXT and status != Status.ERROR and request.kind != Kind.STAT:
            raise ProtocolError(f"a text follows {Status(status).name} of {request.kind.name}")
        if acked > self._acks:
            raise ProtocolError(f"STATUS confirms {acked} ACKs, of which {self._acks} were sent")
        unconfirmed = self._unconfirmed
        while unconfirmed and unconfirmed[0][0] <= acked:
            unconfirmed.popleft()
        return request, frame

    def forget(self, request: Request) -> None:
        """Take a payload that will be read again out of `unconfirmed`."""
        self._unconfirmed = deque(entry for entry in self._unconfirmed if entry[1] is not request)

    def ack(self, request: Request, consumed: bool) -> bytes:
        """The ACK for a READ that was answered OK."""
        self._acks += 1
        if consumed:
            self._unconfirmed.append((self._acks, request))
        _, number, slot, sequence, reader, _, _, _ = request
        return FRAME.pack(
            _ACK, 0, reader, Flag.CONSUMED if consumed else Flag.NONE, slot, number, sequence, 0, 0, 0, 0, 0
        )


def refusal(request: Request, frame: Frame, text: str, endpoint: str, readers: int) -> DrayError:
    """The error that stands for an answer other than OK, of a ring that has so many readers."""
    where: dict[str, Any] = {"endpoint": endpoint, "slot": request.slot, "sequence": request.sequence}
    match frame.status:
        case Status.STALE:
            return StaleSlotError("the payload was consumed or overwritten", **where)
        case Status.BUSY:
            return ServerBusy("the lease limit of this connection is reached", **where)
        case Status.DENIED:
            return ReaderIdError(
                f"reader id {request.reader} is denied: this ring's are 0 to {readers - 1}", **where
            )
        case _:
            return SlotError(f"the server answered with an error: {printable(text) or 'no reason given'}", **where)
